"""``Snapshots``: when the state of a lane is written, so that it need not be computed again after a crash."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import trio

from tickwork.engine.engine import Engine
from tickwork.engine.request import Request
from tickwork.errors import JournalError, QueueFullError, TickworkError, lasting
from tickwork.journal.cost import LastSnapshot
from tickwork.journal.records import Record
from tickwork.journal.snapshots import Snapshot
from tickwork.requests import Capture, Captured
from tickwork.server.durable import Durable
from tickwork.server.lanes import Lane
from tickwork.server.promises import Promise

log = logging.getLogger("tickwork.server")


@attrs.define(eq=False)
class _Past(LastSnapshot):
    """What is known of a lane's last snapshot, and whether one is being taken."""

    busy: trio.Lock = attrs.Factory(trio.Lock)


class Snapshots:
    """Takes a lane's snapshot once the work since its last one would be worse to lose than the writing.

    Args:
        least: seconds of the device that a lane works between two snapshots, at least.

    Room: the Trio run of the server. Bytes are written in worker threads.
    """

    def __init__(self, durable: Durable, engine: Engine, least: float) -> None:
        self._durable, self._engine, self._least = durable, engine, least
        self._past: WeakKeyDictionary[Lane, _Past] = WeakKeyDictionary()

    def settled(self, lane: Lane) -> None:
        """Consider a snapshot, now that something of a lane is done."""
        past = self._of(lane)
        due = past.due(self._engine.device_seconds(lane.model_id), self._least)
        if self._durable.on and not past.busy.locked() and due:
            self._durable.start(self.take, lane)

    def covers(self, lane: Lane, promise: Promise, value: Any, error: BaseException | None) -> None:
        """Settle what has read a checkpoint, once it is certain never to be read again, and open its lane."""
        if lasting(error) or not self._durable.on:
            self._durable.start(self._cover, lane, promise, value, error)

    async def take(self, lane: Lane, before: Sequence[Record] = ()) -> bool:
        """Write the state of a lane after what it has done so far; whether a snapshot holds that now.

        Args:
            before: written with it, just before.
        """
        past = self._of(lane)
        async with past.busy:
            device = self._engine.device_seconds(lane.model_id)
            try:
                captured = await self._captured(lane)
                if not before and lane.reading is not None and lane.reading <= captured.number:
                    return False  # its own snapshot is about to be taken, and waits for this one to end
                if captured.number > past.number:
                    await self._write(lane, captured, past, before)
            except (JournalError, QueueFullError) as error:
                log.warning("no snapshot of %s: %s", lane.model_id, error)
                return False
            except TickworkError:
                return False  # there is no such model, or no engine any more
            past.device, past.number = device, captured.number
            return True

    def resumed(self, lane: Lane, number: int) -> None:
        """Note the snapshot that a lane was resumed from."""
        self._of(lane).number = number

    def _of(self, lane: Lane) -> _Past:
        return self._past.setdefault(lane, _Past())

    async def _captured(self, lane: Lane) -> Captured:
        request = Request("step", lane.model_id, Capture(lane.model_id), urgent=True)
        lane.door.forget(request)
        captured: Captured = await request.future
        return captured

    async def _write(self, lane: Lane, captured: Captured, past: _Past, before: Sequence[Record]) -> None:
        last = captured.number - bool(before)
        for promise in [promise for number, promise in lane.running.items() if number <= last]:
            await promise.settled.wait()
        begun = time.perf_counter()
        state = Snapshot(captured.arrays, captured.metadata)
        journal = self._durable.journal
        assert journal is not None
        written = await trio.to_thread.run_sync(journal.write_snapshot, lane.model_id, captured.number, state, before)
        await self._durable.written(written)
        past.seconds = time.perf_counter() - begun

    async def _cover(self, lane: Lane, promise: Promise, value: Any, error: BaseException | None) -> None:
        if error is not None or not self._durable.on:
            self._durable.keep(promise, value, error)
        elif await self.take(lane, [await self._durable.result(promise, value, None)]):
            promise.settle(value, None)
        else:
            lost = JournalError(
                "what was loaded can not be kept: no snapshot of it could be written", lane=lane.model_id
            )
            self._durable.keep(promise, None, lost)
            lane.break_off(lost)
        lane.open()
