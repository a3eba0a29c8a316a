"""Tests of the engine in a thread of its own, and of the device's thread: with real threads and real time."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future as Reply
from contextlib import asynccontextmanager, contextmanager
from types import ModuleType
from typing import Any

import pytest
import trio

from conftest import GUARD, Ask, Caller
from tickwork.engine.engine import Engine
from tickwork.engine.plan import Stage
from tickwork.engine.portal import Portal
from tickwork.engine.request import BASE_WEIGHT, Outcome, Request
from tickwork.engine.thread import EngineThread
from tickwork.errors import ClosedError, EngineStoppedError, LossError, QueueFullError, WrongThreadError
from tickwork.executor import Executor, LocalExecutor
from tickwork.testing import FakeExecutor


class DeviceError(Exception):
    """What a device dies of."""


class Gated(FakeExecutor):
    """An executor whose stages wait until ``go`` is set."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.entered, self.go = threading.Event(), threading.Event()

    async def run(self, stage: Stage, cycle: int) -> list[Outcome]:
        """Wait, then run; shielded, as every executor's stages are."""
        with trio.CancelScope(shield=True):
            self.entered.set()
            await trio.to_thread.run_sync(self.go.wait, GUARD)
            return await super().run(stage, cycle)


class Endless(FakeExecutor):
    """An executor whose stages end when the engine is aborted."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()

    async def run(self, stage: Stage, cycle: int) -> list[Outcome]:
        """Wait for the abort, then run to the end as if nothing had been."""
        self.entered.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return await super().run(stage, cycle)


def a_pass(name: object, lane: str = "a") -> Request:
    return Request("pass", lane, name, (1,), tokens=1)


def a_step(name: object, lane: str = "a") -> Request:
    return Request("step", lane, name)


def order(executor: FakeExecutor) -> list[Any]:
    """Payloads of all passes and steps that were finished, in order."""
    done: list[Request] = []
    for ran in executor.ran:
        done += [piece.request for item in ran.stage.passes for piece in item.pieces if piece.last]
        done += ran.stage.steps
    return [request.payload for request in done]


def spawn(act: Callable[[], Any]) -> Reply[Any]:
    """Call a function in a new thread, which does not keep a failing test from ending."""
    reply: Reply[Any] = Reply()

    def main() -> None:
        try:
            reply.set_result(act())
        except BaseException as error:
            reply.set_exception(error)

    threading.Thread(target=main, daemon=True).start()
    return reply


def until(condition: Callable[[], bool]) -> None:
    """Spin until the condition holds."""
    deadline = time.monotonic() + GUARD
    while not condition():
        assert time.monotonic() < deadline


@contextmanager
def running(executor: Executor, **settings: Any) -> Iterator[tuple[EngineThread, Portal, Engine]]:
    """An engine in its thread, aborted at the end if the test has not ended it."""
    engine = Engine(executor, **settings)
    thread = EngineThread(engine)
    portal = spawn(thread.start).result(GUARD)
    try:
        yield thread, portal, engine
    finally:
        if isinstance(executor, Gated):
            executor.go.set()
        spawn(thread.abort).result(GUARD)


def engine_threads() -> list[threading.Thread]:
    """The engines' threads that live now."""
    return [thread for thread in threading.enumerate() if thread.name == "tickwork-engine"]


# Three kinds of callers.


def test_every_caller_gets_its_results(callers: Caller) -> None:
    """A plain thread, asyncio and Trio submit to an engine in another thread and wait for it."""
    executor = FakeExecutor(failures={"bad": LossError("no")})
    with running(executor) as (_, portal, _):

        async def script(ask: Ask) -> None:
            first = await ask.submit(portal.submit, a_pass("first"))
            assert await ask(portal.submit, a_step("second")) == "second"
            assert await ask.wait(first) == "first"
            with pytest.raises(LossError):
                await ask(portal.submit, a_pass("bad"))

        callers.run(script)

    assert order(executor) == ["first", "second", "bad"]


def test_every_caller_learns_that_the_engine_has_closed(callers: Caller) -> None:
    """A call after the end raises ``ClosedError``."""
    with running(FakeExecutor()) as (thread, portal, _):
        spawn(thread.close).result(GUARD)

        async def script(ask: Ask) -> None:
            with pytest.raises(ClosedError):
                await ask.submit(portal.submit, a_pass("late"))

        callers.run(script)


def test_every_caller_learns_that_the_engine_has_died(callers: Caller) -> None:
    """What was accepted, and calls after the end, fail with an error that the death is a cause of."""
    boom = DeviceError("gone")
    with running(FakeExecutor(failures={"fatal": boom})) as (_, portal, _):

        async def script(ask: Ask) -> list[BaseException]:
            future = await ask.submit(portal.submit, a_pass("fatal"))
            with pytest.raises(EngineStoppedError) as accepted:
                await ask.wait(future)
            with pytest.raises(EngineStoppedError) as late:
                await ask.submit(portal.submit, a_pass("late"))
            return [accepted.value, late.value]

        accepted, late = callers.run(script)
        assert accepted.__cause__.__cause__ is late.__cause__.__cause__ is boom


def test_a_time_out_leaves_the_request(callers: Caller) -> None:
    """The wait is over, the work completes, and the result may be awaited again."""
    executor = Gated()
    with running(executor) as (_, portal, _):

        async def script(ask: Ask) -> Any:
            future = await ask.submit(portal.submit, a_pass("slow"))
            with pytest.raises(TimeoutError):
                await ask.wait(future, 0.001)
            executor.go.set()
            return await ask.wait(future)

        assert callers.run(script) == "slow"


# The door, from threads.


def test_threads_of_one_lane_keep_their_order_and_lose_nothing() -> None:
    """Eight threads share a lane through a narrow door: each thread's requests run in its order, all of them once."""
    executor, begin = FakeExecutor(), threading.Barrier(8)

    def client(portal: Portal, me: int) -> list[Any]:
        begin.wait(GUARD)
        futures = [portal.submit(a_pass((me, number))) for number in range(100)]
        return [future.result(GUARD) for future in futures]

    with running(executor, max_queued_tokens=12 * BASE_WEIGHT) as (_, portal, engine):
        replies = [spawn(lambda me=me: client(portal, me)) for me in range(8)]
        for me, reply in enumerate(replies):
            assert reply.result(GUARD) == [(me, number) for number in range(100)]
        until(lambda: engine.statistics().credits == 0)
        assert engine.statistics().requests == 800

    ran = order(executor)
    assert len(ran) == 800
    for me in range(8):
        assert [number for who, number in ran if who == me] == list(range(100))


def test_threads_of_many_lanes_do_not_wait_for_each_other() -> None:
    """Passes of eight clients that arrive while the device is busy are one pass."""
    executor = Gated()
    with running(executor) as (thread, portal, engine):
        first = portal.submit(a_pass("first"))
        assert executor.entered.wait(GUARD)
        futures = [spawn(lambda n=n: portal.submit(a_pass(n, lane=str(n)))).result(GUARD) for n in range(8)]
        until(lambda: engine.statistics().queued == 8)
        executor.go.set()
        assert first.result(GUARD) == "first"
        assert [future.result(GUARD) for future in futures] == list(range(8))

    assert [len(ran.stage.passes) for ran in executor.ran] == [1, 1]


def test_a_full_queue_blocks_a_plain_thread_until_there_is_room() -> None:
    """The sync call waits in front of the door and is accepted when a result leaves."""
    executor = Gated()
    with running(executor, max_queued_tokens=BASE_WEIGHT) as (_, portal, engine):
        portal.submit(a_step("first"))
        blocked = spawn(lambda: portal.submit(a_step("second")))
        until(lambda: engine.statistics().waiting == 1)
        assert not blocked.done()
        executor.go.set()
        assert blocked.result(GUARD).result(GUARD) == "second"


@pytest.mark.parametrize("loop", [asyncio.run, lambda coroutine: trio.run(lambda: coroutine)], ids=["asyncio", "trio"])
def test_a_full_queue_refuses_to_block_a_loop(loop: Callable[[Any], Any]) -> None:
    """The sync call inside any event loop raises ``QueueFullError``; its request never existed."""
    executor = Gated()
    with running(executor, max_queued_tokens=BASE_WEIGHT) as (thread, portal, _):
        portal.submit(a_step("first"))

        async def script() -> None:
            with pytest.raises(QueueFullError):
                portal.submit(a_step("refused"))

        loop(script())
        executor.go.set()
        spawn(thread.close).result(GUARD)

    assert order(executor) == ["first"]


def test_cancelling_an_asyncio_caller_at_the_door() -> None:
    """A task that is cancelled while it waits for credit leaves the line; its request never existed."""
    executor = Gated()
    with running(executor, max_queued_tokens=BASE_WEIGHT) as (thread, portal, engine):
        portal.submit(a_step("first"))

        async def script() -> None:
            async with asyncio.timeout(GUARD):
                task = asyncio.create_task(portal.submit_async(a_step("never")))
                while engine.statistics().waiting == 0:
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(script())
        assert engine.statistics().waiting == 0
        executor.go.set()
        spawn(thread.close).result(GUARD)

    assert order(executor) == ["first"]


def test_blocked_callers_learn_that_the_engine_closes() -> None:
    """A thread in front of the door is not left there: ``close`` frees it at once with ``ClosedError``."""
    executor = Gated()
    with running(executor, max_queued_tokens=BASE_WEIGHT) as (thread, portal, engine):
        inside = portal.submit(a_step("inside"))
        blocked = spawn(lambda: portal.submit(a_step("never")))
        until(lambda: engine.statistics().waiting == 1)
        closing = spawn(thread.close)
        assert isinstance(blocked.exception(GUARD), ClosedError)
        assert not inside.done()
        executor.go.set()
        closing.result(GUARD)
        assert inside.result(0) == "inside"


def test_blocked_callers_learn_that_the_engine_has_died() -> None:
    """A thread in front of the door is freed with ``EngineStoppedError`` when the device dies."""
    executor = Gated(failures={"fatal": DeviceError("gone")})
    with running(executor, max_queued_tokens=BASE_WEIGHT) as (_, portal, engine):
        portal.submit(a_step("fatal"))
        blocked = spawn(lambda: portal.submit(a_step("never")))
        until(lambda: engine.statistics().waiting == 1)
        executor.go.set()
        assert isinstance(blocked.exception(GUARD), EngineStoppedError)


# Start and end.


def test_starting_again_is_refused_and_the_end_joins() -> None:
    """One engine thread is one engine: after ``close`` its thread is gone."""
    before = engine_threads()
    with running(FakeExecutor()) as (thread, _, _):
        assert len(engine_threads()) == len(before) + 1
        with pytest.raises(RuntimeError):
            thread.start()
        spawn(thread.close).result(GUARD)
        assert engine_threads() == before


def test_closing_drains() -> None:
    """``close`` returns when all that was accepted has run."""
    executor = Gated()
    with running(executor) as (thread, portal, _):
        futures = [portal.submit(request) for request in (a_pass(1), a_step(2), a_pass(3))]
        portal.close()
        with pytest.raises(ClosedError):
            portal.submit(a_pass(4))
        closing = spawn(thread.close)
        assert not closing.done()
        executor.go.set()
        closing.result(GUARD)
        assert [future.result(0) for future in futures] == [1, 2, 3]


def test_ending_twice_is_no_error() -> None:
    """``close`` and ``abort`` of an engine that has ended return at once, in any order."""
    with running(FakeExecutor()) as (thread, portal, _):
        future = portal.submit(a_step("opt"))
        for end in (thread.close, thread.abort, thread.close, thread.abort):
            spawn(end).result(GUARD)
        assert future.result(0) == "opt"


def test_aborting_from_another_thread() -> None:
    """A thread that waits for a planned request is freed; the running stage counts, the rest has failed."""
    executor = Endless()
    with running(executor) as (thread, portal, _):
        running_one, planned = portal.submit(a_step("running")), portal.submit(a_step("planned"))
        waiting = spawn(planned.result)
        assert executor.entered.wait(GUARD)
        spawn(thread.abort).result(GUARD)
        with pytest.raises(EngineStoppedError, match="aborted"):
            waiting.result(GUARD)
        assert running_one.result(0) == "running"
        with pytest.raises(EngineStoppedError):
            portal.submit(a_step("late"))

    assert order(executor) == ["running"]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="the platform sends no signals to threads")
def test_ctrl_c_interrupts_a_blocked_wait() -> None:
    """Ctrl-C ends the main thread's wait, the engine lives on, and an abort then ends it."""
    executor = Endless()
    request = a_step("running")

    def interrupt() -> None:
        assert executor.entered.wait(GUARD)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with running(executor) as (thread, portal, _):
        spawn(interrupt)
        with pytest.raises(KeyboardInterrupt):
            portal.submit(request).result(GUARD)
        assert not request.future.done()
        spawn(thread.abort).result(GUARD)
        assert request.future.result(0) == "running"


def test_closing_raises_what_the_engine_died_of() -> None:
    """The very exception, every time; aborting is silent."""
    boom = DeviceError("gone")
    with running(FakeExecutor(failures={"fatal": boom})) as (thread, portal, _):
        future = portal.submit(a_step("fatal"))
        for _ in range(2):
            assert spawn(thread.close).exception(GUARD) is boom
        with pytest.raises(EngineStoppedError):
            future.result(0)
        assert spawn(thread.abort).exception(GUARD) is None


class Broken(FakeExecutor):
    """An executor that can not be opened."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Raise the error."""
        raise self.error
        yield


def test_an_engine_that_can_not_start_says_why() -> None:
    """``start`` and ``close`` raise what opening the executor raised; ``abort`` does not hang."""
    boom = DeviceError("no device")
    thread = EngineThread(Engine(Broken(boom)))

    assert spawn(thread.start).exception(GUARD) is boom
    assert spawn(thread.close).exception(GUARD) is boom
    spawn(thread.abort).result(GUARD)


def test_aborting_while_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort that comes before the engine is up waits for that, and then ends it."""
    thread = EngineThread(Engine(FakeExecutor()))
    entered, go, run = threading.Event(), threading.Event(), trio.run

    def run_late(*args: Any) -> Any:
        entered.set()
        assert go.wait(GUARD)
        return run(*args)

    monkeypatch.setattr(trio, "run", run_late)
    starting = spawn(thread.start)
    assert entered.wait(GUARD)
    aborting = spawn(thread.abort)
    with pytest.raises(TimeoutError):
        aborting.result(0.01)
    go.set()

    aborting.result(GUARD)
    with pytest.raises(EngineStoppedError):
        starting.result(GUARD).submit(a_step("late"))


# Threads that must keep running.


def test_the_engines_thread_refuses_to_wait_for_itself() -> None:
    """A callback in the engine's thread may submit; ``result()`` there raises, a full queue is refused."""
    executor = Gated()
    told: Reply[list[type]] = Reply()

    def attempt(act: Callable[[], Any]) -> type:
        try:
            return type(act())
        except Exception as error:
            return type(error)

    with running(executor, max_queued_tokens=2 * BASE_WEIGHT) as (thread, portal, _):
        first, second = portal.submit(a_step("first")), portal.submit(a_step("second"))

        def callback(_: object) -> None:
            acts = [second.result, first.result, lambda: portal.submit(a_step("3")), lambda: portal.submit(a_step("4"))]
            told.set_result([attempt(act) for act in acts])

        first.add_done_callback(callback)
        executor.go.set()
        assert told.result(GUARD) == [WrongThreadError, str, type(first), QueueFullError]
        spawn(thread.close).result(GUARD)

    assert order(executor) == ["first", "second", "3"]


# The device's thread.


class FakeDevice:
    """What ``LocalExecutor`` drives, without torch: calls the payloads of steps; a sample alone is never finished."""

    max_tokens = 32

    def __init__(self, *settings: object, **options: object) -> None:
        self.samples: list[Request] = []

    @property
    def sampling(self) -> bool:
        """Whether there are samples."""
        return bool(self.samples)

    def run(self, stage: Stage, cycle: int, nudged: Callable[[], bool]) -> list[Outcome]:
        """Call the steps, take the samples in, decode: until nudged, or, where there are several, to their end."""
        self.samples += stage.samples
        outcomes = [Outcome(request, value=request.payload()) for request in stage.steps]
        if stage.decode and len(self.samples) == 1:
            self.samples[0].payload.set()
            until(nudged)
        elif stage.decode:
            outcomes += [Outcome(request, value="drawn") for request in self.samples]
            self.samples.clear()
        return outcomes


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> LocalExecutor:
    """A ``LocalExecutor`` with a fake device."""
    module = ModuleType("tickwork.compute.stage")
    module.Device = FakeDevice  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return LocalExecutor(None, "cpu", None, 16)  # type: ignore[arg-type]


def test_one_thread_owns_the_device(local: LocalExecutor) -> None:
    """All stages run in the same thread, which is neither the caller's nor the engine's, and ends with the engine."""
    with running(local) as (thread, portal, _):
        seen = {portal.submit(a_step(threading.current_thread)).result(GUARD) for _ in range(5)}
        [device] = seen
        assert device.name == "tickwork-device"
        spawn(thread.close).result(GUARD)
        device.join(GUARD)
        assert not device.is_alive()


def test_the_devices_thread_refuses_to_wait(local: LocalExecutor) -> None:
    """Inside a stage ``result()`` of a pending future raises ``WrongThreadError``, a full queue ``QueueFullError``."""
    pending = a_step("never").future

    def act() -> str:
        with pytest.raises(WrongThreadError):
            pending.result()
        with pytest.raises(QueueFullError):
            portal.submit(a_step("refused"))
        return "refused both"

    with running(local, max_queued_tokens=BASE_WEIGHT) as (_, portal, _):
        assert portal.submit(a_step(act)).result(GUARD) == "refused both"


def test_an_error_of_the_device_stops_the_engine(local: LocalExecutor) -> None:
    """An exception that is no outcome leaves the stage, fails the request and is what ``close`` raises."""
    boom = DeviceError("gone")

    def act() -> None:
        raise boom

    with running(local) as (thread, portal, _):
        with pytest.raises(EngineStoppedError, match="gone"):
            portal.submit(a_step(act)).result(GUARD)
        assert spawn(thread.close).exception(GUARD) is boom


async def test_an_abort_lets_the_devices_job_end(local: LocalExecutor) -> None:
    """The stage that runs in the device's thread is waited for, its result counts, the next does not begin."""
    entered, go = threading.Event(), threading.Event()

    def act() -> str:
        entered.set()
        assert go.wait(GUARD)
        return "done"

    async with trio.open_nursery() as nursery:
        portal = await nursery.start(Engine(local).run)
        first, second = portal.submit(a_step(act)), portal.submit(a_step(lambda: "never"))
        await trio.to_thread.run_sync(entered.wait, GUARD)
        nursery.cancel_scope.cancel()
        assert not first.done()
        go.set()

    assert first.result(0) == "done"
    with pytest.raises(EngineStoppedError):
        second.result(0)


def test_a_new_sample_nudges_the_device(local: LocalExecutor) -> None:
    """A sample that arrives while another is drawn ends the device's turn of decoding and joins it."""
    with running(local) as (_, portal, _):
        drawing = threading.Event()
        first = portal.submit(Request("sample", "s", drawing))
        assert drawing.wait(GUARD)
        second = portal.submit(Request("sample", "s", drawing))
        assert first.result(GUARD) == second.result(GUARD) == "drawn"
