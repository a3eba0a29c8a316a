"""Threads of torch that a pass gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from models import Bench, data_of, step, train
from tickwork.compute import passes, stage, threads
from tickwork.compute.threads import LITTLE, Threads
from tickwork.requests import OptimStep
from tickwork.types import AdamParams


@pytest.fixture(autouse=True)
def four() -> Iterator[None]:
    """Let torch have four threads, whatever there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "spare", "few"), [(4, True, 3), (2, True, 3), (8, True, 4), (4, False, 4)])
def test_a_small_pass_leaves_a_core_where_torch_has_them_all(
    monkeypatch: pytest.MonkeyPatch, cores: int, spare: bool, few: int
) -> None:
    """A large one takes what torch has; where torch has fewer than there are, as users may say, that is kept to."""
    monkeypatch.setattr(threads, "_cores", lambda: cores)
    found = Threads(spare=spare)
    got = []
    for work in (LITTLE - 1, LITTLE, 0, float("inf")):
        found.fit(work)
        got.append(torch.get_num_threads())
    assert got == [few, 4, few, 4]


def test_one_thread_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "_cores", lambda: 1)
    Threads(spare=True).fit(0)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("little", "few"), [(2e8, 3), (0.0, 4)])
def test_steps_and_samples_have_the_same_threads_whatever_pass_ran_before(
    monkeypatch: pytest.MonkeyPatch, little: float, few: int
) -> None:
    """A norm summed by other threads is rounded otherwise, and nothing of another client's pass may show."""
    got: list[tuple[str, int]] = []

    def noting(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            got.append((what, torch.get_num_threads()))
            return call(*args)

        return noted

    monkeypatch.setattr(threads, "_cores", lambda: 4)
    monkeypatch.setattr(threads, "LITTLE", little)
    monkeypatch.setattr(passes, "run_pass", noting("pass", passes.run_pass))
    monkeypatch.setattr(stage, "step_together", noting("step", stage.step_together))
    bench = Bench(spare_core=True)
    bench.create("m")
    got.clear()
    ask = step(OptimStep("m", AdamParams(learning_rate=1e-3)), "m")
    for outcome in bench.run(train("m", data_of((5, 3))), ask):
        assert outcome.error is None
    assert [each for each in got if each[0] == "pass"] == [("pass", few)]
    assert ("step", 4) in got
    assert ("step", 3) not in got
