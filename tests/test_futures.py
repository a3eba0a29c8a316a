"""Tests of ``Future``: one result, three ways to wait for it."""

from __future__ import annotations

import asyncio
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from conftest import GUARD, Ask, Caller
from tickwork.errors import InvalidRequestError, LossError, RequestErrorCategory, RequestFailedError, WrongThreadError
from tickwork.futures import Future, in_event_loop, must_run, no_blocking


def settled(value: Any = None) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def depth(error: BaseException) -> int:
    """Frames in an error's traceback."""
    trace, count = error.__traceback__, 0
    while trace is not None:
        trace, count = trace.tb_next, count + 1
    return count


# Three ways to wait.


def test_a_result_is_there_for_every_caller(callers: Caller) -> None:
    """A waiting caller gets what another thread settles the future with."""
    future: Future[int] = Future()

    async def script(ask: Ask) -> Any:
        threading.Thread(target=future.set_result, args=[7]).start()
        return await ask.wait(future)

    assert callers.run(script) == 7


def test_a_result_may_be_awaited_again(callers: Caller) -> None:
    """Waiting does not use the result up."""
    future = settled("once")

    async def script(ask: Ask) -> Any:
        return [await ask.wait(future) for _ in range(3)]

    assert callers.run(script) == ["once"] * 3


def test_a_time_out_ends_the_wait_alone(callers: Caller) -> None:
    """After ``TimeoutError`` the future is still pending, and its result may be awaited later."""
    future: Future[int] = Future()

    async def script(ask: Ask) -> Any:
        with pytest.raises(TimeoutError):
            await ask.wait(future, 0.001)
        assert not future.done()
        future.set_result(7)
        return await ask.wait(future)

    assert callers.run(script) == 7


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_settled_future_needs_no_time(callers: Caller, timeout: float) -> None:
    """With no time left a wait still returns what is there, and raises ``TimeoutError`` if nothing is."""

    async def script(ask: Ask) -> Any:
        with pytest.raises(TimeoutError):
            await ask.wait(Future(), timeout)
        return await ask.wait(settled(7), timeout)

    assert callers.run(script) == 7


def test_each_wait_raises_an_error_of_its_own(callers: Caller) -> None:
    """The error is a fresh copy caused by the original, so that tracebacks of several waits do not mix."""
    original = InvalidRequestError("too long", field="model_input", datum=3)
    future: Future[None] = Future.failed(original)

    async def script(ask: Ask) -> list[InvalidRequestError]:
        return [await failure(ask) for _ in range(3)]

    async def failure(ask: Ask) -> InvalidRequestError:
        with pytest.raises(InvalidRequestError, match=r"data\[3\]\.model_input: too long") as caught:
            await ask.wait(future)
        return caught.value

    raised = callers.run(script)

    assert len({id(error) for error in [original, *raised]}) == 4
    for error in raised:
        assert error.__cause__ is original
        assert (error.field, error.datum, error.category) == ("model_input", 3, RequestErrorCategory.USER)


def test_waiting_leaves_no_trace_on_the_original_error(callers: Caller) -> None:
    """However many waits fail with it, the stored error keeps no frames of its waiters alive."""
    original = LossError("the loss raised")
    future: Future[None] = Future.failed(original)

    async def script(ask: Ask) -> None:
        for _ in range(3):
            with pytest.raises(LossError):
                await ask.wait(future)

    callers.run(script)

    assert depth(original) == 0


def test_await_is_result_async() -> None:
    """``await future``, ``result_async`` and ``coroutine`` are the same wait, under either loop."""

    async def script() -> list[int]:
        future = settled(7)
        return [await future, await future.result_async(), await future.coroutine()]

    assert asyncio.run(script()) == trio.run(script) == [7, 7, 7]


def test_many_kinds_of_waiters_share_a_result() -> None:
    """A thread, an asyncio loop and a Trio run that wait for one future all get its result."""
    future: Future[object] = Future()
    begun = threading.Barrier(4)
    value = object()

    async def script() -> object:
        begun.wait(GUARD)
        return await future.result_async(GUARD)

    def block() -> object:
        begun.wait(GUARD)
        return future.result(GUARD)

    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(block), pool.submit(lambda: asyncio.run(script())), pool.submit(lambda: trio.run(script))]
        begun.wait(GUARD)
        future.set_result(value)
        assert [wait.result(GUARD) for wait in waits] == [value] * 3


# Cancelling a wait.


def test_cancelling_one_asyncio_waiter_leaves_the_result_for_others() -> None:
    """A cancelled task ends its own wait; the future settles and another task gets the result."""
    future: Future[int] = Future()

    async def main() -> int:
        async with asyncio.timeout(GUARD):
            waiters = [asyncio.create_task(future.coroutine()) for _ in range(2)]
            await asyncio.sleep(0)
            waiters[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiters[0]
            assert not future.done()
            future.set_result(7)
            return await waiters[1]

    assert asyncio.run(main()) == 7
    assert future.result() == 7


def test_cancelling_a_wrapped_inner_future_leaves_the_result() -> None:
    """``asyncio.wrap_future(future.future())`` may be cancelled without touching the shared result."""
    future: Future[int] = Future()

    async def main() -> None:
        wrapped = asyncio.wrap_future(future.future())
        wrapped.cancel()
        await asyncio.sleep(0)

    asyncio.run(main())
    assert not future.future().cancel()
    future.set_result(7)
    assert future.result() == 7


async def test_cancelling_a_trio_waiter_leaves_the_result(autojump_clock: MockClock) -> None:
    """A cancelled wait is over; the future settles later all the same."""
    future: Future[int] = Future()
    with trio.move_on_after(1) as scope:
        await future
    assert scope.cancelled_caught
    future.set_result(7)

    assert await future == 7


async def test_a_time_out_under_trio_is_exact(autojump_clock: MockClock) -> None:
    """The wait ends when its time is up, not earlier and not later."""
    begun = trio.current_time()
    with pytest.raises(TimeoutError):
        await Future[int]().result_async(2.5)

    assert trio.current_time() == begun + 2.5


def test_a_result_for_a_loop_that_has_ended_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Settling a future whose asyncio and Trio waiters are gone with their loops harms nobody."""
    future: Future[int] = Future()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await future.result_async(0)

    asyncio.run(give_up())
    trio.run(give_up)
    future.set_result(7)

    assert future.result() == 7
    assert not caplog.records


async def test_waiting_is_a_checkpoint() -> None:
    """A wait under Trio yields and can be cancelled, also when the result or an error is already there."""
    with assert_checkpoints():
        assert await settled(7) == 7
    with assert_checkpoints(), pytest.raises(LossError):
        await Future.failed(LossError("no"))


async def test_the_waiter_wakes_when_the_future_settles() -> None:
    """A Trio task that waits is asleep until then."""
    future: Future[int] = Future()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(future.coroutine)
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        future.set_result(7)
        with trio.fail_after(GUARD):
            while nursery.child_tasks:
                await trio.lowlevel.checkpoint()


# Threads that must keep running.


def test_a_thread_that_must_run_does_not_block() -> None:
    """``result()`` raises ``WrongThreadError`` there instead of waiting for ever; a settled future is fine."""
    with no_blocking():
        with pytest.raises(WrongThreadError, match="await the future"):
            Future[int]().result()
        assert settled(7).result() == 7
    with pytest.raises(TimeoutError):
        Future[int]().result(0)


def test_must_run_is_a_matter_of_the_thread() -> None:
    """Marking one thread does not mark another."""
    with no_blocking(), ThreadPoolExecutor(1) as pool:
        assert must_run()
        assert pool.submit(must_run).result(GUARD) is False


def test_must_run_ends_with_the_last_mark() -> None:
    """Two engines of one thread may end in either order; the thread may block again when both have."""
    first, second = no_blocking(), no_blocking()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert must_run()
    second.__exit__(None, None, None)
    assert not must_run()


def test_in_event_loop_knows_both_loops() -> None:
    """True inside asyncio and Trio, false in a plain thread."""

    async def inside() -> bool:
        return in_event_loop()

    assert (in_event_loop(), asyncio.run(inside()), trio.run(inside)) == (False, True, True)


# What else a future does.


def test_cancel_asks_whoever_runs_the_request() -> None:
    """``cancel`` says whether the request will be abandoned; the default, and a settled future, say no."""
    asked: list[bool] = []
    future: Future[int] = Future(on_cancel=lambda: asked.append(True) or True)
    assert future.cancel()
    future.set_result(7)

    assert not future.cancel()
    assert asked == [True]
    assert not Future[int]().cancel()


def test_then_changes_the_result() -> None:
    """``then`` is a future of the changed value; an error of the change, or of the first future, is its error."""
    future: Future[int] = Future(on_cancel=lambda: True)
    doubled, broken = future.then(lambda value: value * 2), future.then(lambda value: value // 0)
    assert doubled.cancel()
    assert not doubled.done()
    future.set_result(21)

    assert doubled.result(0) == 42
    with pytest.raises(ZeroDivisionError):
        broken.result(0)
    original = LossError("no")
    with pytest.raises(LossError) as caught:
        Future.failed(original).then(repr).result(0)
    assert caught.value.__cause__ is original


def test_a_done_callback_is_called_once() -> None:
    """A callback runs in the settling thread, or at once if there is a result already."""
    future: Future[int] = Future()
    seen: list[tuple[Future[int], int]] = []
    future.add_done_callback(lambda done: seen.append((done, threading.get_ident())))
    assert seen == []
    thread = threading.Thread(target=future.set_result, args=[7])
    thread.start()
    thread.join(GUARD)
    future.add_done_callback(lambda done: seen.append((done, 0)))

    assert seen == [(future, thread.ident), (future, 0)]


def test_repr_tells_the_state() -> None:
    """The repr shows whether a result is there."""
    assert repr(Future()) == "<Future pending>"
    assert repr(settled()) == "<Future done>"


def test_errors_survive_pickling() -> None:
    """An error keeps its type, text and fields in another process."""
    error = pickle.loads(pickle.dumps(InvalidRequestError("too long", field="data", datum=2)))

    assert isinstance(error, InvalidRequestError)
    assert (str(error), error.field, error.datum) == ("data[2].data: too long", "data", 2)
    assert str(pickle.loads(pickle.dumps(RequestFailedError("no")))) == "no"
