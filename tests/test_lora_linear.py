"""Tests of a frozen projection with the LoRA of several adapters on it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tickwork_kernels import LoraSegment, lora_linear
from tickwork_kernels.conformance.multi_lora import LONG, MIXED, REPEATED, Problem

CPU = torch.device("cpu")
# (tokens, rank, which adapter): runs of equal segments between unequal ones, the base alone, and nothing at all.
EQUAL = ((4, 3, 0), (4, 3, 1), (4, 3, 2), (5, 3, 3), (2, 0, 4), (2, 0, 4), (0, 3, 5), (6, 8, 6), (6, 8, 6), (6, 2, 7))


def leaves_of(problem: Problem) -> tuple[dict[str, torch.Tensor], list[LoraSegment]]:
    """The problem's leaves in float64 without ``y``, and its segments on them; equal scales where ranks are equal."""
    leaves = {n: t.detach().double().requires_grad_() for n, t in problem.leaves.items() if n != "y"}
    segments = [
        LoraSegment(s.start, s.stop, leaves.get(f"a{which}"), leaves.get(f"b{which}"), 1.5 if rank else 1.0)
        for s, (_, rank, which) in zip(problem.segments, problem.layout, strict=True)
    ]
    return leaves, segments


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", [EQUAL, MIXED, REPEATED, LONG, ((7, 0, 0),), ()], ids=str)
def test_grouping_changes_rounding_only(layout: tuple[tuple[int, int, int], ...], bias: bool) -> None:
    """Output and all gradients are those of the composition, to float64's rounding."""
    problem = Problem(layout, CPU)
    leaves, segments = leaves_of(problem)
    weight, offset = problem.draw(1, 80, 96).double(), problem.draw(2, 80).double() if bias else None
    found = {}
    for impl in ("torch", "grouped"):
        out = lora_linear(leaves["x"], weight, offset, segments, impl=impl)
        grads = torch.autograd.grad(out, list(leaves.values()), problem.grad.double(), allow_unused=True)
        found[impl] = [out, *grads]
    for name, one, other in zip(["output", *leaves], *found.values(), strict=True):
        assert one is not None, name
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-11, msg=name)


def test_rounded_adapters_are_those_of_the_composition() -> None:
    """In bfloat16 adapters are rounded before the product, and their gradients come in their own float32."""
    problem = Problem(EQUAL, CPU, torch.bfloat16)
    weight = problem.draw(1, 80, 96)
    out = lora_linear(problem.x, weight, None, problem.segments)
    expected = lora_linear(problem.x, weight, None, problem.segments, impl="torch")
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=0.25)
    a = problem.leaves["a1"]
    (grad,) = torch.autograd.grad(out, [a], problem.grad)
    (wanted,) = torch.autograd.grad(expected, [a], problem.grad)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, wanted, rtol=5e-2, atol=0.05 * float(wanted.abs().max()))


@pytest.mark.parametrize("wanted", ["x", "a", "b", "xb", ""])
def test_gradients_not_asked_for_are_not_computed(wanted: str) -> None:
    """Frozen leaves get none; the others get what they get when all are asked for."""
    problem = Problem(EQUAL, CPU)
    leaves, segments = leaves_of(problem)
    weight = problem.draw(1, 80, 96).double()
    everything = torch.autograd.grad(lora_linear(leaves["x"], weight, None, segments).sum(), list(leaves.values()))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name[0] in wanted)
    out = lora_linear(leaves["x"], weight, None, segments)
    assert out.requires_grad == bool(wanted)
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if asked:
        grads = dict(zip(asked, torch.autograd.grad(out.sum(), list(asked.values())), strict=True))
        for name, full in zip(leaves, everything, strict=True):
            if name in grads:
                torch.testing.assert_close(grads[name], full, rtol=1e-12, atol=1e-12)


def test_a_neighbour_that_is_not_finite_stays_alone() -> None:
    """NaN in one segment's rows and adapter reaches neither the output nor a gradient of another."""
    problem = Problem(((4, 3, 0), (4, 3, 1), (4, 3, 2)), CPU)
    leaves, segments = leaves_of(problem)
    weight = problem.draw(1, 80, 96).double()
    grad = problem.grad.double()

    def run() -> list[torch.Tensor]:
        out = lora_linear(leaves["x"], weight, None, segments)
        dx, *others = torch.autograd.grad(out, [leaves[n] for n in ("x", "a0", "b0", "a2", "b2")], grad)
        return [out.detach()[[0, 1, 2, 3, 8, 9, 10, 11]], dx[[0, 1, 2, 3, 8, 9, 10, 11]], *others]

    before = run()
    with torch.no_grad():
        leaves["a1"].fill_(torch.nan)
        leaves["x"][4:8] = torch.inf
    grad[4:8] = torch.nan
    for one, other in zip(before, run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl must be one of ['auto', 'torch', 'grouped'], not 'fast'"),
        ({"weight": torch.zeros(80, 95)}, "weight must be [d_out, 96] torch.float32 as x is"),
        ({"segments": []}, "segments must cover 0..12, but end at 0"),
        ({"buffer": True}, "segments must come without grad_a and grad_b"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    """A wrong argument is told by its name."""
    problem = Problem(((4, 3, 0), (8, 3, 1)), CPU)
    given: dict[str, Any] = {"weight": torch.zeros(80, 96), "segments": problem.segments, "impl": "auto"}
    if change.pop("buffer", False):
        change["segments"] = [problem.segments[0]._replace(grad_a=torch.zeros(3, 96)), problem.segments[1]]
    given |= change
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_linear(problem.x, given["weight"], None, given["segments"], impl=given["impl"])
