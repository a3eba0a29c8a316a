"""``recover``: everything that a journal holds, read once, before anything is written to it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from sqlite3 import Connection
from typing import Any

import attrs
import numpy as np

from tickwork.errors import JournalError
from tickwork.journal.codec import decode
from tickwork.journal.lane import Entry, PastLane, PastRequest, PastResult, follow
from tickwork.journal.losses import PastLoss
from tickwork.journal.records import (
    IN_PROCESS,
    LaneRecord,
    LossRecord,
    SamplerRecord,
    SessionRecord,
    SnapshotRecord,
)
from tickwork.journal.seals import check
from tickwork.journal.snapshots import Snapshots
from tickwork.requests import ForwardBackward


@attrs.frozen(eq=False)
class Recovered:
    """What was there when the journal was opened.

    Args:
        boots: how often it has been opened, with this time.
        lanes: training models; those whose own row is damaged are in ``damage`` alone.
        loose: requests outside those lanes, of samplers: to be run again in any order, or failed, where they have no
            result.
        results: to be served again. The result of a damaged row is the ``JournalError`` that names it.
        damage: each damaged row or file and each gap, by lane and number where it has them.
    """

    boots: int
    sessions: tuple[SessionRecord, ...]
    lanes: tuple[PastLane, ...]
    samplers: tuple[SamplerRecord, ...]
    losses: tuple[LossRecord, ...]
    loose: tuple[PastRequest, ...]
    results: tuple[PastResult, ...]
    damage: tuple[JournalError, ...]

    def of(self, *, in_process: bool) -> Recovered:
        """Return what belongs to services in process, or what belongs to servers; each leaves the other's alone."""

        def mine(owner: str) -> bool:
            return (owner == IN_PROCESS) == in_process

        return attrs.evolve(
            self,
            lanes=tuple(lane for lane in self.lanes if mine(lane.about.owner)),
            loose=tuple(request for request in self.loose if mine(request.owner)),
            results=tuple(result for result in self.results if mine(result.owner)),
        )


def recover(db: Connection, snapshots: Snapshots, boots: int) -> Recovered:
    """Read everything.

    Raises:
        sqlite3.DatabaseError: the file can not be read at all.
    """
    return _Reader(db, snapshots).read(boots)


class _Reader:
    def __init__(self, db: Connection, snapshots: Snapshots) -> None:
        self._db, self._snapshots = db, snapshots
        self._damage: list[JournalError] = []

    def read(self, boots: int) -> Recovered:
        results = self._results()
        requests = self._requests(results, self._gradients())
        ordered = {key for (key,) in self._db.execute("SELECT key FROM lanes")}
        loose = [entry for lane, entries in requests.items() if lane not in ordered for entry in entries.values()]
        skipped, states = self._skipped(), self._states()
        abouts = self._named("lanes")
        for lane in ordered - {about.lane for about in abouts}:
            self._strand(requests[lane])
        lanes = [self._lane(about, requests[about.lane], skipped[about.lane], states) for about in abouts]
        return Recovered(
            boots,
            tuple(self._named("sessions")),
            tuple(lanes),
            tuple(self._named("samplers")),
            tuple(self._named("losses")),
            tuple(entry for entry in loose if isinstance(entry, PastRequest)),
            tuple(result for result in results.values() if not result.expired),
            tuple(self._damage),
        )

    def _lane(
        self,
        about: LaneRecord,
        entries: Mapping[int, Entry],
        skipped: list[tuple[int, int]],
        states: Mapping[str, list[SnapshotRecord | JournalError]],
    ) -> PastLane:
        """Take the newest snapshot that is whole, and what came after it."""
        why = None
        for state in states.get(about.lane, []):
            try:
                if isinstance(state, JournalError):
                    raise state
                self._snapshots.verify(state)
            except JournalError as error:
                why = why or error
                self._note(error)
            else:
                return self._noted(follow(about, state, entries, skipped, None))
        return self._noted(follow(about, None, entries, skipped, why))

    def _strand(self, entries: Mapping[int, Entry]) -> None:
        """Name the requests of a lane whose own row is damaged."""
        for entry in entries.values():
            if isinstance(entry, PastRequest) and entry.result is None:
                message = f"request {entry.number} can not run: the row of its lane {entry.lane!r} is damaged"
                self._note(JournalError(message, lane=entry.lane, number=entry.number))

    def _noted(self, lane: PastLane) -> PastLane:
        if lane.broken is not None:
            self._note(lane.broken)
        return lane

    def _named(self, table: str) -> list[Any]:
        found = []
        for key, body, seal in self._db.execute(f"SELECT key, body, seal FROM {table} ORDER BY rowid"):
            value, damage = self._checked(table, (key, body, seal), key, None)
            if damage is None:
                found.append(value)
        return found

    def _results(self) -> dict[tuple[str, int], PastResult]:
        query = "SELECT lane, number, owner, kind, settled, fetched, body, seal FROM results ORDER BY rowid"
        found = {}
        for lane, number, owner, kind, settled, fetched, body, seal in self._db.execute(query):
            cells = (lane, number, owner, kind, settled, body, seal)
            value, damage = self._checked("results", cells, lane, number)
            about = (lane, number, owner, kind, settled, fetched)
            found[lane, number] = PastResult(*about, damage or value, body is None and damage is None)
        return found

    def _gradients(self) -> dict[tuple[str, int], tuple[Any, JournalError | None]]:
        rows = self._db.execute("SELECT lane, number, body, seal FROM gradients")
        return {(row[0], row[1]): self._checked("gradients", row, row[0], row[1]) for row in rows}

    def _requests(
        self,
        results: Mapping[tuple[str, int], PastResult],
        gradients: Mapping[tuple[str, int], tuple[Any, JournalError | None]],
    ) -> dict[str, dict[int, Entry]]:
        found: dict[str, dict[int, Entry]] = defaultdict(dict)
        for row in self._db.execute("SELECT lane, number, owner, kind, body, seal FROM requests ORDER BY lane, number"):
            lane, number, owner, kind = row[:4]
            value, damage = self._checked("requests", row, lane, number)
            known, loss = gradients.get((lane, number), (None, None))
            past = PastRequest(lane, number, owner, kind, _with(value, known), results.get((lane, number)))
            found[lane][number] = damage or loss or past
        return found

    def _skipped(self) -> dict[str, list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row in self._db.execute("SELECT lane, first, last, seal FROM skipped ORDER BY first"):
            try:
                check("skipped", row, lane=row[0], number=row[1])
            except JournalError as error:
                self._note(error)
            else:
                found[row[0]].append((row[1], row[2]))
        return found

    def _states(self) -> dict[str, list[SnapshotRecord | JournalError]]:
        found: dict[str, list[SnapshotRecord | JournalError]] = defaultdict(list)
        query = "SELECT lane, number, file, size, checksum, seal FROM snapshots ORDER BY number DESC"
        for row in self._db.execute(query):
            try:
                check("snapshots", row, lane=row[0], number=row[1])
            except JournalError as error:
                found[row[0]].append(error)
            else:
                found[row[0]].append(SnapshotRecord(*row[:-1]))
        return found

    def _checked(
        self, table: str, row: tuple[Any, ...], lane: str, number: int | None
    ) -> tuple[Any, JournalError | None]:
        """Return what a row's body holds, and what is wrong with the row."""
        try:
            check(table, row, lane=lane, number=number)
            return None if row[-2] is None else decode(row[-2]), None
        except JournalError as error:
            named = JournalError(f"{table}: {error}", lane=lane, number=number)
            self._note(named)
            return None, named

    def _note(self, error: JournalError) -> None:
        if error not in self._damage:
            self._damage.append(error)


def _with(payload: Any, gradients: tuple[np.ndarray, ...] | None) -> Any:
    """Give a loss that can not be called any more the gradients that it gave."""
    if isinstance(payload, ForwardBackward) and isinstance(payload.loss_fn, PastLoss) and gradients is not None:
        return attrs.evolve(payload, loss_fn=PastLoss(payload.loss_fn.name, gradients))
    return payload
