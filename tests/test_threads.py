"""Threads of torch that a pass gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tickwork.compute import threads
from tickwork.compute.threads import LITTLE, Threads


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
