"""Tests of the queue."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tickwork.engine.queue import Queue
from tickwork.engine.request import Request
from tickwork.errors import ClosedError


def request(tokens: int = 0) -> Request:
    return Request("pass", "a", None, (tokens,), tokens=tokens)


async def test_drain_hands_over_everything_in_order_of_arrival() -> None:
    """What was posted comes out once, first come first, and the queue is empty after."""
    queue, posted = Queue(), [request(tokens) for tokens in (3, 1, 2)]
    for each in posted:
        queue.post(each)

    assert queue.tokens == 6
    assert queue.drain() == posted
    assert (queue.drain(), queue.tokens) == ([], 0)


async def test_a_closed_queue_keeps_what_is_pending_and_takes_nothing_more() -> None:
    """A late request's future fails; nothing is raised, since that would end the engine's run."""
    queue, early, late = Queue(), request(), request()
    queue.post(early)
    queue.close()
    queue.post(late)

    assert queue.drain() == [early]
    assert not early.future.done()
    with pytest.raises(ClosedError):
        late.future.result(0)


async def test_arrivals_are_stamped_and_told(autojump_clock: MockClock) -> None:
    """A request knows when it arrived, and ``arrived`` hears of each that was taken in."""
    told: list[Request] = []
    queue, first, second = Queue(told.append), request(), request()
    begun = trio.current_time()
    queue.post(first)
    await trio.sleep(3)
    queue.post(second)
    queue.close()
    queue.post(request())

    assert told == [first, second]
    assert (first.received, second.received) == (begun, begun + 3)


async def test_wait_asks_again_after_each_change() -> None:
    """A waiter wakes when a post makes its condition true, not before."""
    queue = Queue()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.wait, lambda: queue.tokens >= 3)
        queue.post(request(2))
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        queue.post(request(1))
        await wait_all_tasks_blocked()
        assert not nursery.child_tasks


async def test_closing_wakes_those_who_wait_for_it() -> None:
    """A close is a change."""
    queue = Queue()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.wait, lambda: queue.closed)
        await wait_all_tasks_blocked()
        queue.close()
        with trio.fail_after(1):
            await wait_all_tasks_blocked()
        assert not nursery.child_tasks


async def test_repr_tells_the_state() -> None:
    """The repr shows how much is pending, and whether more may come."""
    queue = Queue()
    queue.post(request(5))
    assert repr(queue) == "<Queue 1 requests, 5 tokens>"
    queue.close()
    assert repr(queue) == "<Queue 1 requests, 5 tokens, closed>"
