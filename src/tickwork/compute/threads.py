"""``Threads``: how many of torch's threads a pass gets on a CPU."""

from __future__ import annotations

import os
from collections.abc import Set

import torch

# Tokens times parameters of a pass that is hardly sooner through on one core more: some 10 ms, half of it torch's own.
LITTLE = 2e8


class Threads:
    """Leaves one core free during small passes, where torch would take all there are.

    A pass of many short parallel regions stands still in each until its slowest thread is through. Where that one has
    to share its core with clients and their server, the pass takes up to twice as long, and they wait as well. A client
    alone has sent the rest of its step by the time the layers are through, and waits from there on.

    Args:
        spare: whether to; without, nothing is changed.
        invariant: whether nobody may notice that others come and go: sums that other threads make round otherwise, so
            everyone is then taken for one of several.

    Room: the device thread; torch sets the number for the thread that asks.
    """

    def __init__(self, *, spare: bool, invariant: bool = False) -> None:
        self._all = torch.get_num_threads()
        self._few = max(1, self._all - 1) if spare and self._all >= _cores() else self._all
        self._invariant = invariant
        self._last: Set[str] = frozenset()
        self._alone = False

    def created(self) -> None:
        """Take the next model for alone, whoever was there before: brought back by itself, it must go the same way."""
        self._last = frozenset()

    def layers(self, work: float, models: Set[str]) -> None:
        """Set the number for the layers of a pass.

        Args:
            work: tokens times parameters.
            models: whose tokens they are. Whoever also had the pass before is alone.
        """
        self._alone = not self._invariant and len(models) == 1 and self._last in (models, frozenset())
        self._last = models
        _set(self._few if work < LITTLE else self._all)

    def head(self) -> None:
        """Set the number for the head of that pass, and its way back through the layers."""
        if self._alone:
            _set(self._all)

    def steps(self) -> None:
        """Set the number for optimizer steps and samples: whatever ran before, their sums round alike."""
        _set(self._all)


def _set(number: int) -> None:
    if number != torch.get_num_threads():
        torch.set_num_threads(number)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
