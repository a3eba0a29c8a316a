"""``Durable``: writes requests before they are accepted, and results before they are shown."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from tickwork.errors import JournalError, QueueFullError, TickworkError, lasting
from tickwork.futures import Inner, wait
from tickwork.journal.codec import encode
from tickwork.journal.journal import Journal
from tickwork.journal.records import FetchedRecord, Record, RequestRecord, ResultRecord, TrimRecord
from tickwork.server.body import SMALL, off_loop
from tickwork.server.promises import Promise

log = logging.getLogger("tickwork.server")

Call = Callable[[], None]
# Told what is wrong, or None.
Then = Callable[[JournalError | None], None]


class Durable:
    """The server's way into its journal.

    Args:
        journal: None keeps everything in memory, and acknowledges at once.
        optional: whether to go on in memory, and say so, once the journal can not be written. Otherwise nothing more is
            accepted or shown.

    Room: the Trio run of the server.
    """

    def __init__(self, journal: Journal | None, *, optional: bool = False) -> None:
        self.journal = journal
        self._optional = optional
        self._nursery: trio.Nursery | None = None
        self.failure: JournalError | None = None
        self._fetched: dict[str, list[int]] = {}

    @property
    def on(self) -> bool:
        """Whether anything is written."""
        return self.journal is not None and not (self._optional and self.failure is not None)

    @property
    def stuck(self) -> bool:
        """Whether what is accepted or done can not be shown any more."""
        return self.on and self.failure is not None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do what ``start`` is given, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def close(self) -> None:
        """Write everything appended and let the next process in."""
        if self.journal is not None:
            with contextlib.suppress(TickworkError):  # it says so when it can not be written
                self._append(self._handed_over())
            self.journal.close()

    def start(self, act: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Do something beside whoever asked for it, who may go away."""
        assert self._nursery is not None
        self._nursery.start_soon(act, *args)

    async def put(self, *records: Record) -> None:
        """Write records, all or none, and wait until they are durable.

        Raises:
            JournalError: they can not be written.
        """
        while self.on:
            try:
                written = self._append(records)
            except QueueFullError:
                await self._room()
            else:
                await self.written(written)
                return

    def note(self, *records: Record) -> None:
        """Write records after everything so far, without waiting for it."""
        if not self.on:
            return
        try:
            self._append(records)
        except QueueFullError:
            self.start(self._late, records)

    async def written(self, future: Inner[None]) -> None:
        """Wait until what was appended is durable.

        Raises:
            JournalError: it can not be written.
        """
        if not future.done():
            await wait(future)
        if (refusal := self._refusal(future)) is not None:
            raise refusal

    def accept(self, promise: Promise, payload: Any, then: Call, also: Sequence[Record] = ()) -> None:
        """Write a request, then let it be answered and call ``then``, which finds its ``refusal`` if there is one.

        Args:
            payload: what is asked, or the error that it fails with at its turn.
            also: written together with it.
        """
        if not self.on:
            promise.accepted.set()
            then()
            return
        assert promise.place is not None
        lane, number = promise.place
        promise.keep = self.keep

        def make() -> list[Record]:
            return [*also, RequestRecord(lane, number, promise.owner, promise.kind.text, encode(payload))]

        def written(refusal: JournalError | None) -> None:
            promise.refusal = refusal
            promise.accepted.set()
            then()

        self._write(promise.bulk, make, written)

    def keep(self, promise: Promise, value: Any, error: BaseException | None) -> None:
        """Write what became of a request, then show it."""

        def written(refusal: JournalError | None) -> None:
            if refusal is None:
                promise.settle(value, error)
            else:
                log.error("the result of %s can not be kept, so it is not shown: %s", promise.request_id, refusal)

        if not self.on:
            promise.settle(value, error)
        elif lasting(error):
            self._write(promise.bulk, lambda: [self._result(promise, value, error)], written)

    def fetched(self, promise: Promise) -> None:
        """Note that a result was handed over: it is written at the next ``flush``, since nobody waits for it."""
        if self.on and promise.place is not None and promise.keep is not None:
            lane, number = promise.place
            self._fetched.setdefault(lane, []).append(number)

    def flush(self) -> None:
        """Write what was handed over since the last time."""
        if self._fetched:
            self.note(*self._handed_over())

    def trim(self, result_seconds: float, refetch_seconds: float) -> None:
        """Let go of what a snapshot covers, and of results as old as ``Promises.sweep`` would have them."""
        now = time.time()
        self.note(TrimRecord(now - result_seconds, now - refetch_seconds))

    async def result(self, promise: Promise, value: Any, error: BaseException | None) -> ResultRecord:
        """Return what is written of a result."""
        return await off_loop(promise.bulk, lambda: self._result(promise, value, error))

    @staticmethod
    def _result(promise: Promise, value: Any, error: BaseException | None) -> ResultRecord:
        assert promise.place is not None
        return ResultRecord(*promise.place, time.time(), encode(value if error is None else error))

    def _write(self, bulk: int, make: Callable[[], list[Record]], then: Then) -> None:
        """Write records, and call ``then`` with what is wrong once they are durable, or never will be.

        What is small is encoded here, and mostly written at once: a task that waits would cost turns of the loop.

        Args:
            bulk: about how many bytes they have.
        """
        if bulk > SMALL:
            self.start(self._write_beside, bulk, make, then)
            return
        try:
            written = self._append(records := make())
        except QueueFullError:
            self.start(self._write_beside, 0, lambda: records, then)
        except JournalError as error:
            then(error)
        else:
            self._once(written, lambda: then(self._refusal(written)))

    def _once(self, written: Inner[None], call: Call) -> None:
        """Call from the Trio run as soon as something is settled, unless that run has ended."""
        if written.done():
            call()
            return
        token = trio.lowlevel.current_trio_token()

        def wake(_: Inner[None]) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(call)

        written.add_done_callback(wake)

    async def _write_beside(self, bulk: int, make: Callable[[], list[Record]], then: Then) -> None:
        try:
            await self.put(*await off_loop(bulk, make))
        except JournalError as error:
            then(error)
        else:
            then(None)

    def _append(self, records: Sequence[Record]) -> Inner[None]:
        assert self.journal is not None
        return self.journal.append(records)

    def _handed_over(self) -> list[Record]:
        fetched, self._fetched = self._fetched, {}
        return [FetchedRecord(lane, tuple(numbers), time.time()) for lane, numbers in fetched.items()]

    async def _room(self) -> None:
        assert self.journal is not None
        await wait(self.journal.room())

    async def _late(self, records: Sequence[Record]) -> None:
        try:
            await self.put(*records)
        except JournalError as error:
            log.warning("not written: %s", error)

    def _refusal(self, written: Inner[None]) -> JournalError | None:
        """Return why what was appended is not durable, where that matters."""
        error = written.exception()
        if error is None:
            return None
        refusal = error if isinstance(error, JournalError) else JournalError(str(error))
        return None if self._survives(refusal) else refusal

    def _survives(self, error: JournalError) -> bool:
        """Note it where nothing can be written any more; whether to go on without."""
        assert self.journal is not None
        if self.journal.failure is None:
            return False
        if self.failure is None:
            self.failure = error
            what = "nothing is kept from here on, as was asked for" if self._optional else "nothing more is accepted"
            log.critical("%s; %s", error, what)
        return self._optional
