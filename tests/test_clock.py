"""Tests of the clock: when a window of arrivals becomes a cycle."""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tickwork.engine.clock import Clock
from tickwork.engine.queue import Queue
from tickwork.engine.request import Request


def request(tokens: int = 1) -> Request:
    return Request("pass", "a", None, (tokens,), tokens=tokens)


async def closing_time(clock: Clock, queue: Queue) -> float:
    """Seconds until the clock's window closes."""
    begun = trio.current_time()
    await clock.wait(queue)
    return trio.current_time() - begun


async def test_an_idle_clock_sets_no_timer(autojump_clock: MockClock) -> None:
    """While nothing arrives, nothing is due, and Trio has no deadline to wake up for."""
    queue, clock = Queue(), Clock(period=5.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.wait, queue)
        await wait_all_tasks_blocked()
        assert not clock.due(queue)
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
        nursery.cancel_scope.cancel()


async def test_period_zero_starts_at_once(autojump_clock: MockClock) -> None:
    """Without a period the first arrival closes its own window."""
    queue, clock = Queue(), Clock()
    queue.post(request())

    assert clock.due(queue)
    assert await closing_time(clock, queue) == 0


async def test_a_window_closes_a_period_after_its_first_arrival(autojump_clock: MockClock) -> None:
    """Later arrivals join the window and do not prolong it."""
    queue, clock = Queue(), Clock(period=5.0)

    async def arrive() -> None:
        for _ in range(4):
            await trio.sleep(2)
            queue.post(request())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(arrive)
        assert await closing_time(clock, queue) == 2 + 5
        assert clock.due(queue)
        assert len(queue.drain()) == 3


async def test_a_full_window_closes_at_once(autojump_clock: MockClock) -> None:
    """A window that reaches the token budget does not wait for its period."""
    queue, clock = Queue(), Clock(period=60.0, tokens=lambda: 10)

    async def arrive() -> None:
        for _ in range(4):
            await trio.sleep(1)
            queue.post(request(4))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(arrive)
        assert await closing_time(clock, queue) == 3
        assert queue.tokens == 12
        nursery.cancel_scope.cancel()


async def test_a_closed_queue_is_due_at_once(autojump_clock: MockClock) -> None:
    """Nobody else can join, so the period is cut short."""
    queue, clock = Queue(), Clock(period=60.0)

    async def close() -> None:
        await trio.sleep(1)
        queue.close()

    queue.post(request())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        assert await closing_time(clock, queue) == 1
    assert clock.due(queue)


async def test_a_closed_and_empty_queue_ends_the_wait_with_nothing_due(autojump_clock: MockClock) -> None:
    """The engine learns that there will be no further cycle."""
    queue, clock = Queue(), Clock(period=60.0)
    queue.close()

    assert await closing_time(clock, queue) == 0
    assert not clock.due(queue)


async def test_a_window_that_opened_while_busy_counts_from_its_arrival(autojump_clock: MockClock) -> None:
    """What waited out its period while the executor was busy is due as soon as the executor is free."""
    queue, clock = Queue(), Clock(period=5.0)
    queue.post(request())
    await trio.sleep(3)
    assert not clock.due(queue)
    await trio.sleep(4)

    assert clock.due(queue)
    assert await closing_time(clock, queue) == 0


async def test_cancelling_the_wait_loses_nothing(autojump_clock: MockClock) -> None:
    """A cancelled wait leaves the window as it was; the next wait ends when the first would have."""
    queue, clock = Queue(), Clock(period=5.0)
    queue.post(request())
    with trio.move_on_after(2):
        await clock.wait(queue)

    assert len(queue.pending) == 1
    assert await closing_time(clock, queue) == 3
