"""Clients at work for a while, each in a closed loop, and the sides of a comparison in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext

import attrs
import numpy as np
import trio

import tickwork
from bench.workloads import PAUSE

# One unit of a client's work; returns the tokens it was.
Act = Callable[[], Awaitable[int]]


@attrs.frozen
class Pace:
    """Seconds of one turn, and turns of each side."""

    seconds: float
    rounds: int


@attrs.frozen
class Side:
    """One side of a comparison.

    Args:
        acts: one for each client.
        in_line: whether a client waits for its turn, so that only one request is under way.
    """

    service: tickwork.ServiceClient
    acts: Sequence[Act]
    in_line: bool = False


@attrs.frozen
class Turn:
    """What a side did in one turn: seconds that each act took, tokens of all, passes run."""

    seconds: float
    latencies: list[float]
    tokens: int
    passes: int = 0


@attrs.frozen
class Figures:
    """A side's turns in sum.

    Args:
        tokens_per_second: median over the turns.
        p50: of all acts, in milliseconds, from asking to the last answer; waiting in line is part of it.
        p95: the same.
        passes: through the model, for each act; decoding counts none.
    """

    tokens_per_second: float
    p50: float
    p95: float
    passes: float


def compare(sides: Mapping[str, Side], pace: Pace) -> dict[str, Figures]:
    """Let the sides take turns, each as often first, so that all meet the same machine; one turn is not counted."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    gc.collect()
    for side in sides.values():
        trio.run(_counted, side, 0.0)
    names = list(sides)
    for turn in range(pace.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            time.sleep(PAUSE)
            turns[name].append(trio.run(_counted, sides[name], pace.seconds))
    return {name: _figures(several) for name, several in turns.items()}


async def _counted(side: Side, seconds: float) -> Turn:
    before = await _passes(side.service)
    turn = await _turn(side, seconds)
    return attrs.evolve(turn, passes=await _passes(side.service) - before)


async def _passes(service: tickwork.ServiceClient) -> int:
    """Return the passes run; a pass is counted just after its results are out, so once more to the engine and back."""
    await service.host.portal.submit(service.host.call(int))
    return service.statistics().passes


async def _turn(side: Side, seconds: float) -> Turn:
    """Let all clients work at once for about so long, each at least one act."""
    latencies: list[float] = []
    tokens = 0
    line = trio.Lock() if side.in_line else nullcontext()
    begun = time.perf_counter()

    async def work(act: Act) -> None:
        nonlocal tokens
        asked = time.perf_counter()
        while True:
            async with line:
                done = await act()  # not added at once: the others add to it meanwhile
            tokens += done
            now = time.perf_counter()
            latencies.append(now - asked)
            if now - begun >= seconds:
                return
            asked = now

    async with trio.open_nursery() as nursery:
        for act in side.acts:
            nursery.start_soon(work, act)
    return Turn(time.perf_counter() - begun, latencies, tokens)


def _figures(turns: Sequence[Turn]) -> Figures:
    latencies = [latency for turn in turns for latency in turn.latencies]
    p50, p95 = (1e3 * float(value) for value in np.quantile(latencies, (0.5, 0.95)))
    speed = statistics.median(turn.tokens / turn.seconds for turn in turns)
    return Figures(speed, p50, p95, sum(turn.passes for turn in turns) / len(latencies))
