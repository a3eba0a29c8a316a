"""Tests of waiting for clients who are about to come back, in virtual time."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import trio
from trio.testing import MockClock

from tickwork.engine.portal import Portal
from tickwork.engine.request import Request
from tickwork.engine.returns import PATIENCE, Returns
from tickwork.testing import FakeExecutor, open_engine

TOKENS = 8


async def client(portal: Portal, lane: str, steps: int, gap: float, *, ahead: int = 1) -> None:
    """Train as a client does that takes ``gap`` seconds from a result to its next requests."""
    for _ in range(steps):
        asks = [Request("pass", lane, None, (TOKENS,), tokens=TOKENS) for _ in range(ahead)]
        for future in [await portal.submit_async(ask) for ask in asks]:
            await future
        await trio.sleep(gap)


def lanes_per_pass(executor: FakeExecutor) -> list[int]:
    """How many lanes shared each pass, in order."""
    return [len(item.pieces) for ran in executor.ran for item in ran.stage.passes]


async def test_clients_who_come_back_soon_share_every_pass(autojump_clock: MockClock) -> None:
    """Once it is known how soon they return, the first to come back does not run alone."""
    executor = FakeExecutor(token_cost=1.0)
    async with open_engine(executor) as (_, portal), trio.open_nursery() as nursery:
        for index in range(4):
            nursery.start_soon(client, portal, f"lane {index}", 8, 0.1 + index / 10)
    found = lanes_per_pass(executor)
    assert sum(found) == 32
    assert found.count(4) >= 6  # but for the first turns, which teach the gaps
    assert len(found) <= 11


async def test_a_client_alone_is_not_waited_for(autojump_clock: MockClock) -> None:
    """Its passes follow each other as it submits them."""
    executor = FakeExecutor(token_cost=1.0)
    async with open_engine(executor) as (_, portal):
        await client(portal, "a", 5, 0.5)
    begun = [ran.begun for ran in executor.ran if ran.stage.passes]
    assert begun == [(TOKENS + 0.5) * turn for turn in range(5)]


async def test_one_who_thinks_delays_nobody(autojump_clock: MockClock) -> None:
    """A client who is away for longer than the patience is not waited for, and its neighbour loses nothing."""
    executor = FakeExecutor(token_cost=1.0)
    async with open_engine(executor) as (_, portal), trio.open_nursery() as nursery:
        nursery.start_soon(client, portal, "slow", 3, 100.0)
        nursery.start_soon(client, portal, "quick", 20, 0.01)
    quick = [
        ran for ran in executor.ran for item in ran.stage.passes if [p.request.lane for p in item.pieces] == ["quick"]
    ]
    gaps = [later.begun - earlier.ended for earlier, later in pairwise(quick)]
    assert sorted(gaps)[len(gaps) // 2] <= 0.011


async def test_who_stops_is_waited_for_once(autojump_clock: MockClock) -> None:
    """A client that does not come back costs the others a part of one pass, and no more."""
    executor = FakeExecutor(token_cost=1.0)
    async with open_engine(executor) as (_, portal), trio.open_nursery() as nursery:
        nursery.start_soon(client, portal, "goes", 4, 0.2)
        nursery.start_soon(client, portal, "stays", 12, 0.1)
    ran = [each for each in executor.ran if each.stage.passes]
    idle = sum(later.begun - earlier.ended for earlier, later in pairwise(ran))
    assert idle <= 12 * 0.1 + 4 * 0.2 + PATIENCE * 2 * TOKENS


async def test_who_submits_ahead_is_not_waited_for(autojump_clock: MockClock) -> None:
    """While a lane holds requests nothing is expected of it."""
    executor = FakeExecutor(token_cost=1.0)
    async with open_engine(executor) as (_, portal), trio.open_nursery() as nursery:
        nursery.start_soon(partial(client, portal, "ahead", 2, 0.0, ahead=6))
        nursery.start_soon(client, portal, "stays", 6, 0.0)
    ran = [each for each in executor.ran if each.stage.passes]
    assert all(later.begun == earlier.ended for earlier, later in pairwise(ran))


async def test_a_closing_engine_does_not_wait(autojump_clock: MockClock) -> None:
    """What was accepted is drained at once."""
    executor = FakeExecutor(token_cost=1.0)
    async with open_engine(executor) as (_, portal):
        async with trio.open_nursery() as nursery:
            for lane in "ab":
                nursery.start_soon(client, portal, lane, 3, 0.5)
        last = await portal.submit_async(Request("pass", "a", None, (TOKENS,), tokens=TOKENS))
        before = trio.current_time()
        portal.close()
        await last
    assert executor.ran[-1].ended - before == TOKENS


def test_lanes_that_have_ended_leave_nothing_behind() -> None:
    """Whatever is settled in a lane after its end, as the release of a sampler is, is not waited for."""
    returns = Returns()
    for index in range(100):
        lane = f"lane {index}"
        asks = [
            Request("pass", lane, None, (1,), tokens=1),
            Request("step", lane, None, ends_lane=True),
            Request("step", lane, None),
        ]
        for ask in asks:
            returns.accepted(ask, 0.0)
        for ask in asks:
            returns.settled(ask, 1.0)
    assert not any(vars(returns)[name] for name in ("_held", "_away", "_gaps", "_trains"))
