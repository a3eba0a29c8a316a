"""``KeptLane``: the requests of one training model on their way into the journal, the engine, and back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from tickwork import build
from tickwork.engine.portal import Portal
from tickwork.engine.request import Request
from tickwork.errors import EngineStoppedError, InvalidRequestError, JournalError, TickworkError, fresh, lasting
from tickwork.futures import Future, Inner, in_event_loop, must_run, wait
from tickwork.journal.codec import encode
from tickwork.journal.lane import PastRequest
from tickwork.journal.records import IN_PROCESS, Record, RequestRecord, ResultRecord
from tickwork.kept.entry import Entry, about, is_written, kind_of, repeatable
from tickwork.kept.keeper import Keeper, forgetting
from tickwork.kept.past import request_of
from tickwork.kept.snapshots import Snapshots
from tickwork.requests import CreateModel, reads_checkpoint


class KeptLane:
    """Writes requests before they are accepted, and results before they are shown.

    The engine may be at work on a request while it is written. Requests are numbered from 0, the model's creation, in
    the order in which they get credit. While a request that has read a checkpoint is not covered by a snapshot the lane
    is shut: what follows it may overwrite the checkpoint.

    Args:
        name: the model's id.
        next: the number that comes next.
        past: by number, the kind of what an earlier process has accepted, and what becomes of it.
        reading: the number of a request that reads a checkpoint, on which all others wait.
        refusal: why nothing more is taken in or recorded, if so.

    Room: any thread; what becomes of requests is told in the keeper's thread of results.
    """

    def __init__(self, keeper: Keeper, portal: Portal, name: str) -> None:
        self.keeper, self.portal, self.name = keeper, portal, name
        self.next = 0
        self.past: dict[int, tuple[str, Future[Any]]] = {}
        self.reading: int | None = None
        self.refusal: TickworkError | None = None
        self.snapshots = Snapshots(self)
        self._lock = threading.RLock()
        self._held: deque[Request] = deque()
        self._shut = False
        self._durable: Inner[None] = Inner()
        self._durable.set_result(None)
        keeper.opened(self)

    def submit(self, make: Callable[[], Request]) -> Future[Any]:
        """Make and post a request, and wait until it is durable, unless that would stop an event loop or the engine.

        Raises:
            ClosedError: the service is closed.
            JournalError: it can not be written.
            QueueFullError: the queue is full and the caller must not block.
        """
        entry = self._entry(make)
        if isinstance(entry, Future):
            return entry
        self.portal.submit(entry.request, partial(self._enter, entry))
        if not (in_event_loop() or must_run()):
            _check(entry.durable)
        return entry.shown

    async def submit_async(self, make: Callable[[], Request]) -> Future[Any]:
        """``submit``, waiting for a full queue and for the disk.

        Cancel: while waiting for credit, the request never existed; while it is written, it is accepted and runs.
        """
        entry = self._entry(make)
        if isinstance(entry, Future):
            return entry
        await self.portal.submit_async(entry.request, partial(self._enter, entry))
        await wait(entry.durable)
        _check(entry.durable)
        return entry.shown

    def forget(self, key: str, lane: str) -> None:
        """Let the engine go of the model, or of a sampler of it, after all that was asked. Safe in a finaliser."""
        self.keeper.results.put(partial(self._forget, build.release(key, lane)))

    def finish(self) -> Future[None]:
        """Let go of the model for good, in the journal too, after all that was asked of it."""
        forgotten: Future[None] = Future()
        request = build.release(self.name, self.name)
        request.future.add_done_callback(lambda _: self.keeper.disk.put(partial(self._finish, forgotten)))
        self.keeper.begun()
        with self._lock:
            self.refusal = InvalidRequestError("the run was forgotten: create another client", field="run_id")
        self._forget(request)
        return forgotten

    def owe(self, past: PastRequest) -> Request:
        """Return an accepted request of an earlier process, whose result is to be recorded."""
        entry = Entry(request_of(past))
        self.past[past.number] = (past.kind, entry.shown)
        self._follow(entry)
        entry.durable.set_result(None)
        self.keeper.begun()
        return entry.request

    def resume(self, number: int, due: list[Request]) -> None:
        """Hold what is due, and all that comes, until ``open``; ``number`` is the next."""
        self.next, self._shut = number, True
        self._held.extend(due)

    def open(self) -> None:
        """Post what was held."""
        gone = []
        with self._lock:
            self._shut, self.reading = False, None
            held, self._held = self._held, deque()
            for request in held:
                try:
                    self._post(request)
                except EngineStoppedError as error:
                    gone.append((request, error))
        for request, why in gone:  # not under the lock: credits are given back
            request.future.set_error(why)

    def break_off(self, why: TickworkError) -> None:
        """Fail what is held and all that comes, without recording that: the journal knows a state, and this is none."""
        with self._lock:
            self.refusal, self._shut, self.reading = why, False, None
            held, self._held = self._held, deque()
        for request in held:
            request.future.set_error(why)

    def record(self, entry: Entry, value: Any, error: BaseException | None) -> ResultRecord:
        """Return what is written of a result.

        Raises:
            JournalError: it can not be stored.
        """
        request = entry.request
        assert request.number is not None
        gradients = None if request.gradients is None else encode(request.gradients)
        return ResultRecord(
            self.name, request.number, time.time(), encode(value if error is None else error), gradients
        )

    def keep(self, entry: Entry, value: Any, error: BaseException | None) -> None:
        """Write what became of a request, then show it."""
        try:
            written = self.keeper.append([self.record(entry, value, error)])
        except JournalError as refusal:
            self.show(entry, None, refusal)
        else:
            self.keeper.then(written, lambda refusal: self.show(entry, value, refusal or error))

    def show(self, entry: Entry, value: Any, error: BaseException | None) -> None:
        """Show what became of a request."""
        if error is not None:
            entry.shown.set_error(error)
        else:
            entry.shown.set_result(value)
        if self.reading is not None and self.reading == entry.request.number:
            self.open()
        self.keeper.ended()
        self.snapshots.consider()

    def _entry(self, make: Callable[[], Request]) -> Entry | Future[Any]:
        self._check_open()
        try:
            request = make()
            request.payload = repeatable(request.payload)
            entry = Entry(request, encode(request.payload) if is_written(request.payload) else None)
        except (InvalidRequestError, JournalError) as error:
            return Future.failed(error)
        request.recorded = entry.body is not None
        entry.shown = Future(on_cancel=request.future.cancel)
        self._follow(entry)
        return entry

    def _follow(self, entry: Entry) -> None:
        entry.request.future.add_done_callback(lambda _: self.keeper.results.put(partial(self._done, entry)))

    def _check_open(self) -> None:
        self.keeper.check()
        if self.refusal is not None:
            raise fresh(self.refusal) from self.refusal

    def _enter(self, entry: Entry, request: Request) -> None:
        """Take a request in at its turn; under the engine's door, so nothing here may wait."""
        with self._lock:
            self._check_open()
            creates = isinstance(request.payload, CreateModel)
            written = entry.body is not None and (creates or self.next > 0)
            request.number = self.next if written else None
            self._post(request)
            if entry.body is not None and request.number is not None:
                self.next += 1
                first: list[Record] = [about(self.name, request.payload)] if creates else []
                ask = RequestRecord(self.name, request.number, IN_PROCESS, kind_of(request.payload), entry.body)
                self._durable = self.keeper.append([*first, ask])
            entry.durable = self._durable
            self.keeper.begun()

    def _post(self, request: Request) -> None:
        if self._shut:
            self._held.append(request)
        elif isinstance(request.payload, TickworkError):
            request.future.set_error(request.payload)
        else:
            self.portal.post(request)
            if request.number is not None and reads_checkpoint(request.payload):
                self._shut, self.reading = True, request.number

    def _forget(self, request: Request) -> None:
        try:
            with self._lock:
                self._post(request)
        except EngineStoppedError as error:
            request.future.set_error(error)

    def _finish(self, forgotten: Future[None]) -> None:
        """After all snapshots that were on their way to the disk."""

        def settle(error: BaseException | None) -> None:
            if error is None:
                forgotten.set_result(None)
            else:
                forgotten.set_error(error)
            self.keeper.ended()

        self.keeper.then(self.keeper.append(forgetting(self.name)), settle)

    def _done(self, entry: Entry) -> None:
        inner = entry.request.future.future()
        error = inner.exception()
        value = None if error is not None else inner.result()
        with self._lock:  # it may be done before it has been written down
            durable, number = entry.durable, entry.request.number
        if self.refusal is not None or not lasting(error):
            self.show(entry, value, error)
        elif number is None:
            self.keeper.then(durable, lambda refusal: self.show(entry, value, refusal or error))
        elif error is None and reads_checkpoint(entry.request.payload):
            self.snapshots.cover(entry, value)
        else:
            self.keep(entry, value, error)


def _check(durable: Inner[None]) -> None:
    if (error := durable.exception()) is not None:
        raise fresh(error) from error
