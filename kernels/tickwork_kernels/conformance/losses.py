"""Checks of token losses: what every registered one must do, built in or not."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from tickwork_kernels.conformance.oracle import make
from tickwork_kernels.head import HeadCase, Needs
from tickwork_kernels.head_sweep import evaluate
from tickwork_kernels.heads import HEADS, choose_both
from tickwork_kernels.support import why_no_triton
from tickwork_kernels.token_losses import BoundLoss, TokenLoss, bind, token_losses

Check = Callable[[str, torch.device], str | None]
COUNT = 97
# A head that somebody else registers is judged by its own suite.
SHIPPED = ("torch", "attention", "cublas", "triton")


def checks() -> list[tuple[str, Check]]:
    """Return the checks by name; each takes a loss's name and a device.

    A check raises an AssertionError, or returns why it does not apply, or None.
    """
    each: tuple[Check, ...] = (
        the_derivative_is_autograds,
        a_token_is_judged_alone,
        a_silenced_token_has_no_loss,
        the_twin_agrees,
        the_shipped_heads_agree,
    )
    return [(check.__name__.replace("_", " "), check) for check in each]


def example(loss: TokenLoss, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[
    torch.Tensor, BoundLoss
]:  # fmt: skip
    """Return logprobs and inputs of a usual size; an input called ``logprobs`` lies close to them."""
    generator = torch.Generator().manual_seed(0)
    logp = -4 * torch.rand(shape, generator=generator)
    noise = {name: torch.randn(shape, generator=generator) for name in loss.inputs}
    near = {name: logp + 0.3 * value if name == "logprobs" else value for name, value in noise.items()}
    inputs = {name: value.to(dtype).to(device) for name, value in near.items()}
    return logp.to(dtype).to(device), bind(loss, inputs)


def the_derivative_is_autograds(name: str, device: torch.device) -> str | None:
    """The derivative that is returned is the one autograd finds of the value, in float64."""
    logp, loss = example(token_losses()[name], (COUNT,), torch.float64, device)
    leaf = logp.requires_grad_()
    with torch.enable_grad():
        value, slope = loss.evaluate(leaf)
    (want,) = torch.autograd.grad(value.sum(), leaf)
    off = float((slope.detach() - want).abs().max())
    assert off <= 1e-10 * max(1.0, float(want.abs().max())), f"the derivative is off by {off:.3g}"
    return None


def a_token_is_judged_alone(name: str, device: torch.device) -> str | None:
    """Some tokens, in another order, have the losses that they have among all; any shape is taken."""
    logp, loss = example(token_losses()[name], (COUNT,), torch.float32, device)
    back = torch.arange(COUNT - 1, -1, -3, device=device)
    for one, other in zip(loss.evaluate(logp), loss.take(back).evaluate(logp[back]), strict=True):
        assert one.shape == logp.shape, f"shape {list(one.shape)} of {list(logp.shape)}"
        # A GPU may fuse a multiplication into an addition or not, depending on where in a vector a token stands.
        same = torch.allclose(one[back], other, rtol=1e-6, atol=1e-7)
        assert same, "a token's loss depends on other tokens, or on its place"
    wide, loss = example(token_losses()[name], (7, 3), torch.float32, device)
    assert all(part.shape == (7, 3) for part in loss.evaluate(wide)), "[N, K] is not taken"
    return None


def a_silenced_token_has_no_loss(name: str, device: torch.device) -> str | None:
    """Where ``zero_when`` is 0 loss and derivative are 0, however far the logprob is off."""
    spec = token_losses()[name]
    if spec.zero_when is None:
        return "declares no input that silences a token"
    logp, loss = example(spec, (COUNT,), torch.float32, device)
    loss.inputs[spec.zero_when].zero_()
    logp[::2] = -1000.0
    value, slope = loss.evaluate(logp)
    assert not bool(value.any()), "a silenced token has a loss"
    assert not bool(slope.any()), "a silenced token has a derivative"
    return None


def the_twin_agrees(name: str, device: torch.device) -> str | None:
    """The ``triton.jit`` twin gives what the torch function gives, to float32 rounding."""
    spec = token_losses()[name]
    if spec.twin is None:
        return "has no twin"
    if (reason := why_no_triton(device)) is not None:
        return f"the twin can not run: {reason}"
    logp, loss = example(spec, (COUNT,), torch.float32, device)
    inputs = torch.stack([loss.inputs[key] for key in spec.inputs] or [logp])
    config = torch.tensor([loss.config[key] for key in spec.config] or [0.0], device=device)
    values, slopes = torch.empty_like(logp), torch.empty_like(logp)
    kernel = import_module("tickwork_kernels.token_losses_triton").apply_kernel
    sizes = {"INPUTS": len(spec.inputs), "SETTINGS": len(spec.config), "BLOCK": 128}
    kernel[(1,)](logp, inputs, config, values, slopes, COUNT, LOSS=spec.jit(), **sizes)
    for what, got, want in zip(("loss", "derivative"), (values, slopes), loss.evaluate(logp), strict=True):
        off = float((got - want).abs().max())
        assert off <= 4e-6 * max(1.0, float(want.abs().max())), f"the twin's {what} is off by {off:.3g}"
    return None


def the_shipped_heads_agree(name: str, device: torch.device) -> str | None:
    """Under every shipped implementation of the head loss and gradient are those of the logprobs it returns."""
    refused = []
    case = make(21, 2, device=device)
    rows = case.rows
    for kernel in (each for each in HEADS.all() if each.name in SHIPPED):
        _, loss = example(token_losses()[name], (21, 2), torch.float32, device)
        if (reason := kernel.why_not(HeadCase(rows, loss))) is not None:
            refused.append(f"{kernel.name}: {reason}")
            continue
        chunk, found = evaluate(*choose_both(rows, loss, kernel.name), rows, loss)
        value, slope = loss.evaluate(chunk.logprobs)
        assert chunk.losses is not None
        off = float((chunk.losses - value).abs().max())
        assert off <= 4e-6 * max(1.0, float(value.abs().max())), f"{kernel.name}: the loss is off by {off:.3g}"
        logits = (case.hidden.double() @ case.head.weight.double().T).detach()
        p = logits.softmax(-1)
        dz = torch.zeros_like(p).scatter_add_(1, case.targets, slope.double()) - p * slope.double().sum(1, keepdim=True)
        want = dz @ case.head.weight.double()
        assert found.hidden is not None
        off = float((found.hidden - want).abs().max() / want.abs().max().clamp(min=1e-30))
        assert off <= 1e-4, f"{kernel.name}: the gradient is off by {off:.3g} of its largest value"
    assert rows.needs == Needs()
    return "; ".join(refused) or None
