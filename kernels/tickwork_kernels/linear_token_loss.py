"""``linear_token_loss``: an elementwise loss under a linear head, value and gradients in one sweep of two GEMMs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from tickwork_kernels.head import Adapters, HeadKernel
from tickwork_kernels.head_checks import IGNORE, Call, HeadOptions, prepare
from tickwork_kernels.head_sweep import evaluate
from tickwork_kernels.heads import choose_both
from tickwork_kernels.linear_logprob import needs_of, spread_gradients
from tickwork_kernels.support import refuse_second_derivatives
from tickwork_kernels.token_losses import BoundLoss, Inputs, TokenLoss, bind


class TokenLossResult(NamedTuple):
    """What ``linear_token_loss`` returns.

    Args:
        loss: the sum of all tokens' losses; differentiable.
        losses: of each target, in their shape.
        logprobs: in their shape.
        lse: ``[N]``.
        entropy: ``[N]`` in nats, or None.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    logprobs: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None


def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss: str | TokenLoss,
    inputs: Inputs,
    config: Mapping[str, float] | None = None,
    *,
    bias: torch.Tensor | None = None,
    multiplier: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    lora: Adapters = None,
    entropy: bool = False,
    ignore_index: int = IGNORE,
    impl: str = "auto",
    check: bool | None = None,
) -> TokenLossResult:
    """Sum of a token loss; its gradients are made while the logits are at hand, and nothing is held but them.

    Semantics: ``losses, _ = loss(linear_logprob(hidden, weight, targets).logprobs, inputs, config); losses.sum()``.

    Args:
        loss: a registered name or a ``TokenLoss``.
        inputs: name -> tensor of the targets' shape.
        config: settings of the loss that differ from its defaults.
        entropy: whether to compute it; it has no gradient here.

    All other arguments are those of ``linear_logprob``.

    Returns:
        ``TokenLossResult``; ``loss.backward()`` only scales gradients that exist already.

    Raises:
        ValueError: an argument is wrong; names it.
        NotImplementedError: ``impl`` can not do what is asked, or an input requires a gradient; names the reason and
            the alternatives.
    """
    options = HeadOptions(bias, multiplier, softcap, temperature, lora, ignore_index, check)
    call = prepare(hidden, weight, targets, options, needs_of(hidden, weight, options, False), entropy)
    bound = _bound(loss, inputs, config, targets, call)
    leaves = [tensor for each in call.rows.adapters for tensor in (each.a, each.b) if tensor is not None]
    kernels = choose_both(call.rows, bound, impl)
    found = _LinearTokenLoss.apply(call, kernels, bound, hidden, weight, bias, *leaves)  # type: ignore[no-untyped-call]
    total, losses, logprobs, lse, spread = found
    return TokenLossResult(total, losses.view(targets.shape), logprobs.view(targets.shape), lse, spread)


def _bound(
    loss: str | TokenLoss, inputs: Inputs, config: Mapping[str, float] | None, targets: torch.Tensor, call: Call
) -> BoundLoss:
    bound = bind(loss, inputs, config)
    laid = {}
    for name, value in bound.inputs.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"inputs[{name!r}] must be a tensor, not {type(value).__name__}")
        if value.shape != targets.shape or value.device != targets.device:
            raise ValueError(
                f"inputs[{name!r}] must be {list(targets.shape)} on {targets.device} as targets, not "
                f"{list(value.shape)} on {value.device}"
            )
        if value.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"inputs[{name!r}] has no gradient here; detach it, or use linear_logprob")
        wide = value.detach().to(call.rows.head.dtype)
        laid[name] = call.gather(wide if wide.dim() == 2 else wide[:, None])
    return BoundLoss(bound.loss, laid, bound.config, call.ignored)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, kernels: tuple[HeadKernel, HeadKernel], bound: BoundLoss, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        with call.own_dtypes():
            whole, gradients = evaluate(*kernels, call.rows, bound)
        ctx.call, ctx.gradients = call, gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        assert whole.losses is not None
        entropy = None if whole.entropy is None else call.spread(whole.entropy)
        logprobs = bound.mask(whole.logprobs)
        outputs = [call.spread(part) for part in (whole.losses, logprobs, whole.lse)]
        ctx.mark_non_differentiable(*outputs, *([] if entropy is None else [entropy]))
        return whole.losses.sum(), *outputs, entropy

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        grads = spread_gradients(ctx.call, ctx.gradients)
        return (None,) * 3 + tuple(
            None if grad is None else (grad * upstream).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
