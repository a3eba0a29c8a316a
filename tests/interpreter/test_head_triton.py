"""The head's Triton kernels, and the twins of the losses, in the interpreter, against what all must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tickwork_kernels import (
    Lora,
    TokenLoss,
    explain,
    linear_logprob,
    linear_token_loss,
    register_token_loss,
    support,
    token_losses,
)
from tickwork_kernels.conformance import head, losses
from tickwork_kernels.token_losses import unregister_token_loss

CPU = torch.device("cpu")
# The interpreter turns one-element arrays into loop bounds in a way that numpy is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
if support.why_no_triton(CPU) is not None:
    pytest.skip("needs triton and TRITON_INTERPRET=1", allow_module_level=True)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

Check = Callable[[str, torch.device], str | None]
IMPLS = ("cublas", "triton")
CHECKS, LOSS_CHECKS = dict(head.checks()), dict(losses.checks())

# What the fused GEMM refuses, by the beginning of its words; cublas refuses nothing.
REFUSALS = {
    "budget: adapter": "lora: not fused",
    "budget: adapter of rank 1": "lora: not fused",
    "budget: all": "lora: not fused",
    "budget: one row": "hidden: D = 1 is no multiple of 4",
    "budget: more targets than tokens": "hidden: D = 3 is no multiple of 4",
    "budget: ragged": "hidden: D = 17 is no multiple of 4",
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("impl", IMPLS)
def test_conformance(impl: str, name: str) -> None:
    """Each implementation does what every one must, and refuses by name exactly what is listed above."""
    answer, refusal = CHECKS[name](impl, CPU), REFUSALS.get(name) if impl == "triton" else None
    if answer == head.NUMPY_ROUNDS:
        pytest.skip(answer)
    assert (answer is None) == (refusal is None), answer
    assert refusal is None or f"impl='triton': {refusal}" in answer


@pytest.mark.parametrize("name", LOSS_CHECKS)
@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_losses(loss: str, name: str) -> None:
    """Each loss and its twin do what every one must, under every head."""
    silent = loss == "dro" and name == "a silenced token has no loss"
    assert LOSS_CHECKS[name](loss, CPU) == ("declares no input that silences a token" if silent else None)


def hinge(logp: torch.Tensor, inputs: Any, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``weights * max(0, -logp - margin)``."""
    short, weights = -logp - config["margin"], inputs["weights"]
    return weights * short.clamp(min=0), torch.where(short > 0, -weights, 0.0)


@triton.jit
def right(logp, inputs, config):
    """See ``hinge``."""
    short = -logp - config[0]
    return inputs[0] * tl.maximum(short, 0.0), tl.where(short > 0, -inputs[0], 0.0)


@triton.jit
def wrong(logp, inputs, config):
    """Twice ``hinge`` and a hundred, with three times its slope."""
    short = -logp - config[0]
    slope = tl.where(short > 0, -3.0 * inputs[0], 0.0)
    return 100.0 + 2.0 * inputs[0] * tl.maximum(short, 0.0), slope


HINGE = TokenLoss("hinge", hinge, ("weights",), {"margin": 1.0})


@pytest.fixture(params=["right", "wrong", "none"])
def registered(request: pytest.FixtureRequest) -> Iterator[str]:
    """``hinge`` is registered with that twin."""
    twin = {"right": right, "wrong": wrong, "none": None}[request.param]
    register_token_loss(replace(HINGE, twin=twin))
    yield request.param
    unregister_token_loss("hinge")


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_twin_is_what_runs(impl: str, count: int | None, registered: str) -> None:
    """A twin's values and slopes are those that come out, right or wrong; without one the torch function's do."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 8, generator=generator).requires_grad_()
    weight, shape = torch.randn(33, 8, generator=generator), (70,) if count is None else (70, count)
    targets = torch.randint(0, 33, shape, generator=generator)
    targets[::7] = -100
    weights = torch.rand(shape, generator=generator)
    arguments = (hidden, weight, targets, "hinge", {"weights": weights}, {"margin": 2.0})
    found, plain = (linear_token_loss(*arguments, impl=each) for each in (impl, "torch"))
    alive = targets != -100
    scale, shift, steep = (2.0, 100.0, 3.0) if registered == "wrong" else (1.0, 0.0, 1.0)
    assert plain.losses[alive].eq(0).any() and plain.losses[alive].gt(0).any()
    torch.testing.assert_close(found.logprobs, plain.logprobs)
    torch.testing.assert_close(found.losses, (scale * plain.losses + shift) * alive)
    torch.testing.assert_close(found.loss, found.losses.sum())
    (got,), (want,) = (torch.autograd.grad(each.loss, hidden) for each in (found, plain))
    torch.testing.assert_close(got, steep * want, rtol=1e-4, atol=1e-5)


def test_a_wrong_twin_fails_the_suite(registered: str) -> None:
    """A twin is held to its torch function alone and under each head; a loss without one passes without."""
    for name in ("the twin agrees", "the shipped heads agree"):
        if registered == "wrong":
            with pytest.raises(AssertionError):
                LOSS_CHECKS[name]("hinge", CPU)
        else:
            none = registered == "none" and name == "the twin agrees"
            assert LOSS_CHECKS[name]("hinge", CPU) == ("has no twin" if none else None)


def test_built_in_twins_are_found_by_name() -> None:
    """Each built-in loss has a twin of its own name in the module of twins."""
    for name, loss in token_losses().items():
        assert loss.twin == f"tickwork_kernels.token_losses_triton:{name}"
        assert loss.jit().__name__ == name


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"softcap": 3.0, "multiplier": 0.7, "entropy": True, "temperature": torch.linspace(0.5, 2, 70)},
}


@pytest.mark.parametrize("memory", ["stash", "cache", "recompute"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_differentiable_call_agrees_with_torch(impl: str, feature: str, memory: str) -> None:
    """Values and gradients of the public call are those of ``"torch"``: repeated and ignored targets, all gradients."""
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(*shape, generator=generator) for shape in ((70, 8), (40, 8), (40,), (2, 8), (40, 2))]
    targets = torch.randint(-1, 40, (70, 2), generator=generator)
    targets[::9, 1] = targets[::9, 0]
    options = {**FEATURES[feature], "memory": memory, "ignore_index": -1}
    for leaf in leaves[:1] if memory == "stash" else leaves:
        leaf.requires_grad_()
    hidden, weight, bias, a, b = leaves
    if feature == "all":
        options["bias"] = bias
    if feature == "all" and impl == "cublas" and memory != "stash":
        options["lora"] = Lora(a, b, 0.5)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def run(impl: str) -> tuple[Any, ...]:
        found = linear_logprob(hidden, weight, targets, impl=impl, **options)
        upstream = torch.Generator().manual_seed(2)
        total = sum((part * torch.randn(part.shape, generator=upstream)).sum() for part in found if part is not None)
        grads = [torch.autograd.grad(total, wanted, retain_graph=True, materialize_grads=True) for _ in range(2)]
        return *(part for part in found if part is not None), *grads[0], *grads[1]

    torch.testing.assert_close(run(impl), run("torch"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hidden", "weight", "targets", "temperature", "bias"])
@pytest.mark.parametrize("impl", IMPLS)
def test_any_layout_is_taken(impl: str, name: str) -> None:
    """Tensors with other strides give the values and gradients of contiguous ones."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "hidden": torch.randn(6, 16, generator=generator),
        "weight": torch.randn(40, 16, generator=generator),
        "targets": torch.randint(0, 40, (6, 2), generator=generator),
        "temperature": torch.rand(6, generator=generator) + 0.5,
        "bias": torch.randn(40, generator=generator),
    }
    other = torch.stack([given[name], given[name]], -1).flatten(-2)[..., ::2]
    assert torch.equal(other, given[name]) and not other.is_contiguous()

    def run(arguments: dict[str, Any], impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = arguments["hidden"].detach().requires_grad_()
        found = linear_logprob(**{**arguments, "hidden": hidden}, impl=impl)
        return found.logprobs.detach(), torch.autograd.grad(found.logprobs.sum() + found.lse.sum(), hidden)[0]

    torch.testing.assert_close(run({**given, name: other}, impl), run(given, "torch"), rtol=1e-4, atol=1e-5)


def test_the_interpreter_runs_only_by_name() -> None:
    """On CPU torch's implementations stay preferred, though the kernels could run."""
    choice = explain(torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 1, 2]))
    assert (choice.name, dict(choice.refused)) == ("torch", {})
    assert explain(torch.ones(3, 8), torch.ones(5, 8), torch.tensor([0, 1, 2]), impl="triton").name == "triton"
