"""``linear_logprob``: logprobs, lse and entropy under a linear head, with gradients for any upstream of each."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from tickwork_kernels.head import Adapters, HeadCase, HeadKernel, Needs, as_segments
from tickwork_kernels.head_checks import IGNORE, Call, HeadOptions, prepare
from tickwork_kernels.head_held import CACHE_BYTES, HeldLogprobs, Memory
from tickwork_kernels.head_sweep import HeadGradients
from tickwork_kernels.head_targets import Upstream
from tickwork_kernels.heads import choose_head
from tickwork_kernels.registry import Choice
from tickwork_kernels.support import refuse_second_derivatives

Entropy = Literal[False, True, "detached"]


class LinearLogprobs(NamedTuple):
    """What ``linear_logprob`` returns.

    Args:
        logprobs: of the targets, in their shape.
        lse: ``[N]`` logsumexp of the logits.
        entropy: ``[N]`` in nats, or None.
    """

    logprobs: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    multiplier: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    lora: Adapters = None,
    entropy: Entropy = False,
    ignore_index: int = IGNORE,
    memory: Memory | Literal["auto"] = "auto",
    cache_bytes: int = CACHE_BYTES,
    impl: str = "auto",
    check: bool | None = None,
) -> LinearLogprobs:
    """Logprobs of target tokens without ever holding ``[N, V]`` logits, for any loss on top.

    Semantics: ``u = softcap((hidden @ (weight + s * b @ a).T + bias) * multiplier) / temperature``, then
    ``u.log_softmax(-1).gather(1, targets), u.logsumexp(-1), -(p * log p).sum(-1)``.

    Args:
        hidden: ``[N, D]`` float32, bfloat16 or float64.
        weight: ``[V, D]`` of the same dtype. Frozen unless it requires a gradient.
        targets: ``[N]`` or ``[N, K]`` int64; may repeat within a row.
        bias: ``[V]``.
        multiplier: factor of the logits, before the softcap.
        softcap: ``c`` of ``c * tanh(z / c)``.
        temperature: divides the logits: a number, or ``[N]`` floats; without a gradient.
        lora: a ``Lora`` for all tokens, or ``LoraSegment`` s of tokens in order.
        entropy: whether to compute it; ``"detached"`` without a gradient, which saves a GEMM in ``"stash"``.
        ignore_index: tokens with this target have logprob 0 and no gradient; a row of them alone costs nothing, and
            its lse and entropy are 0.
        memory: ``"stash"``, ``"cache"`` or ``"recompute"`` (see ``HeldLogprobs``); ``"auto"`` takes ``"stash"`` where
            only ``hidden`` needs a gradient, else ``"cache"``.
        cache_bytes: what ``"cache"`` may keep between forward and backward.
        impl: an implementation by name; ``"auto"`` takes the preferred one. ``explain`` says which and why.
        check: whether to look for targets outside the vocabulary, which waits for the device; None checks on CPU.

    Returns:
        ``LinearLogprobs`` in float32 (float64 for float64), differentiable once with regard to hidden, weight, bias
        and the adapters, where these require it. Any upstream is taken: expanded, strided, or none for some outputs.

    Raises:
        ValueError: an argument is wrong; names it.
        NotImplementedError: ``impl`` can not do what is asked; names the reason and the alternatives.
    """
    options = HeadOptions(bias, multiplier, softcap, temperature, lora, ignore_index, check)
    needs = needs_of(hidden, weight, options, entropy)
    call = prepare(hidden, weight, targets, options, needs, bool(entropy))
    kernel = choose_head(HeadCase(call.rows), impl).implementation
    mode = _memory(memory, needs)
    leaves = [tensor for each in call.rows.adapters for tensor in (each.a, each.b) if tensor is not None]
    found = _LinearLogprob.apply(call, kernel, mode, cache_bytes, hidden, weight, bias, *leaves)  # type: ignore[no-untyped-call]
    logprobs, lse, spread = found
    return LinearLogprobs(logprobs.view(targets.shape), lse, spread)


def explain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, entropy: Entropy = False,
    impl: str = "auto", **options: Any,
) -> Choice[HeadKernel]:  # fmt: skip
    """Return which implementation a call of ``linear_logprob`` would take, why, and why not the others.

    Args:
        options: those of ``linear_logprob`` that describe the head.

    Raises:
        ValueError: as ``linear_logprob``.
        NotImplementedError: as ``linear_logprob``.
    """
    given = HeadOptions(**options)
    call = prepare(hidden, weight, targets, given, needs_of(hidden, weight, given, entropy), bool(entropy))
    return choose_head(HeadCase(call.rows), impl)


def needs_of(hidden: torch.Tensor, weight: torch.Tensor, options: HeadOptions, entropy: Entropy) -> Needs:
    """Return which gradients a call wants.

    Raises:
        ValueError: ``entropy`` is none of those it may be.
    """
    if not isinstance(entropy, bool) and entropy != "detached":
        raise ValueError(f"entropy must be False, True or 'detached', not {entropy!r}")
    if not torch.is_grad_enabled():
        return Needs(hidden=False)

    def wants(tensor: torch.Tensor | None) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.requires_grad

    segments = as_segments(options.lora, 0)
    adapters = any(wants(each.a) or wants(each.b) for each in segments)
    # A frozen adapter too is a way from the logits to hidden, beside the weight.
    adapters = adapters or (wants(hidden) and any(each.a is not None for each in segments))
    needs = Needs(wants(hidden), adapters, wants(weight), wants(options.bias))
    return Needs(needs.hidden, adapters, needs.weight, needs.bias, entropy is True and needs.any)


def _memory(memory: str, needs: Needs) -> Memory:
    frozen = not needs.logits
    if memory == "auto":
        return "stash" if frozen else "cache"
    if memory not in ("stash", "cache", "recompute"):
        raise ValueError(f"memory must be 'auto', 'stash', 'cache' or 'recompute', not {memory!r}")
    if memory == "stash" and not frozen:
        raise ValueError(
            "memory='stash' holds the gradient of hidden alone; weight, bias, lora: 'cache' or 'recompute'"
        )
    return memory  # type: ignore[return-value]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, kernel: HeadKernel, mode: Memory, cache_bytes: int, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        with call.own_dtypes():
            held = HeldLogprobs(kernel, call.rows, mode, cache_bytes)
        ctx.call, ctx.held = call, held
        # Read again in backward: what was written in place in between is then an error, not a wrong gradient.
        ctx.save_for_backward(*tensors, call.rows.targets, call.rows.temperature)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        logprobs = held.logprobs if call.ignored is None else held.logprobs.masked_fill(call.ignored, 0.0)
        entropy = None if held.entropy is None else call.spread(held.entropy)
        # Copies: a caller may write in place into what it was given, and backward reads what was held.
        copies = (None if part is None else part.clone() for part in (call.spread(logprobs), entropy))
        given, spread = copies
        if spread is not None and not call.rows.needs.entropy:
            ctx.mark_non_differentiable(spread)
        return given, call.spread(held.lse).clone(), spread

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivatives()
        call: Call = ctx.call
        _ = ctx.saved_tensors
        logprobs, lse, entropy = (None if part is None else call.gather(part) for part in upstream)
        if logprobs is None:
            logprobs = torch.zeros_like(ctx.held.logprobs)
        if call.ignored is not None:
            logprobs = logprobs.masked_fill(call.ignored, 0.0)
        with call.own_dtypes():
            found = ctx.held.backward(Upstream(logprobs, lse, entropy))
        grads = spread_gradients(call, found)
        return (None,) * 4 + tuple(
            None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )


def spread_gradients(call: Call, found: HeadGradients) -> list[torch.Tensor | None]:
    """Return gradients for hidden, weight, bias and each segment's a and b, in order."""
    rows = call.rows
    grads: list[torch.Tensor | None] = [
        None if found.hidden is None else call.spread(found.hidden),
        found.weight,
        found.bias,
    ]
    seen: dict[tuple[int, int], int] = {}
    for each in rows.adapters:
        key = (id(each.a), id(each.b))
        first = key not in seen
        place = seen.setdefault(key, len(seen))
        # An adapter of several segments has one gradient, which must not be counted twice.
        grads += found.adapters[place] if found.adapters is not None and first else (None, None)
    return grads
