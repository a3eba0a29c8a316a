"""AdamW's Triton kernels in the interpreter, against the checks that every implementation must pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tickwork_kernels.adamw import AdamWArena, AdamWSettings, adamw_steps, explain_adamw
from tickwork_kernels.conformance.adamw import checks

CPU = torch.device("cpu")
triton_code = pytest.importorskip("tickwork_kernels.adamw_triton")


@pytest.mark.parametrize(("name", "check"), checks(), ids=[name for name, _ in checks()])
def test_conformance(name: str, check: Callable[[str, torch.device], None]) -> None:
    check("triton", CPU)


def test_auto_takes_torch_on_cpu_and_triton_only_by_name() -> None:
    arena, settings = AdamWArena([3]), AdamWSettings(1, 1e-3, 0.9, 0.999, 1e-8, 0.0)
    assert explain_adamw(arena.states, [settings]).name == "torch"
    choice = explain_adamw(arena.states, [settings], impl="triton")
    assert (choice.name, dict(choice.refused)) == ("triton", {})


class Launches:
    """Stands for a kernel and counts its launches."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int]) -> object:
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("count", [1, 2, 30])
def test_two_launches_whatever_the_number(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Launches(getattr(triton_code, name)) for name in ("square_sums_kernel", "step_kernel")]
    monkeypatch.setattr(triton_code, "square_sums_kernel", kernels[0])
    monkeypatch.setattr(triton_code, "step_kernel", kernels[1])
    arena, settings = AdamWArena([5] * count), AdamWSettings(1, 1e-3, 0.9, 0.999, 1e-8, 0.0)
    adamw_steps(arena.states, [settings] * count, impl="triton")
    assert [kernel.grids for kernel in kernels] == [[(count,)], [(count,)]]


def test_the_table_says_when_addresses_are_not_aligned() -> None:
    states = AdamWArena([16, 32]).states
    settings = [AdamWSettings(1, 1e-3, 0.9, 0.999, 1e-8, 0.0)] * 2
    case = triton_code.AdamWCase(states, settings)
    assert triton_code._aligned(case, [0, 1])
    states[1].exp_avg = torch.zeros(33)[1:]
    assert triton_code._aligned(case, [0])
    assert not triton_code._aligned(case, [0, 1])
    assert not triton_code._aligned(triton_code.AdamWCase(AdamWArena([17]).states, settings), [0])
