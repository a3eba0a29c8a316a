"""``Portal``: the way from any thread into the engine, and the credits that bound what is inside."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable

import attrs
import trio

from tickwork.engine.queue import Queue
from tickwork.engine.request import Request
from tickwork.errors import ClosedError, EngineStoppedError, QueueFullError, TickworkError, fresh
from tickwork.futures import Future, Inner, in_event_loop, must_run, wait

# What is done with a request when its turn comes; raises where the engine takes it no more.
Enter = Callable[[Request], None]


@attrs.frozen
class _Waiter:
    weight: int
    enter: Callable[[], None]
    ticket: Inner[None]


class Credits:
    """A fair, bounded door: whoever comes first enters first, as soon as the weight inside allows it.

    A request heavier than the limit enters when nothing else is inside.

    Room: any thread. The lock is re-entrant because a finaliser may run while it is held.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0
        self._waiting: deque[_Waiter] = deque()
        self._lock = threading.RLock()
        self._shut: Exception | None = None

    @property
    def waiting(self) -> int:
        """Callers in front of the door."""
        return len(self._waiting)

    def queue_up(self, weight: int, enter: Callable[[], None]) -> Inner[None]:
        """Stand in line; ``enter`` is called under the lock when the turn comes, then the ticket is settled.

        Cancelling the ticket before that leaves the line: the request never existed.
        """
        ticket: Inner[None] = Inner()
        with self._lock:
            if self._shut is not None:
                raise fresh(self._shut)
            self._waiting.append(_Waiter(weight, enter, ticket))
            self._admit()
        return ticket

    def leave(self, weight: int) -> None:
        """Give credits back."""
        with self._lock:
            self.inside -= weight
            self._admit()

    def give_up(self, ticket: Inner[None]) -> bool:
        """Leave the line; False if the turn had already come."""
        with self._lock:
            gone = ticket.cancel()
            self._waiting = deque(waiter for waiter in self._waiting if not waiter.ticket.cancelled())
            self._admit()
        return gone

    def shut(self, error: Exception) -> None:
        """Let nobody in any more: those in line and those to come get ``error``."""
        with self._lock:
            self._shut = error
            while self._waiting:
                self._waiting.popleft().ticket.set_exception(fresh(error))

    def _admit(self) -> None:
        while self._waiting:
            head = self._waiting[0]
            if self.inside and self.inside + head.weight > self.limit:
                return
            self._waiting.popleft()
            self._let_in(head)

    def _let_in(self, waiter: _Waiter) -> None:
        try:
            waiter.enter()
        except TickworkError as error:
            waiter.ticket.set_exception(error)
        else:
            self.inside += waiter.weight
            waiter.ticket.set_result(None)


class Portal:
    """Posts requests to a running engine.

    Room: any thread, asyncio loop or Trio run.
    """

    def __init__(self, token: trio.lowlevel.TrioToken, queue: Queue, limit: int) -> None:
        self.credits = Credits(limit)
        self._token = token
        self._queue = queue

    def submit(self, request: Request, enter: Enter | None = None) -> Future[object]:
        """Post a request, in the order of the calls; blocks a plain thread while there is no credit.

        Args:
            enter: called in place of ``post`` when its turn comes, in the order of the turns; must be quick.

        Raises:
            QueueFullError: no credit, inside an event loop or on the engine's thread.
            ClosedError: the service is closed.
            EngineStoppedError: the engine has died.
        """
        ticket = self._queue_up(request, enter or self.post)
        if not ticket.done() and (in_event_loop() or must_run()) and self.credits.give_up(ticket):
            raise QueueFullError("the queue is full: await the _async variant, which waits for its turn")
        try:
            ticket.result()
        except BaseException:
            self.credits.give_up(ticket)
            raise
        return request.future

    async def submit_async(self, request: Request, enter: Enter | None = None) -> Future[object]:
        """Post a request, waiting for credit under Trio or asyncio; arguments and errors as for ``submit``.

        Cancel: while waiting for credit, the request never existed; afterwards it is accepted and runs.
        """
        ticket = self._queue_up(request, enter or self.post)
        try:
            await wait(ticket)
            ticket.result()
        except BaseException:
            self.credits.give_up(ticket)
            raise
        return request.future

    def post(self, request: Request) -> None:
        """Post a request past the credits.

        Raises:
            EngineStoppedError: the engine is gone.
        """
        try:
            self._token.run_sync_soon(self._queue.post, request)
        except trio.RunFinishedError:
            raise EngineStoppedError("the engine has stopped") from None

    def post_here(self, request: Request) -> None:
        """Post a request past the credits and past all that other threads have posted in this turn of the loop.

        A closed engine fails it. Room: the engine's thread, for lanes that no other thread posts to.
        """
        self._queue.post(request)

    def drop(self, request: Request) -> None:
        """Post a clean-up past the credits; does nothing once the engine is gone. Safe in a finaliser."""
        with contextlib.suppress(EngineStoppedError):
            self.post(request)

    def refuse(self) -> None:
        """Take no new requests."""
        self.credits.shut(ClosedError("the service is closed"))

    def close(self) -> None:
        """Take no new requests; the engine drains those accepted and ends."""
        self.refuse()
        try:
            self._token.run_sync_soon(self._queue.close)
        except trio.RunFinishedError:
            pass

    def _queue_up(self, request: Request, enter: Enter) -> Inner[None]:
        def let_in() -> None:
            enter(request)
            request.future.add_done_callback(lambda _: self.credits.leave(request.weight))

        return self.credits.queue_up(request.weight, let_in)
