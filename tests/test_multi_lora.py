"""Tests of LoRA of several adapters on one batch: the reference in torch, the choice, and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tickwork_kernels import support
from tickwork_kernels.conformance.multi_lora import Check, Problem, checks
from tickwork_kernels.multi_lora import MULTI_LORA, LoraSegment, explain_multi_lora, multi_lora

CPU = torch.device("cpu")


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in checks()])
def test_torch(check: Check) -> None:
    """The reference fulfils what every implementation must."""
    check("torch", CPU)


def test_gradients_are_those_of_the_function() -> None:
    """In float64 the gradients agree with differences of the output."""
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (5, 3), (2, 4), (3, 2), (1, 4), (3, 1))]

    def run(x: torch.Tensor, y: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        a, b, c, d = pairs
        spans = [(0, 2, a, b, 0.5), (2, 3, c, d, 2.0), (3, 4, None, None, 1.0), (4, 5, a, b, 0.5)]
        return multi_lora(x, y, [LoraSegment(*span) for span in spans])

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


def test_a_gradient_not_asked_for_stays_out_of_the_buffer() -> None:
    """Where ``a`` is frozen its buffer is left alone."""
    problem = Problem(((4, 2, 0),), CPU)
    a, buffer = problem.leaves["a0"].requires_grad_(False), torch.zeros(2, 96)
    segments = [problem.segments[0]._replace(a=a, grad_a=buffer)]
    multi_lora(problem.x, problem.y, segments).sum().backward()
    assert not buffer.any()
    assert problem.x.grad is not None


def test_the_reference_is_preferred_on_the_cpu() -> None:
    """The choice says what it took and why, and why not the others."""
    problem = Problem(((4, 2, 0),), CPU)
    choice = explain_multi_lora(problem.x, problem.y, problem.segments)
    assert choice.name == "torch"
    assert [each.name for each in MULTI_LORA.all()][:2] == ["torch", "triton"]
    if support.why_no_triton(CPU) is not None:
        assert choice.refused["triton"] == support.why_no_triton(CPU)
        with pytest.raises(NotImplementedError, match="able to run this multi_lora: 'torch'"):
            multi_lora(problem.x, problem.y, problem.segments, impl="triton")


def test_what_triton_can_not_run_is_said() -> None:
    """Float64, and sizes that its counters do not hold, are refused in words."""
    x, wide = torch.zeros(1, 4), torch.zeros(1, 2**20 + 1)
    cases = [
        (x.double(), x.double(), None, None, "x must be float32, bfloat16 or float16, not torch.float64"),
        (wide, x, None, None, "x and y may have up to 1048576 features, not 1048577 and 4"),
        (x, x, torch.zeros(1025, 4), torch.zeros(4, 1025), "segments may have ranks up to 1024"),
    ]
    for left, right, a, b, why in cases:
        choice = explain_multi_lora(left, right, [LoraSegment(0, 1, a, b, 1.0)])
        assert (choice.name, choice.refused["triton"]) == ("torch", why)


def test_an_unknown_implementation_is_an_error() -> None:
    """The message names those there are."""
    x = torch.zeros(0, 4)
    with pytest.raises(ValueError, match=re.escape("impl must be 'auto' or one of ['torch', 'triton'")):
        multi_lora(x, x, [], impl="fast")


def test_another_implementation_can_be_registered() -> None:
    """What is registered is taken by name."""

    class Nothing:
        name = "nothing"

        def why_not(self, case: Any) -> str | None:
            return None

        def preference(self, case: Any) -> int:
            return -1

        def run(self, x: torch.Tensor, y: torch.Tensor, segments: Any) -> torch.Tensor:
            return y

    problem = Problem(((4, 2, 0),), CPU)
    MULTI_LORA.register(Nothing())
    try:
        assert multi_lora(problem.x, problem.y, problem.segments, impl="nothing") is problem.y
        assert explain_multi_lora(problem.x, problem.y, problem.segments).name == "torch"
    finally:
        MULTI_LORA.unregister("nothing")


X, Y, A, B = torch.zeros(4, 6), torch.zeros(4, 5), torch.zeros(2, 6), torch.zeros(5, 2)
WHOLE = LoraSegment(0, 4, A, B, 1.0)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "x of one axis": (lambda: multi_lora(X[0], Y, [WHOLE]), "x must be [T, d_in]"),
    "x of integers": (lambda: multi_lora(X.int(), Y.int(), [WHOLE]), "x must be [T, d_in] of a floating dtype"),
    "fewer rows in y": (lambda: multi_lora(X, Y[:3], [WHOLE]), "y must be [4, d_out]"),
    "y of another dtype": (lambda: multi_lora(X, Y.half(), [WHOLE]), "y must be [4, d_out] torch.float32"),
    "y elsewhere": (lambda: multi_lora(X, Y.to("meta"), [WHOLE]), "on cpu as x is, not [4, 5] torch.float32 on meta"),
    "no segments": (lambda: multi_lora(X, Y, []), "segments must cover 0..4, but end at 0"),
    "too short": (lambda: multi_lora(X, Y, [WHOLE._replace(stop=3)]), "segments must cover 0..4, but end at 3"),
    "too long": (lambda: multi_lora(X, Y, [WHOLE._replace(stop=5)]), "segments must cover 0..4, but end at 5"),
    "a gap": (
        lambda: multi_lora(X, Y, [WHOLE._replace(stop=2), WHOLE._replace(start=3)]),
        "segments[1] is 3..4 after 2",
    ),
    "backwards": (lambda: multi_lora(X, Y, [WHOLE._replace(stop=-1)]), "segments[0] is 0..-1"),
    "a without b": (lambda: multi_lora(X, Y, [WHOLE._replace(b=None)]), "segments[0].a and segments[0].b must be both"),
    "b without a": (lambda: multi_lora(X, Y, [WHOLE._replace(a=None)]), "segments[0].a and segments[0].b must be both"),
    "a buffer for nothing": (
        lambda: multi_lora(X, Y, [LoraSegment(0, 4, None, None, 1.0, grad_a=A)]),
        "None with no grad_a or grad_b",
    ),
    "a of rank 0": (lambda: multi_lora(X, Y, [WHOLE._replace(a=A[:0])]), "segments[0].a must be [r, 6] with a rank"),
    "a too wide": (lambda: multi_lora(X, Y, [WHOLE._replace(a=torch.zeros(2, 7))]), "segments[0].a must be [2, 6]"),
    "a of another dtype": (lambda: multi_lora(X, Y, [WHOLE._replace(a=A.half())]), "segments[0].a must be [2, 6]"),
    "b of another rank": (lambda: multi_lora(X, Y, [WHOLE._replace(b=B[:, :1])]), "segments[0].b must be [5, 2]"),
    "b elsewhere": (lambda: multi_lora(X, Y, [WHOLE._replace(b=B.to("meta"))]), "segments[0].b must be [5, 2]"),
    "buffer of another shape": (lambda: multi_lora(X, Y, [WHOLE._replace(grad_a=A.T)]), "segments[0].grad_a must be"),
    "buffer of another dtype": (
        lambda: multi_lora(X, Y, [WHOLE._replace(grad_b=B.double())]),
        "segments[0].grad_b must be [5, 2] torch.float32",
    ),
    "buffer of odd strides": (
        lambda: multi_lora(X, Y, [WHOLE._replace(grad_a=torch.zeros(6, 2).T)]),
        "segments[0].grad_a must be contiguous",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_that_names_the_argument(case: str) -> None:
    """Every argument that does not fit is a ValueError, before anything is computed."""
    call, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
