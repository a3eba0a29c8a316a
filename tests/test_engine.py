"""Tests of the engine: each row of the README's table of events, in virtual time, with a fake executor."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import groupby
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from tickwork.engine.engine import DECODE_SLICE, DECODE_TURN, Engine
from tickwork.engine.plan import Stage
from tickwork.engine.portal import Portal
from tickwork.engine.request import BASE_WEIGHT, Outcome, Request
from tickwork.engine.statistics import EngineStatistics, LaneStatistics
from tickwork.errors import (
    CheckpointError,
    ClosedError,
    EngineStoppedError,
    LossError,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
    WrongThreadError,
)
from tickwork.testing import FakeExecutor, open_engine

GUARD = 60.0


class DeviceError(Exception):
    """What a device dies of."""


def a_pass(lane: str, name: str, *rows: int) -> Request:
    return Request("pass", lane, name, rows or (1,), tokens=sum(rows or (1,)))


def a_step(lane: str, name: str, tokens: int = 0) -> Request:
    return Request("step", lane, name, tokens=tokens)


def a_sample(name: str) -> Request:
    return Request("sample", "sampler", name)


def names(stage: Stage) -> list[str]:
    """Payloads of the passes and steps that a stage finishes, in order."""
    passes = [piece.request for item in stage.passes for piece in item.pieces if piece.last]
    return [request.payload for request in (*passes, *stage.steps)]


def order(executor: FakeExecutor) -> list[str]:
    """Payloads of all passes and steps that were finished, in order."""
    return [name for ran in executor.ran for name in names(ran.stage)]


def causes(error: BaseException | None) -> list[BaseException]:
    """The chain of ``__cause__`` that led to an error."""
    return [] if error is None else [error, *causes(error.__cause__)]


def failure(request: Request) -> BaseException:
    """What a settled request failed of."""
    error = request.future.future().exception(timeout=0)
    assert error is not None
    return error


@attrs.define
class Hosted:
    """An engine whose death is caught, to be looked at; ``scope`` aborts it."""

    engine: Engine
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    death: BaseException | None = None
    ended: trio.Event = attrs.Factory(trio.Event)

    async def run(self, *, task_status: trio.TaskStatus[Portal]) -> None:
        """Run the engine, keeping what it raises."""
        try:
            with self.scope:
                await self.engine.run(task_status=task_status)
        except Exception as error:
            self.death = error
        self.ended.set()


@asynccontextmanager
async def hosted(executor: FakeExecutor, **settings: Any) -> AsyncIterator[tuple[Hosted, Portal]]:
    host = Hosted(Engine(executor, **settings))
    async with trio.open_nursery() as nursery:
        portal = await nursery.start(host.run)
        yield host, portal
        portal.close()


# Order, passes, cycles.


async def test_a_lane_runs_in_the_order_of_its_calls(autojump_clock: MockClock) -> None:
    """What a client submits without waiting runs in that order, and each future gets its own result."""
    executor = FakeExecutor(token_cost=1, step_cost=1)
    async with open_engine(executor) as (_, portal):
        asked = [
            a_pass("a", "fb 1", 2),
            a_step("a", "opt 1"),
            a_pass("a", "fb 2", 1),
            a_pass("a", "fb 3"),
            a_step("a", "opt 2"),
        ]
        futures = [portal.submit(request) for request in asked]
        assert [await future for future in futures] == ["fb 1", "opt 1", "fb 2", "fb 3", "opt 2"]

    assert order(executor) == ["fb 1", "opt 1", "fb 2", "fb 3", "opt 2"]


async def test_a_step_waits_for_the_passes_before_it(autojump_clock: MockClock) -> None:
    """A barrier runs after all earlier requests of its lane and before all later ones, across cycles too."""
    executor = FakeExecutor(token_cost=1, step_cost=1)
    async with open_engine(executor) as (_, portal):
        portal.submit(a_pass("a", "before", 5))
        await trio.sleep(2)
        portal.submit(a_step("a", "barrier"))
        portal.submit(a_pass("a", "after"))

    assert [names(ran.stage) for ran in executor.ran] == [["before"], ["barrier"], ["after"]]
    assert [(ran.begun, ran.ended) for ran in executor.ran] == [(0, 5), (5, 6), (6, 7)]


async def test_lanes_share_passes(autojump_clock: MockClock) -> None:
    """Requests of several clients in one cycle go through the model together."""
    executor = FakeExecutor(token_cost=1)
    async with open_engine(executor) as (engine, portal):
        for lane in "abc":
            portal.submit(a_pass(lane, f"fb {lane}", 2))
            portal.submit(a_step(lane, f"opt {lane}"))

    assert engine.statistics().passes == 1

    [ran] = executor.ran
    assert [piece.request.payload for piece in ran.stage.passes[0].pieces] == ["fb a", "fb b", "fb c"]
    assert [request.payload for request in ran.stage.steps] == ["opt a", "opt b", "opt c"]


async def test_what_arrives_while_the_device_is_busy_forms_the_next_cycle(autojump_clock: MockClock) -> None:
    """With period 0 the first request starts at once; the others share the cycle after it."""
    executor = FakeExecutor(token_cost=1)
    async with open_engine(executor) as (_, portal):
        for lane, at in (("a", 0), ("b", 3), ("c", 6)):
            await trio.sleep_until(at)
            portal.submit(a_pass(lane, lane, 10))

    assert [(ran.cycle, ran.begun, names(ran.stage)) for ran in executor.ran] == [(1, 0, ["a"]), (2, 10, ["b", "c"])]


async def test_a_period_lets_others_join(autojump_clock: MockClock) -> None:
    """A window stays open for its period after the first arrival; who comes later waits for the next."""
    executor = FakeExecutor(token_cost=1)
    async with open_engine(executor, cycle_period=5) as (_, portal):
        for lane, at in (("a", 1), ("b", 4), ("c", 6.5)):
            await trio.sleep_until(at)
            portal.submit(a_pass(lane, lane, 1))
        await trio.sleep_until(20)

    assert [(ran.begun, names(ran.stage)) for ran in executor.ran] == [(6, ["a", "b"]), (11.5, ["c"])]


async def test_a_full_window_does_not_wait(autojump_clock: MockClock) -> None:
    """A window with ``max_tokens_per_pass`` tokens closes before its period is over."""
    executor = FakeExecutor()
    async with open_engine(executor, cycle_period=60, max_tokens_per_pass=8) as (_, portal):
        portal.submit(a_pass("a", "a", 4))
        await trio.sleep(2)
        await portal.submit(a_pass("b", "b", 4))
        assert trio.current_time() == 2

    assert [names(ran.stage) for ran in executor.ran] == [["a", "b"]]


async def test_waiting_for_each_result_costs_nothing(autojump_clock: MockClock) -> None:
    """On an idle engine a client that awaits each result before the next call spends device time only."""
    executor = FakeExecutor(token_cost=1, step_cost=2)
    async with open_engine(executor) as (_, portal):
        for number in range(5):
            await portal.submit(a_pass("a", f"fb {number}", 3))
            await portal.submit(a_step("a", f"opt {number}"))
        assert trio.current_time() == 5 * (3 + 2)


async def test_a_small_request_is_answered_before_a_large_neighbour(autojump_clock: MockClock) -> None:
    """Results come pass by pass, so sharing a cycle with a large request costs a small one nothing."""
    executor = FakeExecutor(token_cost=1)
    async with open_engine(executor, max_tokens_per_pass=10) as (_, portal):
        large, small = portal.submit(a_pass("a", "large", *[10] * 5)), portal.submit(a_pass("b", "small", 2))
        assert await small == "small"
        assert trio.current_time() == 2
        assert await large == "large"
        assert trio.current_time() == 52


async def test_an_idle_engine_sets_no_timer(autojump_clock: MockClock) -> None:
    """Before the first request, and after the last, Trio has no deadline to wake up for."""
    async with open_engine(FakeExecutor(), cycle_period=5) as (_, portal):
        for _ in range(2):
            await wait_all_tasks_blocked()
            assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
            await portal.submit(a_pass("a", "a"))


async def test_no_lane_starves(autojump_clock: MockClock) -> None:
    """A request runs in the pass after the one it arrived in, however large another lane's backlog is."""
    executor, begun = FakeExecutor(token_cost=1), {}

    async def flood(portal: Portal) -> None:
        while True:
            futures = [portal.submit(a_pass("large", "large", *[10] * 10)) for _ in range(3)]
            await futures[1]

    async with open_engine(executor, max_tokens_per_pass=10) as (_, portal):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, portal)
            for number in range(8):
                await trio.sleep(37)
                begun[f"small {number}"] = trio.current_time()
                await portal.submit(a_pass("small", f"small {number}"))
            nursery.cancel_scope.cancel()

    for name, arrived in begun.items():
        [place] = [place for place, ran in enumerate(executor.ran) if name in names(ran.stage)]
        busy_at_arrival = next(place for place, ran in enumerate(executor.ran) if ran.begun <= arrived <= ran.ended)
        assert place - busy_at_arrival <= 1


clients = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from(["pass", "step", "sample"]),
            st.integers(0, 30),
            st.sampled_from([0, 0, 1, 7]),
            st.booleans(),
        ),
        max_size=6,
    ),
    max_size=4,
)


@settings(max_examples=60)
@given(clients, st.sampled_from([0.0, 0.5, 4.0]), st.integers(1, 40), st.sampled_from([1, 600, 10**6]))
def test_whatever_clients_do_each_request_runs_once_and_in_order(
    clients: list[list[tuple[Any, int, float, bool]]], period: float, max_tokens: int, limit: int
) -> None:
    """For any clients, windows, budgets and limits: all futures settle, none runs twice, lanes keep their order."""
    executor = FakeExecutor(token_cost=0.125, step_cost=1, draw_cost=0.5, draws=3)
    settings: Any = {"cycle_period": period, "max_tokens_per_pass": max_tokens, "max_queued_tokens": limit}
    asked: dict[str, list[Request]] = {str(lane): [] for lane in range(len(clients))}

    async def client(portal: Portal, lane: str, script: list[tuple[Any, int, float, bool]]) -> None:
        for kind, tokens, gap, wait in script:
            await trio.sleep(gap)
            request = Request(kind, lane, f"{lane}.{len(asked[lane])}", (tokens,), tokens=tokens)
            asked[lane].append(request)
            future = await portal.submit_async(request)
            if wait:
                await future

    async def main() -> EngineStatistics:
        async with open_engine(executor, **settings) as (engine, portal):
            async with trio.open_nursery() as nursery:
                for lane, script in zip(asked, clients, strict=True):
                    nursery.start_soon(client, portal, lane, script)
        return engine.statistics()

    statistics = trio.run(main, clock=MockClock(autojump_threshold=0))

    ran = order(executor)
    for lane, requests in asked.items():
        assert [request.future.result(0) for request in requests] == [request.payload for request in requests]
        expected = [request.payload for request in requests if request.kind != "sample"]
        assert [name for name in ran if name.split(".")[0] == lane] == expected
    assert statistics.requests == sum(map(len, clients))
    assert (statistics.credits, statistics.queued, statistics.waiting) == (0, 0, 0)
    assert statistics.busy == sum(each.ended - each.begun for each in executor.ran)


# The door.


async def test_blocked_callers_enter_in_the_order_in_which_they_came(autojump_clock: MockClock) -> None:
    """With the credits used up, callers wait; each result lets the one who waits longest in."""
    executor, entered = FakeExecutor(step_cost=1), []

    async def ask(portal: Portal, number: int) -> None:
        await portal.submit_async(a_step("a", f"{number}"))
        entered.append((number, trio.current_time()))

    async with open_engine(executor, max_queued_tokens=2 * BASE_WEIGHT) as (engine, portal):
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(ask, portal, number)
                await wait_all_tasks_blocked()
            assert engine.statistics().waiting == 4
            assert engine.statistics().credits == 2 * BASE_WEIGHT

    assert [number for number, _ in entered] == [0, 1, 2, 3, 4, 5]
    assert [at for _, at in entered] == sorted(at for _, at in entered)
    assert entered[-1][1] >= 2
    assert order(executor) == ["0", "1", "2", "3", "4", "5"]


async def test_a_light_caller_does_not_overtake_a_heavy_one(autojump_clock: MockClock) -> None:
    """A request heavier than the limit enters when nothing else is inside; who came after it stays behind it."""
    executor = FakeExecutor(step_cost=1)
    limit = 3 * BASE_WEIGHT
    async with open_engine(executor, max_queued_tokens=limit) as (engine, portal):
        portal.submit(a_step("a", "first"))
        async with trio.open_nursery() as nursery:
            for request in (a_step("b", "heavy", tokens=10 * limit), a_step("c", "light")):
                nursery.start_soon(portal.submit_async, request)
                await wait_all_tasks_blocked()
            assert engine.statistics().waiting == 2
            await trio.sleep(1.5)
            assert engine.statistics().waiting == 1
            assert engine.statistics().credits == 10 * limit + BASE_WEIGHT

    assert order(executor) == ["first", "heavy", "light"]


async def test_a_full_queue_refuses_a_call_that_must_not_block(autojump_clock: MockClock) -> None:
    """In an event loop the sync call raises ``QueueFullError`` and its request never existed."""
    executor = FakeExecutor(step_cost=1)
    async with open_engine(executor, max_queued_tokens=BASE_WEIGHT) as (engine, portal):
        first = portal.submit(a_step("a", "first"))
        for _ in range(3):
            with pytest.raises(QueueFullError, match="_async"):
                portal.submit(a_step("a", "refused"))
        assert engine.statistics().waiting == 0
        await first
        await portal.submit(a_step("a", "second"))

    assert order(executor) == ["first", "second"]


async def test_cancelled_before_acceptance_never_existed(autojump_clock: MockClock) -> None:
    """A caller that is cancelled while it waits for credit leaves the line, and those behind it move up."""
    executor = FakeExecutor(step_cost=10)
    async with open_engine(executor, max_queued_tokens=2 * BASE_WEIGHT) as (engine, portal):
        portal.submit(a_step("a", "first"))
        behind = a_step("c", "behind")
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1) as scope:
                nursery.start_soon(trio.lowlevel.checkpoint)
                nursery.start_soon(follow, portal, behind)
                await portal.submit_async(a_step("b", "never", tokens=BASE_WEIGHT))
            assert scope.cancelled_caught
            await wait_all_tasks_blocked()
            assert engine.statistics().waiting == 0
            assert engine.statistics().credits == 2 * BASE_WEIGHT
            assert trio.current_time() == 1

    assert order(executor) == ["first", "behind"]


async def follow(portal: Portal, request: Request) -> None:
    """Submit a request once those before it are in line."""
    await wait_all_tasks_blocked()
    await portal.submit_async(request)


async def test_cancelled_in_the_middle_of_the_line_leaves_no_gap(autojump_clock: MockClock) -> None:
    """A cancelled caller that is not the first in line is not counted any more."""
    executor = FakeExecutor(step_cost=10)
    async with open_engine(executor, max_queued_tokens=BASE_WEIGHT) as (engine, portal):
        portal.submit(a_step("a", "first"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(portal.submit_async, a_step("a", "second"))
            await wait_all_tasks_blocked()
            with trio.move_on_after(1):
                await portal.submit_async(a_step("a", "never"))
            assert engine.statistics().waiting == 1

    assert order(executor) == ["first", "second"]


async def test_accepted_runs_even_if_the_call_is_cancelled(autojump_clock: MockClock) -> None:
    """Once there was credit the request is accepted: cancelling ``submit_async`` then ends the call alone."""
    executor = FakeExecutor()
    async with open_engine(executor) as (_, portal):
        with trio.CancelScope() as scope:
            scope.cancel()
            await portal.submit_async(a_step("a", "accepted"))
        assert scope.cancelled_caught

    assert order(executor) == ["accepted"]


async def test_cancelling_or_timing_out_a_wait_leaves_the_request(autojump_clock: MockClock) -> None:
    """The wait ends, the work completes, and the result may be awaited again."""
    executor = FakeExecutor(step_cost=10)
    async with open_engine(executor) as (_, portal):
        future = portal.submit(a_step("a", "slow"))
        with trio.move_on_after(1) as scope:
            await future
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            await future.result_async(2)
        assert trio.current_time() == 3
        assert await future == "slow"
        assert trio.current_time() == 10


# Errors.


async def test_a_user_error_fails_its_own_future(autojump_clock: MockClock) -> None:
    """A failed request is an outcome: others of its pass, and its lane's next requests, succeed."""
    executor = FakeExecutor(failures={"bad": LossError("the loss raised")})
    async with open_engine(executor) as (_, portal):
        good, bad, later = (portal.submit(a_pass(*each)) for each in (("a", "good"), ("b", "bad"), ("b", "later")))
        with pytest.raises(LossError, match="the loss raised"):
            await bad
        assert await good == "good"
        assert await later == "later"
        assert await portal.submit(a_step("b", "opt")) == "opt"

    assert order(executor) == ["good", "bad", "later", "opt"]


async def test_a_dead_device_fails_everything_pending(autojump_clock: MockClock) -> None:
    """What runs, what is planned, what is queued and who waits at the door: all fail with the cause; none runs."""
    boom = DeviceError("the device is gone")
    executor = FakeExecutor(token_cost=1, failures={"fatal": boom})
    asked = [a_pass("a", "fatal", 5), a_step("a", "planned"), a_pass("b", "beside", 5)]
    queued, refused = a_pass("b", "queued"), []

    async def knock(portal: Portal) -> None:
        with pytest.raises(EngineStoppedError) as caught:
            await portal.submit_async(a_pass("c", "at the door"))
        refused.append(caught.value)

    limit = sum(request.weight for request in (*asked, queued))
    async with trio.open_nursery() as nursery, hosted(executor, max_queued_tokens=limit) as (host, portal):
        for request in asked:
            portal.submit(request)
        await trio.sleep(1)
        portal.submit(queued)
        nursery.start_soon(knock, portal)
        await host.ended.wait()
        with pytest.raises(EngineStoppedError):
            portal.submit(a_pass("a", "late"))

    for request in (*asked, queued):
        with pytest.raises(EngineStoppedError, match="DeviceError") as caught:
            await request.future
        assert boom in causes(caught.value)
    assert boom in causes(refused[0])
    assert len(executor.ran) == 1
    assert not executor.is_open


async def test_run_raises_what_the_device_died_of(autojump_clock: MockClock) -> None:
    """The very exception leaves ``run``, without an ``ExceptionGroup`` around it."""
    boom = DeviceError()
    async with hosted(FakeExecutor(failures={"fatal": boom})) as (host, portal):
        portal.submit(a_step("a", "fatal"))
        await host.ended.wait()
    assert host.death is boom


async def test_a_device_that_dies_in_sampling_stops_the_engine(autojump_clock: MockClock) -> None:
    """Decoding is no exception to the rule: samples fail with the cause."""
    boom = DeviceError()
    executor = FakeExecutor(step_cost=1, draw_cost=1, draws=5, failures={"fatal": boom})
    async with hosted(executor) as (host, portal):
        sample = portal.submit(a_sample("sample"))
        await trio.sleep(2)
        portal.submit(a_step("a", "fatal"))
        with pytest.raises(EngineStoppedError):
            await sample
        await host.ended.wait()
    assert host.death is boom


async def test_the_engines_death_cancels_the_body_of_open_engine(autojump_clock: MockClock) -> None:
    """A body that waits for something else is not left waiting; the cause leaves in a group."""
    with pytest.RaisesGroup(DeviceError):
        async with open_engine(FakeExecutor(failures={"fatal": DeviceError()})) as (_, portal):
            portal.submit(a_step("a", "fatal"))
            await trio.sleep_forever()


async def test_an_executor_that_does_not_open_is_the_engines_error() -> None:
    """An engine whose device can not be made ready never starts."""

    class Broken(FakeExecutor):
        @asynccontextmanager
        async def open(self) -> AsyncIterator[None]:
            raise DeviceError
            yield

    with pytest.raises(DeviceError):
        await Engine(Broken()).run()


async def test_each_refused_call_raises_an_error_of_its_own() -> None:
    """Callers in several threads do not share one exception object and its traceback."""
    async with open_engine(FakeExecutor()) as (_, portal):
        pass

    with pytest.raises(ClosedError) as first:
        portal.submit(a_step("a", "late"))
    with pytest.raises(ClosedError) as second:
        await portal.submit_async(a_step("a", "late"))
    assert first.value is not second.value


# Leaving.


async def test_leaving_normally_drains(autojump_clock: MockClock) -> None:
    """What was accepted runs to its end, samples too; then the executor is closed."""
    executor = FakeExecutor(step_cost=5, draw_cost=1, draws=20)
    async with open_engine(executor) as (_, portal):
        futures = [portal.submit(each) for each in (a_step("a", "1"), a_step("a", "2"), a_sample("sample"))]
        await trio.sleep(1)
        futures.append(portal.submit(a_step("b", "3")))

    assert [future.result(0) for future in futures] == ["1", "2", "sample", "3"]
    assert not executor.is_open


async def test_closing_cuts_the_period_short(autojump_clock: MockClock) -> None:
    """Nobody else can join, so draining does not wait for the window."""
    async with open_engine(FakeExecutor(), cycle_period=60) as (_, portal):
        future = portal.submit(a_step("a", "last"))

    assert future.result(0) == "last"
    assert trio.current_time() == 0


async def test_a_closed_portal_takes_nothing_more(autojump_clock: MockClock) -> None:
    """New requests, and callers in front of the door, get ``ClosedError``; what is inside runs."""
    executor = FakeExecutor(step_cost=5)
    async with open_engine(executor, max_queued_tokens=BASE_WEIGHT) as (_, portal):
        inside = portal.submit(a_step("a", "inside"))
        async with trio.open_nursery() as nursery:

            async def knock() -> None:
                with pytest.raises(ClosedError):
                    await portal.submit_async(a_step("b", "at the door"))

            nursery.start_soon(knock)
            await wait_all_tasks_blocked()
            portal.close()
        with pytest.raises(ClosedError):
            portal.submit(a_step("a", "late"))
        with pytest.raises(ClosedError):
            await portal.submit_async(a_step("a", "late"))
        assert await inside == "inside"

    assert order(executor) == ["inside"]


async def test_aborting_ends_the_current_stage_and_fails_the_rest(autojump_clock: MockClock) -> None:
    """The job on the device runs to its end and its results count; later stages of its cycle do not begin."""
    executor = FakeExecutor(token_cost=1)
    asked = [a_pass("a", "running", 5), a_step("a", "with it"), a_pass("a", "planned", 5), a_step("a", "opt")]
    async with hosted(executor) as (host, portal):
        for request in asked:
            portal.submit(request)
        await trio.sleep(2)
        queued = a_pass("b", "queued")
        portal.submit(queued)
        host.scope.cancel()
        await host.ended.wait()
        assert trio.current_time() == 5
        with pytest.raises(EngineStoppedError):
            portal.submit(a_pass("a", "late"))

    assert [request.future.result(0) for request in asked[:2]] == ["running", "with it"]
    for request in (*asked[2:], queued):
        assert isinstance(failure(request), EngineStoppedError)
    assert order(executor) == ["running", "with it"]
    assert host.death is None


async def test_aborting_does_not_wait_for_a_large_request(autojump_clock: MockClock) -> None:
    """Of a request that needs many passes only the current one ends, and the request fails."""
    executor = FakeExecutor(token_cost=1)
    large = a_pass("a", "large", *[10] * 50)
    async with hosted(executor, max_tokens_per_pass=10) as (host, portal):
        portal.submit(large)
        await trio.sleep(25)
        host.scope.cancel()
        await host.ended.wait()
        assert trio.current_time() == 30

    assert isinstance(failure(large), EngineStoppedError)


async def test_aborting_does_not_wait_for_samples(autojump_clock: MockClock) -> None:
    """An abort while samples are drawn ends with the current turn of decoding."""
    executor = FakeExecutor(draw_cost=0.01, draws=10**6)
    sample = a_sample("endless")
    with trio.fail_after(10):
        async with hosted(executor) as (host, portal):
            portal.submit(sample)
            await trio.sleep(1)
            host.scope.cancel()
            await host.ended.wait()
            assert trio.current_time() < 1 + 2 * DECODE_SLICE

    assert isinstance(failure(sample), EngineStoppedError)


async def test_aborting_fails_what_has_only_just_been_accepted(autojump_clock: MockClock) -> None:
    """A request that is still on its way into the queue when the engine gives up fails like all others."""
    request = a_step("a", "accepted")

    class SubmitsAtTheEnd(FakeExecutor):
        @asynccontextmanager
        async def open(self) -> AsyncIterator[None]:
            async with super().open():
                try:
                    yield
                finally:
                    portal.submit(request)

    async with hosted(SubmitsAtTheEnd()) as (host, portal):
        host.scope.cancel()
        await host.ended.wait()
        await wait_all_tasks_blocked()
    assert isinstance(failure(request), EngineStoppedError)


async def test_an_error_in_the_body_aborts(autojump_clock: MockClock) -> None:
    """Leaving ``open_engine`` by an exception lets the current stage end and fails the rest."""
    executor = FakeExecutor(step_cost=1)
    asked = [a_step("a", "1"), a_step("a", "2")]
    with pytest.RaisesGroup(DeviceError):
        async with open_engine(executor) as (_, portal):
            for request in asked:
                portal.submit(request)
            await trio.sleep(0.5)
            raise DeviceError

    assert asked[0].future.result(0) == "1"
    assert isinstance(failure(asked[1]), EngineStoppedError)


async def test_a_drop_passes_the_door_and_outlives_the_engine(autojump_clock: MockClock) -> None:
    """A clean-up needs no credit and gives none back; once the engine is gone it does nothing."""
    executor = FakeExecutor(step_cost=1)
    async with open_engine(executor, max_queued_tokens=BASE_WEIGHT) as (engine, portal):
        portal.submit(a_step("a", "inside"))
        portal.drop(a_step("a", "dropped"))
        await trio.sleep(1.5)
        assert engine.statistics().credits == 0
    portal.drop(a_step("a", "too late"))
    await wait_all_tasks_blocked()

    assert order(executor) == ["inside", "dropped"]


# Sampling.


@pytest.mark.parametrize("after", [0, 1, 4.2])
async def test_a_sample_can_be_cancelled(autojump_clock: MockClock, after: float) -> None:
    """A cancelled sample fails before its next draw, whether it is queued, waits behind a pass or draws."""
    executor = FakeExecutor(token_cost=1, draw_cost=0.5, draws=100)
    async with open_engine(executor) as (_, portal):
        portal.submit(a_pass("a", "pass", 3))
        future = portal.submit(a_sample("sample"))
        await trio.sleep(after)
        assert future.cancel()
        with pytest.raises(RequestCancelledError):
            await future
        assert trio.current_time() <= max(3, after + 0.5)
        assert not future.cancel()


async def test_a_cancelled_sample_leaves_the_others(autojump_clock: MockClock) -> None:
    """Those drawn beside it go on."""
    executor = FakeExecutor(draw_cost=1, draws=4)
    async with open_engine(executor) as (_, portal):
        gone, stays = portal.submit(a_sample("gone")), portal.submit(a_sample("stays"))
        await trio.sleep(1.5)
        gone.cancel()
        assert await stays == "stays"
        assert trio.current_time() == 4


async def test_training_can_not_be_cancelled(autojump_clock: MockClock) -> None:
    """``cancel`` of a pass or a step says no, and it runs."""
    async with open_engine(FakeExecutor(step_cost=1)) as (_, portal):
        futures = [portal.submit(a_pass("a", "fb")), portal.submit(a_step("a", "opt"))]
        assert [future.cancel() for future in futures] == [False, False]
        assert [await future for future in futures] == ["fb", "opt"]


async def test_samples_alone_are_drawn_without_a_pause(autojump_clock: MockClock) -> None:
    """Without training, decoding is all that the device does."""
    executor = FakeExecutor(draw_cost=0.25, draws=40)
    async with open_engine(executor) as (_, portal):
        await portal.submit(a_sample("sample"))
        assert trio.current_time() == 10


async def test_training_and_decoding_get_equal_shares(autojump_clock: MockClock) -> None:
    """While both have work, a turn of decoding as long as the cycle before it follows each cycle."""
    executor = FakeExecutor(token_cost=1, draw_cost=0.25, draws=64)
    async with open_engine(executor) as (_, portal):
        sample = portal.submit(a_sample("sample"))
        for number in range(8):
            await portal.submit(a_pass("a", f"fb {number}", 2))
        assert await sample == "sample"
        assert trio.current_time() == 8 * 2 + 64 * 0.25

    turns = groupby(executor.ran, key=lambda ran: bool(ran.stage.decode))
    spans = [(decoding, sum(ran.ended - ran.begun for ran in group)) for decoding, group in turns]
    assert spans == [(False, 2), (True, 2)] * 8
    assert max(ran.stage.decode for ran in executor.ran) == DECODE_TURN


async def test_a_new_sample_joins_at_the_next_draw(autojump_clock: MockClock) -> None:
    """A sample that arrives in a long turn of decoding ends the turn and is drawn beside the others."""
    executor = FakeExecutor(token_cost=1, draw_cost=0.5, draws=20)
    async with open_engine(executor) as (_, portal):
        portal.submit(a_sample("first"))
        await portal.submit(a_pass("a", "long", 8))
        await trio.sleep(1.25)
        await portal.submit(a_sample("second"))
        assert trio.current_time() == 8 + 1.5 + 20 * 0.5


async def test_training_begins_beside_endless_samples(autojump_clock: MockClock) -> None:
    """A pass that arrives while samples are drawn waits for one turn of decoding at most."""
    executor = FakeExecutor(draw_cost=0.01, draws=10**6)
    async with open_engine(executor) as (_, portal):
        sample = portal.submit(a_sample("endless"))
        await trio.sleep(3)
        await portal.submit(a_pass("a", "fb"))
        assert trio.current_time() <= 3 + DECODE_SLICE + 0.01
        sample.cancel()


async def test_a_sample_follows_the_steps_of_its_lane(autojump_clock: MockClock) -> None:
    """Weights are opened by a step of the same lane, so the sample is admitted in a later stage."""
    executor = FakeExecutor()
    async with open_engine(executor) as (_, portal):
        portal.submit(a_step("sampler", "open"))
        portal.submit(a_sample("sample"))

    stages = [ran.stage for ran in executor.ran]
    assert [request.payload for request in stages[0].steps] == ["open"]
    assert [request.payload for request in stages[1].samples] == ["sample"]
    assert not stages[0].samples


# Calls.


async def test_a_call_runs_in_a_worker_thread() -> None:
    """A call's function leaves the engine's thread free, and its value is the result."""
    async with open_engine(FakeExecutor()) as (engine, portal):
        thread = await portal.submit(Request("call", "", threading.get_ident)).result_async(GUARD)
        assert thread != threading.get_ident()
        assert engine.statistics().cycles == 0


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (CheckpointError("unknown"), CheckpointError),
        (OSError("full"), RequestFailedError),
        (DeviceError("bug"), RequestFailedError),
    ],
)
async def test_an_error_of_a_call_is_its_own(raised: Exception, expected: type[RequestFailedError]) -> None:
    """Whatever a call raises is told by its future, and the engine lives on."""

    def act() -> None:
        raise raised

    async with open_engine(FakeExecutor()) as (_, portal):
        with pytest.raises(expected, match=str(raised)) as caught:
            await portal.submit(Request("call", "", act)).result_async(GUARD)
        assert raised in causes(caught.value)
        assert await portal.submit(a_step("a", "opt")).result_async(GUARD) == "opt"


async def test_leaving_waits_for_calls() -> None:
    """A call that was accepted is finished when the engine has ended."""
    entered, go = threading.Event(), threading.Event()

    def act() -> str:
        entered.set()
        assert go.wait(GUARD)
        return "done"

    async with open_engine(FakeExecutor()) as (_, portal):
        future = portal.submit(Request("call", "", act))
        await trio.to_thread.run_sync(entered.wait, GUARD)
        portal.close()
        await wait_all_tasks_blocked()
        go.set()

    assert future.result(0) == "done"


# What it tells.


async def test_statistics(autojump_clock: MockClock) -> None:
    """The counters say what was run, how busy the device was and which cycles a lane missed."""
    executor = FakeExecutor(token_cost=1, step_cost=2)
    async with open_engine(executor, max_tokens_per_pass=4, max_queued_tokens=10**6) as (engine, portal):
        assert engine.statistics() == nothing_yet(10**6)
        await trio.sleep(3)
        portal.submit(a_pass("a", "a1", 3, 3))
        portal.submit(a_step("a", "a2"))
        await trio.sleep(1)
        portal.submit(a_pass("b", "b1", 4))
        last = portal.submit(a_pass("b", "b2", 1))
        await trio.sleep(1)
        during = engine.statistics()
        await last
        await portal.submit(a_step("a", "a3"))
        after = engine.statistics()

    assert (during.queued, during.peak_queued, during.credits) == (4, 4, 6 + 4 + 1 + 4 * BASE_WEIGHT)
    assert (during.cycles, during.requests, during.busy) == (1, 0, 0)
    assert (after.cycles, after.passes, after.tokens, after.requests) == (3, 4, 11, 5)
    assert after.busy == 6 + 2 + 5 + 2
    assert after.uptime == trio.current_time()
    assert (after.queued, after.credits, after.waiting) == (0, 0, 0)
    assert after.peak_queued == 4
    assert after.lanes == {
        "a": LaneStatistics(cycles=3, missed=0, requests=3, tokens=6, waited=0 + 3 + 0, device=3 + 5 + 2),
        "b": LaneStatistics(cycles=1, missed=1, requests=2, tokens=5, waited=7 + 11, device=5),
    }


def nothing_yet(limit: int) -> EngineStatistics:
    """Statistics of an engine that has just started."""
    return EngineStatistics(0, 0, 0, 0, 0.0, 0.0, 0, 0, 0, limit, 0, {})


def test_an_engine_that_never_ran_has_statistics() -> None:
    """They are all zero."""
    assert Engine(FakeExecutor(), max_queued_tokens=10).statistics() == nothing_yet(10)


async def test_results_report_their_cycle(autojump_clock: MockClock) -> None:
    """The executor is told the number of the cycle, counted from 1, for passes, steps and decoding."""
    executor = FakeExecutor(step_cost=1, draws=2)
    async with open_engine(executor) as (_, portal):
        await portal.submit(a_step("a", "1"))
        await portal.submit(a_step("a", "2"))
        await portal.submit(a_sample("3"))

    assert [ran.cycle for ran in executor.ran] == [1, 2, 3, 3]


# Manners.


async def test_public_waits_are_checkpoints(autojump_clock: MockClock) -> None:
    """Every public async function yields and can be cancelled, also when there is nothing to wait for."""
    executor = FakeExecutor()
    async with open_engine(executor) as (_, portal):
        with assert_checkpoints():
            future = await portal.submit_async(a_step("a", "opt"))
        with assert_checkpoints():
            await future
        with assert_checkpoints():
            await future.coroutine()
        with assert_checkpoints():
            await executor.run(Stage(), 0)
        with assert_checkpoints():
            async with open_engine(FakeExecutor()):
                pass


async def test_run_is_a_checkpoint(autojump_clock: MockClock) -> None:
    """An engine that is closed as soon as it is up still yields."""

    class CloseAtOnce:
        def started(self, portal: Portal) -> None:
            portal.close()

    with assert_checkpoints():
        await Engine(FakeExecutor()).run(task_status=CloseAtOnce())


async def test_the_engines_own_thread_does_not_block() -> None:
    """``result()`` in the thread that hosts the engine raises, and may be called there again once it has ended."""
    async with open_engine(FakeExecutor()) as (_, portal):
        future = portal.submit(a_step("a", "opt"))
        with pytest.raises(WrongThreadError):
            future.result()
    assert future.result() == "opt"


async def test_engines_of_one_run_may_end_in_any_order() -> None:
    """When the first of two engines ends, the thread still hosts the other; when both have, it may block."""
    pending = a_step("a", "never").future
    async with trio.open_nursery() as nursery:
        first = await nursery.start(Engine(FakeExecutor()).run)
        second = await nursery.start(Engine(FakeExecutor()).run)
        first.close()
        await wait_all_tasks_blocked()
        with pytest.raises(WrongThreadError):
            pending.result(0)
        second.close()
    with pytest.raises(TimeoutError):
        pending.result(0)


async def test_the_fake_executor_runs_one_stage_at_a_time(autojump_clock: MockClock) -> None:
    """It tells an engine that does otherwise, and one that has not opened it."""
    executor = FakeExecutor(step_cost=1)
    with pytest.raises(RuntimeError, match="while it is open"):
        await executor.run(Stage(), 0)
    async with executor.open(), trio.open_nursery() as nursery:
        nursery.start_soon(executor.run, Stage(steps=(a_step("a", "1"),)), 0)
        await wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="one stage"):
            await executor.run(Stage(), 0)


class Gated(FakeExecutor):
    """A fake device whose stages wait until the gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = trio.Event()

    async def run(self, stage: Stage, cycle: int) -> list[Outcome]:
        await self.gate.wait()
        return await super().run(stage, cycle)


async def test_a_call_runs_beside_a_cycle_that_is_under_way() -> None:
    """A call does not wait for the cycle that keeps the device busy."""
    executor = Gated()
    async with open_engine(executor) as (_, portal):
        step = portal.submit(a_step("a", "long"))
        await wait_all_tasks_blocked()
        call = portal.submit(Request("call", "", lambda: "listed"))
        with trio.fail_after(GUARD):
            assert await call == "listed"
        assert not step.done()
        executor.gate.set()
