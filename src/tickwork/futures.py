"""``Future``: one result, three ways to wait for it: from a thread, under asyncio, under Trio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import trio

from tickwork.errors import TickworkError, WrongThreadError, fresh

T = TypeVar("T")
U = TypeVar("U")

Inner = concurrent.futures.Future

_thread = threading.local()


@contextmanager
def no_blocking(*, device: bool = False) -> Iterator[None]:
    """Mark the current thread, for a while, as one that must keep running: ``result()`` refuses to block it."""
    # Counted, since two engines of one thread may end in either order.
    _thread.marks = getattr(_thread, "marks", 0) + 1
    _thread.device = device
    try:
        yield
    finally:
        _thread.marks -= 1


def must_run(*, device: bool = False) -> bool:
    """Whether the current thread runs the engine or the device."""
    return getattr(_thread, "marks", 0) > 0 and (not device or _thread.device)


class Future(Generic[T]):
    """The result of one request, to be awaited as often as you like, from as many places as you like.

    Room: any thread, asyncio loop or Trio run may wait. ``result()`` may not be called on the engine's or the
    device's own thread, where it raises ``WrongThreadError`` instead of waiting for ever.
    Cancel: cancelling or timing out a wait ends that wait only; the request completes and may be awaited again.
    """

    def __init__(self, *, on_cancel: Callable[[], bool] = lambda: False) -> None:
        self._inner: Inner[T] = Inner()
        # Running from the start: else cancelling one asyncio waiter would cancel the result all waiters share.
        self._inner.set_running_or_notify_cancel()
        self._on_cancel = on_cancel

    def __repr__(self) -> str:
        return f"<Future {'done' if self.done() else 'pending'}>"

    def result(self, timeout: float | None = None) -> T:
        """Block until the result is there.

        Args:
            timeout: seconds to wait at most; None waits without limit.

        Raises:
            TimeoutError: the time is up; the request goes on.
            WrongThreadError: this thread has to keep running for the result to come.
            RequestFailedError: the request failed.
        """
        if not self.done() and must_run():
            raise WrongThreadError("this thread runs the engine or the device: await the future instead of .result()")
        return self._take(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """Wait for the result under Trio or asyncio; arguments and errors as for ``result``."""
        await wait(self._inner, timeout)
        return self._take()

    def __await__(self) -> Generator[Any, Any, T]:
        return self.result_async().__await__()

    async def coroutine(self) -> T:
        """The same wait as a coroutine, for ``asyncio.create_task``."""
        return await self.result_async()

    def future(self) -> Inner[T]:
        """The underlying ``concurrent.futures.Future``; its ``cancel()`` has no effect."""
        return self._inner

    def done(self) -> bool:
        """Whether a result or an error is there."""
        return self._inner.done()

    def cancel(self) -> bool:
        """Ask for the request to be abandoned; True if it will be. Only sampling can be: training always runs."""
        return not self.done() and self._on_cancel()

    def set_result(self, value: T) -> None:
        """Settle with a value. Called once, by whoever runs the request."""
        self._inner.set_result(value)

    def set_error(self, error: BaseException) -> None:
        """Settle with an error. Called once, by whoever runs the request."""
        self._inner.set_exception(error)

    def add_done_callback(self, call: Callable[[Future[T]], object]) -> None:
        """Call ``call(self)`` in the settling thread, or at once if already settled."""
        self._inner.add_done_callback(lambda _: call(self))

    def then(self, change: Callable[[T], U]) -> Future[U]:
        """Return a future of ``change(result)``; ``change`` runs in the settling thread and must be quick."""
        changed: Future[U] = Future(on_cancel=self._on_cancel)

        def settle(done: Future[T]) -> None:
            try:
                changed.set_result(change(done._inner.result()))
            except Exception as error:
                changed.set_error(error)

        self.add_done_callback(settle)
        return changed

    @classmethod
    def failed(cls, error: BaseException) -> Future[T]:
        """Return a future that has already failed."""
        future: Future[T] = cls()
        future.set_error(error)
        return future

    def _take(self, timeout: float | None = None) -> T:
        # Not by catching .result(): an original that is raised keeps the frames of all who ever waited.
        error = self._inner.exception(timeout)
        if isinstance(error, TickworkError):
            raise fresh(error) from error
        return self._inner.result()


APIFuture = Future


async def wait(inner: Inner[Any], timeout: float | None = None) -> None:
    """Wait under Trio or asyncio until ``inner`` is settled, whatever with.

    Cancel: ends this wait alone.

    Raises:
        TimeoutError: ``timeout`` seconds are over.
    """
    if must_run(device=True) and not inner.done():
        raise WrongThreadError("this is the device's thread, and the result needs the device: submit, but do not wait")
    if trio.lowlevel.in_trio_task():
        await _wait_trio(inner, timeout)
    else:
        await _wait_asyncio(inner, timeout)


async def _wait_trio(inner: Inner[Any], timeout: float | None) -> None:
    settled = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def wake(_: object) -> None:
        try:
            token.run_sync_soon(settled.set)
        except trio.RunFinishedError:
            pass  # the waiter's run ended before the result came

    inner.add_done_callback(wake)
    with trio.move_on_after(float("inf") if timeout is None else max(0, timeout)) as scope:
        await settled.wait()
    if scope.cancelled_caught and not inner.done():
        raise TimeoutError


async def _wait_asyncio(inner: Inner[Any], timeout: float | None) -> None:
    loop = asyncio.get_running_loop()
    settled: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not settled.done():
            settled.set_result(None)

    def wake(_: object) -> None:
        try:
            loop.call_soon_threadsafe(settle)
        except RuntimeError:
            pass  # the waiter's loop was closed before the result came

    inner.add_done_callback(wake)
    try:
        async with asyncio.timeout(timeout):
            await settled
    except TimeoutError:
        if not inner.done():
            raise


def in_event_loop() -> bool:
    """Whether the caller runs inside a Trio task or an asyncio loop, where blocking would stop everything."""
    if trio.lowlevel.in_trio_task():
        return True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
