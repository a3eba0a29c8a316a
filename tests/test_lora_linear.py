"""Tests of a frozen projection with the LoRA of several adapters on it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tickwork_kernels import LoraStack, lora_linear

# (tokens of each adapter, rank, adapters): stacks of several, of one, the base alone between, and nothing at all.
LAYOUTS = (((4, 3, 3), (5, 3, 1), (4, 0, 1), (6, 8, 2)), ((37, 40, 1),), ((0, 3, 2), (1, 1, 4)), ((7, 0, 1),), ())


class Case:
    """Inputs of one layout, its adapters as leaves."""

    def __init__(self, layout: tuple[tuple[int, int, int], ...], dtype: torch.dtype, kept: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        tokens = sum(n * max(count, 1) for n, _, count in layout)
        self.x, self.grad, self.weight, self.bias = (
            torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
            for shape in ((tokens, 24), (tokens, 20), (20, 24), (20,))
        )
        self.leaves = {"x": self.x.requires_grad_()}
        self.stacks: list[LoraStack] = []
        at = 0
        for index, (n, rank, count) in enumerate(layout):
            stop = at + n * count
            if rank:
                for letter, shape in (("a", (count, rank, 24)), ("b", (count, 20, rank))):
                    values = torch.randn(shape, generator=draw, dtype=torch.float64) / shape[2] ** 0.5
                    self.leaves[f"{letter}{index}"] = values.to(kept).requires_grad_()
                self.stacks.append(LoraStack(at, stop, self.leaves[f"a{index}"], self.leaves[f"b{index}"], 1.5))
            at = stop

    def run(self, impl: str = "auto", *, bias: bool = True) -> dict[str, torch.Tensor | None]:
        """Return the output and the gradients of all leaves that require one."""
        leaves = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        out = lora_linear(self.x, self.weight, self.bias if bias else None, self.stacks, impl=impl)
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad, allow_unused=True) if leaves else ()
        return {"output": out.detach()} | dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_batching_changes_rounding_only(layout: tuple[tuple[int, int, int], ...], bias: bool) -> None:
    """Output and all gradients are those of the composition, to float64's rounding."""
    case = Case(layout, torch.float64, torch.float64)
    one, other = case.run("torch", bias=bias), case.run("batched", bias=bias)
    assert one.keys() == other.keys()
    for name, wanted in one.items():
        torch.testing.assert_close(other[name], wanted, rtol=1e-12, atol=1e-12, msg=name)


def test_gradients_are_those_of_the_function() -> None:
    """In float64 the gradients agree with differences of the output."""
    case = Case(LAYOUTS[0], torch.float64, torch.float64)

    def run(x: torch.Tensor, *adapters: torch.Tensor) -> torch.Tensor:
        pairs = zip(case.stacks, adapters[::2], adapters[1::2], strict=True)
        return lora_linear(x, case.weight, case.bias, [stack._replace(a=a, b=b) for stack, a, b in pairs])

    assert torch.autograd.gradcheck(run, list(case.leaves.values()))


def test_rounded_adapters_are_those_of_the_composition() -> None:
    """In bfloat16 adapters are rounded before the product, and their gradients come in their own float32."""
    case = Case(LAYOUTS[0], torch.bfloat16, torch.float32)
    one, other = case.run("torch"), case.run("batched")
    for name, wanted in one.items():
        got = other[name]
        assert wanted is not None and got is not None and got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2 * float(wanted.abs().max()))
    assert other["a0"] is not None and other["a0"].dtype == torch.float32


@pytest.mark.parametrize("impl", ["torch", "batched"])
def test_gradients_go_into_buffers(impl: str) -> None:
    """Where there are buffers the gradients are added there, pass after pass, and autograd returns none."""
    case = Case(LAYOUTS[0], torch.float32, torch.float32)
    plain = case.run(impl)
    buffers = {name: torch.full_like(leaf, 0.25) for name, leaf in case.leaves.items() if name != "x"}
    case.stacks = [
        stack._replace(grad_a=buffers[f"a{index}"], grad_b=buffers[f"b{index}"])
        for index, stack in zip((0, 1, 3), case.stacks, strict=True)
    ]
    for passes in (1, 2):
        got = case.run(impl)
        assert all((grad is None) == (name in buffers) for name, grad in got.items())
        for name, buffer in buffers.items():
            wanted = plain[name]
            assert wanted is not None
            torch.testing.assert_close(buffer - 0.25, passes * wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["x", "a", "b", "xb", ""])
def test_gradients_not_asked_for_are_not_computed(wanted: str) -> None:
    """Frozen leaves get none; the others get what they get when all are asked for."""
    case = Case(LAYOUTS[0], torch.float64, torch.float64)
    everything = case.run()
    for name, leaf in case.leaves.items():
        leaf.requires_grad_(name[0] in wanted)
    got = case.run()
    assert set(got) == {"output"} | {name for name in case.leaves if name[0] in wanted}
    for name, grad in got.items():
        torch.testing.assert_close(grad, everything[name], rtol=1e-12, atol=1e-12)


def test_a_neighbour_that_is_not_finite_stays_alone() -> None:
    """NaN in one adapter and its rows reaches neither the output nor a gradient of another."""
    case = Case(((4, 3, 3),), torch.float64, torch.float64)
    mine = [0, 1, 2, 3, 8, 9, 10, 11]

    def others() -> list[torch.Tensor]:
        out, dx, a, b = case.run().values()
        assert dx is not None and a is not None and b is not None and out is not None
        return [out[mine], dx[mine], a[[0, 2]], b[[0, 2]]]

    before = others()
    with torch.no_grad():
        case.leaves["a0"][1] = torch.nan
        case.x[4:8] = torch.inf
    case.grad[4:8] = torch.nan
    for one, other in zip(before, others(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl must be one of ['auto', 'torch', 'batched'], not 'fast'"),
        ({"weight": torch.zeros(20, 23)}, "weight must be [d_out, 24] torch.float32 as x is"),
        ({"stop": 11}, "stacks[0] must give its 3 adapters equally many of its rows"),
        ({"stop": 15}, "segments must cover 0..12"),
        ({"a": torch.zeros(3, 24)}, "stacks[0].a and .b must be [K, r, d_in] and [K, d_out, r]"),
        ({"b": torch.zeros(2, 20, 3)}, "stacks[0].a and .b must be [K, r, d_in] and [K, d_out, r]"),
        ({"b": torch.zeros(3, 20, 2)}, "b must be [20, 3]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    """A wrong argument is told by its name."""
    case = Case(((4, 3, 3),), torch.float32, torch.float32)
    impl, weight = change.pop("impl", "auto"), change.pop("weight", case.weight)
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_linear(case.x, weight, None, [case.stacks[0]._replace(**change)], impl=impl)
