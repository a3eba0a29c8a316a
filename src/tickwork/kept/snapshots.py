"""``Snapshots``: when the state of a lane is written, so that it need not be computed again after a crash."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from tickwork.engine.request import Request
from tickwork.errors import EngineStoppedError, JournalError, lasting
from tickwork.journal.cost import LastSnapshot
from tickwork.journal.records import ResultRecord, TrimRecord
from tickwork.journal.snapshots import Snapshot
from tickwork.requests import Capture, Captured

if TYPE_CHECKING:
    from tickwork.kept.entry import Entry
    from tickwork.kept.lane import KeptLane

# Seconds of the device that a lane works between two snapshots of it, at least.
LEAST_SECONDS = 5.0
# Seconds that a result is kept once a snapshot stands in for its request.
RESULT_SECONDS = 600.0

log = logging.getLogger("tickwork")

# A request that has read a checkpoint, with its result.
Covered = tuple["Entry", Any, ResultRecord]


class Snapshots:
    """Takes a lane's snapshot once the work since its last one would be worse to lose than the writing.

    Room: the keeper's thread of results. The engine copies the state between two stages, the keeper's thread of the
    disk writes it.
    """

    def __init__(self, lane: KeptLane) -> None:
        self._lane = lane
        self.last = LastSnapshot()
        self._taking = False

    def consider(self) -> None:
        """Take a snapshot if it is time, now that something of the lane is done."""
        lane = self._lane
        if self._taking or lane.reading is not None or lane.refusal is not None:
            return
        if self.last.due(lane.keeper.device_seconds(lane.name), LEAST_SECONDS):
            self._taking = True
            self._take(None)

    def cover(self, entry: Entry, value: Any) -> None:
        """Show what has read a checkpoint, once it is certain never to be read again."""
        try:
            self._take((entry, value, self._lane.record(entry, value, None)))
        except JournalError as error:
            self._lose(entry, error)

    def _take(self, covered: Covered | None) -> None:
        keeper, name = self._lane.keeper, self._lane.name
        device = keeper.device_seconds(name)
        request = Request("step", name, Capture(name, samplers=False), urgent=True)
        request.future.add_done_callback(
            lambda _: keeper.results.put(partial(self._captured, request, device, covered))
        )
        try:
            self._lane.portal.post(request)
        except EngineStoppedError as error:
            request.future.set_error(error)

    def _captured(self, request: Request, device: float, covered: Covered | None) -> None:
        """All results of requests that it includes have been appended by now, but for the one that it covers."""
        error = request.future.future().exception()
        if error is not None:
            self._written(error, LastSnapshot(device), covered)
            return
        captured: Captured = request.future.future().result()
        reading = self._lane.reading
        if covered is None and (captured.number <= self.last.number or reading is not None):
            self._taking, self.last.device = False, device  # there is one, or that of what was read comes next
            return
        self._lane.keeper.disk.put(partial(self._write, captured, device, covered))

    def _write(self, captured: Captured, device: float, covered: Covered | None) -> None:
        lane, begun = self._lane, time.perf_counter()
        if covered is None and lane.refusal is not None:
            return
        state = Snapshot(captured.arrays, captured.metadata)
        before = [] if covered is None else [covered[2]]
        try:
            written = lane.keeper.journal.write_snapshot(lane.name, captured.number, state, before)
        except JournalError as error:
            failed = LastSnapshot(device)
            lane.keeper.results.put(partial(self._written, error, failed, covered))
        else:
            made = LastSnapshot(device, time.perf_counter() - begun, captured.number)
            lane.keeper.then(written, lambda error: self._written(error, made, covered))

    def _written(self, error: BaseException | None, made: LastSnapshot, covered: Covered | None) -> None:
        if covered is None:
            self._taking = False
        if error is None:
            self.last = made
            self._lane.keeper.append([TrimRecord(time.time() - RESULT_SECONDS, 0.0, self._lane.name)])
        elif covered is None and isinstance(error, JournalError):
            self.last.device = made.device
            log.warning("no snapshot of %s: %s", self._lane.name, error)
        if covered is not None:
            self._settle(covered, error)

    def _settle(self, covered: Covered, error: BaseException | None) -> None:
        entry, value, _ = covered
        if error is None or not lasting(error):
            self._lane.show(entry, value, error)
        else:
            self._lose(entry, error)

    def _lose(self, entry: Entry, error: BaseException) -> None:
        """Give a model up that is not what its journal can tell."""
        lost = JournalError(f"what was loaded can not be kept: {error}", lane=self._lane.name)
        self._lane.keep(entry, None, lost)
        self._lane.break_off(lost)
