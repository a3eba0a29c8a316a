"""``Threads``: how many of torch's threads a pass gets on a CPU."""

from __future__ import annotations

import os

import torch

# Tokens times parameters of a pass that is hardly sooner through on one core more: some 10 ms, half of it torch's own.
LITTLE = 2e8


class Threads:
    """Leaves one core free during small passes, where torch would take all there are.

    A pass of many short parallel regions stands still in each until its slowest thread is through. Where that one has
    to share its core with clients and their server, the pass takes up to twice as long, and they wait as well.

    Args:
        spare: whether to; without, nothing is changed.

    Room: the device thread; torch sets the number for the thread that asks.
    """

    def __init__(self, *, spare: bool) -> None:
        self._all = torch.get_num_threads()
        self._few = max(1, self._all - 1) if spare and self._all >= _cores() else self._all

    def fit(self, work: float) -> None:
        """Set the number for what follows.

        Args:
            work: tokens times parameters.
        """
        wanted = self._few if work < LITTLE else self._all
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
