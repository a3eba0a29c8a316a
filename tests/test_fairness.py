"""Tests of who gets the device when several want it, in virtual time."""

from __future__ import annotations

from collections import defaultdict
from itertools import count, groupby

import pytest
import trio
from trio.testing import MockClock

from tickwork.engine.engine import DECODE_SLICE, DECODE_TURN, Engine
from tickwork.engine.portal import Portal
from tickwork.engine.request import Request
from tickwork.engine.statistics import PAUSE, WATCHED
from tickwork.errors import InvalidRequestError
from tickwork.testing import FakeExecutor, open_engine


def a_pass(lane: str, *rows: int) -> Request:
    return Request("pass", lane, lane, rows, tokens=sum(rows))


def a_step(lane: str) -> Request:
    return Request("step", lane, lane)


def a_sample(lane: str = "sampler") -> Request:
    return Request("sample", lane, lane)


async def flood(portal: Portal, lane: str, *rows: int) -> None:
    """Keep two requests of a lane in the engine for ever."""
    ahead = portal.submit(a_pass(lane, *rows))
    while True:
        following = portal.submit(a_pass(lane, *rows))
        await ahead
        ahead = following


def tokens_run(executor: FakeExecutor) -> dict[str, int]:
    """Tokens of each lane so far."""
    found: dict[str, int] = defaultdict(int)
    for ran in executor.ran:
        for item in ran.stage.passes:
            for piece in item.pieces:
                found[piece.request.lane] += piece.tokens
    return found


@pytest.mark.parametrize("arrives", [0, 1, 5, 25.5, 480])
@pytest.mark.parametrize("backlog", ["one request", "many requests"])
async def test_a_backlog_delays_a_small_request_by_one_pass_at_most(
    autojump_clock: MockClock, arrives: float, backlog: str
) -> None:
    """Fifty passes of one client cost another the rest of the current pass, and its own is shared."""
    executor = FakeExecutor(token_cost=1, max_tokens=10)
    async with open_engine(executor) as (_, portal):
        large = [[1] * 500] if backlog == "one request" else [[1] * 10] * 50
        for rows in large:
            portal.submit(a_pass("large", *rows))
        await trio.sleep(arrives)
        begun = trio.current_time()
        await portal.submit(a_pass("small", 2, 3))
        assert trio.current_time() - begun <= 10 + 10

    assert sum(ran.ended - ran.begun for ran in executor.ran) == 505


async def test_a_client_that_waits_for_each_result_is_in_every_other_pass(autojump_clock: MockClock) -> None:
    """Beside an endless backlog it pays for one pass that it missed and the one it shares, each time."""
    executor = FakeExecutor(token_cost=1, max_tokens=10)
    async with open_engine(executor) as (_, portal):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, portal, "large", *[1] * 100)
            for _ in range(20):
                begun = trio.current_time()
                await portal.submit(a_pass("small", 5))
                assert trio.current_time() - begun <= 20
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("share", [1, 3, 0.5])
async def test_tokens_follow_shares(autojump_clock: MockClock, share: float) -> None:
    """Two clients with more than enough to do get tokens in proportion, whatever sizes their datums are."""
    executor = FakeExecutor(token_cost=1, max_tokens=40)
    async with open_engine(executor) as (engine, portal):
        engine.set_share("a", share)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, portal, "a", *[3, 1, 4] * 40)
            nursery.start_soon(flood, portal, "b", *[2, 6] * 40)
            await trio.sleep(4000)
            found = tokens_run(executor)
            nursery.cancel_scope.cancel()

    assert found["a"] + found["b"] == pytest.approx(4000, abs=100)
    assert found["a"] / found["b"] == pytest.approx(share, rel=0.05)


async def test_a_share_counts_from_the_next_pass_on(autojump_clock: MockClock) -> None:
    """A share may change while requests of the lane are under way."""
    executor = FakeExecutor(token_cost=1, max_tokens=8)
    async with open_engine(executor) as (engine, portal):
        for lane in "ab":
            portal.submit(a_pass(lane, *[1] * 64))
        await trio.sleep(20)
        engine.set_share("a", 3)

    parts = [sorted((p.request.lane, p.tokens) for p in ran.stage.passes[0].pieces) for ran in executor.ran]
    assert parts[:3] == [[("a", 4), ("b", 4)]] * 3
    assert parts[3:8] == [[("a", 6), ("b", 2)]] * 5


@pytest.mark.parametrize("share", [0, -1, float("inf"), float("nan"), 10**400, True, "2", None])
def test_a_share_is_a_finite_number_above_0(share: float) -> None:
    """Anything else is refused by name."""
    with pytest.raises(InvalidRequestError, match="share"):
        Engine(FakeExecutor()).set_share("a", share)


async def test_a_huge_request_does_not_hold_others(autojump_clock: MockClock) -> None:
    """While a request of a hundred passes runs, ten clients train on at the pace of the passes that they share."""
    executor = FakeExecutor(token_cost=1, step_cost=0, max_tokens=20)
    done: list[float] = []

    async def train(portal: Portal, lane: str) -> None:
        for _ in range(5):
            portal.submit(a_pass(lane, 1))
            await portal.submit(a_step(lane))
        done.append(trio.current_time())

    async with open_engine(executor) as (_, portal):
        huge = portal.submit(a_pass("huge", *[1] * 2000))
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            for lane in "abcdefghij":
                nursery.start_soon(train, portal, lane)
        assert max(done) <= 20 + 5 * 2 * 20
        assert not huge.done()


async def test_a_lane_keeps_its_order_beside_others(autojump_clock: MockClock) -> None:
    """Passes and steps of pipelined clients run in the order of their calls, although passes are shared and cut."""
    executor = FakeExecutor(token_cost=1, step_cost=1, max_tokens=16)
    asked: dict[str, list[Request]] = {}
    async with open_engine(executor) as (_, portal):
        for lane, rows in (("a", [1] * 40), ("b", [5]), ("c", [16, 3])):
            asked[lane] = [each for _ in range(6) for each in (a_pass(lane, *rows), a_step(lane))]
            for request in asked[lane]:
                portal.submit(request)
            await trio.sleep(7)

    for lane, requests in asked.items():
        ended = [
            request
            for ran in executor.ran
            for request in (
                *(p.request for item in ran.stage.passes for p in item.pieces if p.last),
                *ran.stage.steps,
            )
            if request.lane == lane
        ]
        assert ended == requests


async def test_the_smaller_bound_of_a_pass_holds(autojump_clock: MockClock) -> None:
    """A bound given to the engine, or the executor's own, which may shrink: passes keep to the smaller one."""
    executor = FakeExecutor(token_cost=1, max_tokens=8)
    async with open_engine(executor, max_tokens_per_pass=6) as (_, portal):
        portal.submit(a_pass("a", *[1] * 20))
        await trio.sleep(7)
        executor.max_tokens = 4

    assert [ran.stage.passes[0].tokens for ran in executor.ran] == [6, 6, 4, 4]


async def test_a_shrunk_bound_closes_windows_sooner(autojump_clock: MockClock) -> None:
    """A window is full when what waits would fill a pass as large as passes are now."""
    executor = FakeExecutor(max_tokens=8)
    async with open_engine(executor, cycle_period=60) as (_, portal):
        executor.max_tokens = 4
        await portal.submit(a_pass("a", 4))
        assert trio.current_time() == 0


async def test_arrivals_wait_for_their_window_while_the_device_is_busy(autojump_clock: MockClock) -> None:
    """With a period, a backlog goes on pass by pass until the window of those who came later closes."""
    executor = FakeExecutor(token_cost=1, max_tokens=10)
    async with open_engine(executor, cycle_period=30) as (_, portal):
        portal.submit(a_pass("a", *[1] * 100))
        await trio.sleep(1)
        portal.submit(a_pass("b", 1))
        await trio.sleep(20)
        await portal.submit(a_pass("c", 1))

    # Ten tokens fill the first window at once; the second opens at 1.
    begun = {p.request.lane: ran.begun for ran in executor.ran for p in ran.stage.passes[0].pieces if p.start == 0}
    assert begun == {"a": 0, "b": 40, "c": 40}


async def test_without_merging_each_pass_is_of_one_lane(autojump_clock: MockClock) -> None:
    """Lanes take turns, and each is cut as if it were alone."""
    executor = FakeExecutor(token_cost=1, max_tokens=10)
    async with open_engine(executor, merge=False) as (_, portal):
        for lane in "ab":
            portal.submit(a_pass(lane, *[3] * 7))

    parts = [[(p.request.lane, p.tokens) for p in ran.stage.passes[0].pieces] for ran in executor.ran]
    assert parts == [[("a", 9)], [("b", 9)], [("a", 9)], [("b", 9)], [("a", 3)], [("b", 3)]]


# Training and decoding.


def spans(executor: FakeExecutor) -> list[tuple[bool, float]]:
    """Turns of decoding (True) and of training, and how long each was."""
    turns = groupby(executor.ran, key=lambda ran: bool(ran.stage.decode))
    return [(decoding, sum(ran.ended - ran.begun for ran in group)) for decoding, group in turns]


@pytest.mark.parametrize("cost", [0.5, 0.05])
async def test_endless_decoding_leaves_half_to_training(autojump_clock: MockClock, cost: float) -> None:
    """Each pass is followed by as much decoding, give or take a draw, and never by more."""
    executor = FakeExecutor(token_cost=cost, draw_cost=0.01, draws=10**6, max_tokens=1)
    async with open_engine(executor) as (_, portal):
        sample = portal.submit(a_sample())
        await trio.sleep(1)
        begun, place = trio.current_time(), len(executor.ran)
        await portal.submit(a_pass("a", *[1] * 20))
        assert trio.current_time() - begun <= DECODE_TURN + 2 * 20 * (cost + 0.01)
        assert all(ran.ended - ran.begun <= max(cost, DECODE_SLICE) + 0.01 for ran in executor.ran[place + 1 :])
        sample.cancel()


@pytest.mark.parametrize("joining", [False, True])
async def test_endless_training_leaves_half_to_decoding(autojump_clock: MockClock, joining: bool) -> None:
    """A backlog of long passes, and samples that come in all the time, cost decoding none of its half."""
    executor = FakeExecutor(token_cost=0.1, draw_cost=0.25, draws=40, max_tokens=10)

    async def join(portal: Portal) -> None:
        while joining:
            await trio.sleep(0.3)
            portal.submit(a_sample("other")).add_done_callback(lambda _: None)

    async with trio.open_nursery() as nursery:
        async with open_engine(executor) as (_, portal):
            nursery.start_soon(flood, portal, "a", *[1] * 50)
            nursery.start_soon(join, portal)
            await trio.sleep(2)
            begun = trio.current_time()
            await portal.submit(a_sample())
            # Forty draws take ten seconds; as much again goes to training, and the first pass may be under way.
            assert trio.current_time() - begun <= 2 * 40 * 0.25 + 1 + 0.25
            nursery.cancel_scope.cancel()

    decoding = sum(length for decodes, length in spans(executor)[:-1] if decodes)
    training = sum(length for decodes, length in spans(executor)[:-1] if not decodes)
    assert decoding >= 0.4 * (decoding + training)


# What it tells.


async def alternate(portal: Portal, lane: str, times: int) -> None:
    """Train as one who waits for each result."""
    for _ in range(times):
        await portal.submit(a_pass(lane, 1))


async def test_two_clients_that_wait_for_results_miss_each_others_cycles(autojump_clock: MockClock) -> None:
    """Both are told, with numbers, once there have been enough cycles to tell from."""
    executor = FakeExecutor(token_cost=1)
    async with open_engine(executor) as (engine, portal):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alternate, portal, "a", 20)
            await trio.sleep(0.5)
            nursery.start_soon(alternate, portal, "b", 20)
            await trio.sleep(5)
            early = engine.statistics().lanes
            await trio.sleep(20)
            hint = engine.hint("b")
            late = engine.statistics().lanes

    assert {lane: early[lane].hint for lane in "ab"} == {"a": None, "b": None}
    assert early["a"].cycles + early["a"].missed < WATCHED
    assert (
        hint
        == late["b"].hint
        == "missed 12 of 25 cycles: submit the next request before you await the last one's result"
    )
    assert late["a"].hint is not None


async def test_a_client_alone_gets_no_hint(autojump_clock: MockClock) -> None:
    """Waiting for each result costs nothing where nobody else wants the device."""
    async with open_engine(FakeExecutor(token_cost=1)) as (engine, portal):
        await alternate(portal, "a", 40)
        assert engine.hint("a") is None
        assert engine.statistics().lanes["a"].missed == 0


async def test_a_client_beside_samples_gets_no_hint(autojump_clock: MockClock) -> None:
    """Cycles without passes of others cost a waiting client nothing."""

    async def draw(portal: Portal) -> None:
        while True:
            await portal.submit(a_sample())

    executor = FakeExecutor(token_cost=1, draw_cost=0.3, draws=2)
    async with open_engine(executor) as (engine, portal):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(draw, portal)
            for _ in range(20):
                await portal.submit(a_pass("a", 1))
                await trio.sleep(1.5)
            assert engine.statistics().lanes["a"].missed > 10
            assert engine.hint("a") is None
            nursery.cancel_scope.cancel()


async def test_a_client_that_submits_ahead_gets_no_hint(autojump_clock: MockClock) -> None:
    """Who always has something accepted misses nothing, while its waiting neighbour does."""
    executor = FakeExecutor(token_cost=1, max_tokens=4)
    async with open_engine(executor) as (engine, portal):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, portal, "ahead", 2)
            await trio.sleep(0.5)
            await alternate(portal, "waits", 20)
            lanes = engine.statistics().lanes
            nursery.cancel_scope.cancel()

    assert (lanes["ahead"].missed, lanes["ahead"].hint) == (0, None)
    assert lanes["waits"].hint is not None


@pytest.mark.parametrize("pause", [PAUSE + 1, 40])
async def test_a_client_that_pauses_gets_no_hint(autojump_clock: MockClock, pause: int) -> None:
    """Cycles that close while a client does something else are missed, but not because it waits for a result."""
    executor = FakeExecutor(token_cost=1, max_tokens=4)
    async with open_engine(executor) as (engine, portal):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, portal, "ahead", 1)
            for _ in range(12):
                await portal.submit(a_pass("pauses", 1))
                await trio.sleep(pause + 0.5)
            assert engine.statistics().lanes["pauses"].missed >= 11 * PAUSE
            assert engine.hint("pauses") is None
            nursery.cancel_scope.cancel()


async def test_a_client_that_waits_for_its_samples_gets_no_hint(autojump_clock: MockClock) -> None:
    """A sample of a snapshot belongs to its model's lane: the next batch can not be made without it."""
    executor = FakeExecutor(token_cost=1, draw_cost=0.5, draws=4, max_tokens=4)
    async with open_engine(executor) as (engine, portal):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, portal, "ahead", 1)
            for _ in range(12):
                portal.submit(a_pass("rl", 1))
                await portal.submit(a_sample("rl"))
            assert engine.hint("rl") is None
            nursery.cancel_scope.cancel()


async def test_released_lanes_leave_no_records(autojump_clock: MockClock) -> None:
    """A thousand models made and let go, also with samplers that outlive them, take no memory."""
    executor, numbers = FakeExecutor(draws=2), count()
    async with open_engine(executor) as (engine, portal):
        for number in range(1000):
            lane = f"lane {number}"
            engine.set_share(lane, 1 + number)
            portal.submit(a_pass(lane, next(numbers) % 3))
            portal.submit(a_step(lane))
            portal.drop(Request("step", lane, lane, ends_lane=True))
            if number % 10 == 0:
                await portal.submit(a_sample(lane))
                assert engine.statistics().lanes.keys() <= {lane}
            portal.drop(Request("step", lane, "its sampler"))
        await portal.submit(a_step("last"))

    planner, counters = engine._planner, engine._count
    assert engine.statistics().lanes == {}
    assert (planner._lanes, planner._shares, dict(counters._live), counters._lanes) == ({}, {}, {}, {})
    assert counters._live_passes == 0
