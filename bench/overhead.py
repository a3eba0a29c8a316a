"""What a request costs besides its computing: the round trip through an engine whose executor does nothing."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import trio

from tickwork.engine.engine import Engine
from tickwork.engine.portal import Portal
from tickwork.engine.request import Request
from tickwork.engine.thread import EngineThread
from tickwork.testing import FakeExecutor

ROUNDS = 2000
WARM = 200


def measure() -> list[dict[str, Any]]:
    """Return one row for each way to call."""
    rows = []
    for caller, run in (("sync", _sync), ("asyncio", _asyncio), ("trio", _trio)):
        thread = EngineThread(Engine(FakeExecutor()))
        seconds = run(thread.start())[WARM:]
        thread.close()
        half, tail = statistics.median(seconds), statistics.quantiles(seconds, n=100)[94]
        rows.append(
            {
                "speed": "round trip",
                "workload": f"empty executor, {caller}",
                "ours": f"{half * 1e3:.3f} ms p50, {tail * 1e3:.3f} ms p95",
                "against": "0.5 ms",
                "ratio": round(half / 0.5e-3, 3),
                "wanted": "<= 1.00",
            }
        )
    return rows


def _sync(portal: Portal) -> list[float]:
    return [_timed(lambda: portal.submit(_request()).result()) for _ in range(ROUNDS)]


def _timed(act: Any) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def _asyncio(portal: Portal) -> list[float]:
    return asyncio.run(_awaited(portal))


def _trio(portal: Portal) -> list[float]:
    return trio.run(_awaited, portal)


async def _awaited(portal: Portal) -> list[float]:
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        await portal.submit(_request())
        seconds.append(time.perf_counter() - begun)
    return seconds


def _request() -> Request:
    return Request("step", "lane", None)
