"""Threads of torch that a pass gets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from models import Bench, data_of, step, train
from tickwork.compute import passes, stage, threads
from tickwork.compute.model import BaseModel
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
def test_the_layers_of_a_small_pass_leave_a_core_where_torch_has_them_all(
    monkeypatch: pytest.MonkeyPatch, cores: int, spare: bool, few: int
) -> None:
    """A large one takes what torch has; where torch has fewer than there are, as users may say, that is kept to."""
    monkeypatch.setattr(threads, "_cores", lambda: cores)
    found = Threads(spare=spare)
    got = []
    for work in (LITTLE - 1, LITTLE, 0, float("inf")):
        found.layers(work, {"m"})
        got.append(torch.get_num_threads())
    assert got == [few, 4, few, 4]


def test_who_also_had_the_pass_before_has_all_threads_from_the_head_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """So has who is the first after a model was created: brought back by itself, that one must go the same way."""
    monkeypatch.setattr(threads, "_cores", lambda: 4)
    found, strict = Threads(spare=True), Threads(spare=True, invariant=True)

    def head(models: set[str], which: Threads) -> int:
        which.layers(0, models)
        assert torch.get_num_threads() == 3
        which.head()
        return torch.get_num_threads()

    turns = [{"a"}, {"a"}, {"b"}, {"a", "b"}, {"a", "b"}, {"a"}, {"a"}]
    assert [head(each, found) for each in turns] == [4, 4, 3, 3, 3, 3, 4]
    found.created()
    assert [head(each, found) for each in ({"c"}, {"c"}, {"a"})] == [4, 4, 3]
    assert [head({"a"}, strict) for _ in range(3)] == [3, 3, 3]
    found.steps()
    assert torch.get_num_threads() == 4


def test_one_thread_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "_cores", lambda: 1)
    Threads(spare=True).layers(0, {"m"})
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("little", "models", "invariant", "layers", "head"),
    [
        (2e8, ["m"], False, 3, 4),
        (2e8, ["m", "idle"], False, 3, 4),
        (2e8, ["m"], True, 3, 3),
        (0.0, ["m"], False, 4, 4),
    ],
)
def test_each_part_of_a_stage_has_its_threads(
    monkeypatch: pytest.MonkeyPatch, little: float, models: list[str], invariant: bool, layers: int, head: int
) -> None:
    """Steps have the same ones whatever ran before: a norm summed by others is rounded otherwise.

    And under ``invariant`` nobody notices whether there are others.
    """
    got: dict[str, set[int]] = defaultdict(set)

    def noting(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            got[what].add(torch.get_num_threads())
            return call(*args)

        return noted

    monkeypatch.setattr(threads, "_cores", lambda: 4)
    monkeypatch.setattr(threads, "LITTLE", little)
    monkeypatch.setattr(BaseModel, "hidden", noting("layers", BaseModel.hidden))
    monkeypatch.setattr(passes, "evaluate", noting("head", passes.evaluate))
    monkeypatch.setattr(passes, "_accumulate", noting("backward", passes._accumulate))
    monkeypatch.setattr(stage, "step_together", noting("step", stage.step_together))
    bench = Bench(spare_core=True, invariant=invariant)
    for model_id in models:
        bench.create(model_id)
    got.clear()
    for _ in range(2):
        ask = step(OptimStep("m", AdamParams(learning_rate=1e-3)), "m")
        for outcome in bench.run(train("m", data_of((5, 3))), ask):
            assert outcome.error is None
    assert got == {"layers": {layers}, "head": {head}, "backward": {head}, "step": {4}}
