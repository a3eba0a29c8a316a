"""Times of several providers in turns, so that all meet the same clocks, temperatures and neighbours."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.kernels.job import Mark, Run, nothing

# Written before a cold run: several times the L2 cache of any GPU.
FLUSHED_BYTES = 2**28
COLD_PAUSE = 0.02
# A run of this length needs no repeats to be told from the others, and would eat their time.
SLOW_SECONDS = 5.0
WARMUPS = 1

Key = tuple[str, str]


@dataclass(frozen=True)
class Way:
    """What is timed: ``act`` after an untimed ``prepare``."""

    act: Run
    prepare: Callable[[], None]


def simple(act: Callable[[], object]) -> Way:
    """Return a way without parts and preparations."""

    def run(mark: Mark) -> object:
        return act()

    return Way(run, nothing)


@dataclass(frozen=True)
class Plan:
    """How to time.

    Args:
        device: where.
        rounds: how often each way is timed.
        pause: seconds before each.
        deadline: of ``time.monotonic``, after which no further round begins.
    """

    device: torch.device
    rounds: int
    pause: float
    deadline: float


class Clock(Protocol):
    """Takes the time at marks."""

    def mark(self) -> None:
        """Remember the time."""

    def seconds(self) -> list[float]:
        """Return what lies between the marks."""


class HostClock:
    """Time of the host."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """See ``Clock``."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """See ``Clock``."""
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class EventClock:
    """Time at which the device reaches each mark."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """See ``Clock``."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """See ``Clock``."""
        torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def in_turns(ways: Mapping[Key, Way], plan: Plan, cold: bool) -> tuple[dict[Key, list[list[float]]], dict[Key, str]]:
    """Time every way once a round, in an order that rotates; what takes longer than ``SLOW_SECONDS`` once at all.

    Returns:
        ``(times, failures)``: of each way, for each round the seconds between its marks; or what it raised, and then
        it is left out of further rounds.
    """
    times: dict[Key, list[list[float]]] = {key: [] for key in ways}
    failures: dict[Key, str] = {}
    slow: set[Key] = set()
    gc.collect()
    for turn in range(WARMUPS + plan.rounds):
        if turn > WARMUPS and time.monotonic() > plan.deadline:
            break
        keys = [key for key in ways if key not in failures and key not in slow]
        start = turn % max(1, len(keys))
        for key in keys[start:] + keys[:start]:
            try:
                found = once(ways[key], plan, cold)
            except Exception as error:  # whatever an anchor raises is its result
                failures[key] = describe(error)
                continue
            if sum(found) > SLOW_SECONDS:
                slow.add(key)
            if turn >= WARMUPS or key in slow:
                times[key].append(found)
    return times, failures


def once(way: Way, plan: Plan, cold: bool) -> list[float]:
    """Time one run; on CUDA a hot one follows an untimed one at once, so that no launch waits for the host."""
    time.sleep(plan.pause)
    cuda = plan.device.type == "cuda"
    if cuda and not cold:
        way.prepare()
        way.act(lambda: None)
    way.prepare()
    if cold:
        flush(plan.device)
    clock: Clock = EventClock() if cuda else HostClock()
    clock.mark()
    result = way.act(clock.mark)
    clock.mark()
    seconds = clock.seconds()
    del result  # not within the time: freeing is not the operation's
    return seconds


def flush(device: torch.device) -> None:
    """Drive everything out of the L2 cache, and let the chip rest."""
    torch.cuda.synchronize()
    time.sleep(COLD_PAUSE)
    torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device).zero_()


def describe(error: Exception) -> str:
    """Return an error's type and the first line of what it says."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def quantile(values: list[float], q: float) -> float:
    """Return a quantile, linear between the values."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))
