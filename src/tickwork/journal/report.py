"""``report``: what the journal of a store tells of its training models, to whoever looks on.

Nothing is changed and the lock is not held, so it may be asked beside a server that has the journal open.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs

from tickwork.errors import JournalError
from tickwork.journal.file import JournalFile
from tickwork.journal.lane import PastLane, PastRequest, changes
from tickwork.journal.lock import holder
from tickwork.journal.recovery import Recovered, recover
from tickwork.journal.seals import check
from tickwork.journal.snapshots import Snapshots

# A look that met a server at work, on its way up or down, is taken again; seconds in between.
LOOKS, PAUSE = 5, 0.05
# Seconds that a look waits for a server that opens the journal.
PATIENCE = 5.0


@attrs.frozen
class LaneReport:
    """One training model, as the journal has it.

    Args:
        lane: its id, and that of its run.
        base_model: None where only the checkpoint that it began with tells.
        accepted: its requests so far, the creation included.
        recorded: those whose result is written.
        snapshot: the last request that its newest snapshot covers; None without one.
        again: requests that the next start runs, again or for the first time.
        back: the last request of before, where the last start brought it back.
        ran_again: how many ran again then.
        broken: why it can not be brought back, if it can not.
        damage: what is damaged of it, by name.
    """

    lane: str
    owner: str = ""
    base_model: str | None = None
    rank: int | None = None
    accepted: int = 0
    recorded: int = 0
    snapshot: int | None = None
    again: int = 0
    back: int | None = None
    ran_again: int = 0
    broken: str | None = None
    damage: tuple[str, ...] = ()


@attrs.frozen
class Report:
    """What a journal tells.

    Args:
        holder: the process that has it open, if one has.
        lanes: by id.
        damage: what is damaged besides.
    """

    holder: str | None
    lanes: dict[str, LaneReport]
    damage: tuple[str, ...]


def report(store: Path) -> Report | None:
    """Read the journal of a store; None where there is none.

    Room: any thread; it reads everything, and waits for the disk.

    Raises:
        JournalError: damaged as a whole, of another version, or not readable.
    """
    file = JournalFile(store.absolute() / "journal", "a folder that can be read")
    if not file.file.exists() and not file.known.exists():
        return None
    for look in range(LOOKS):
        before = _state(file)
        try:
            found: Report | JournalError = _look(file, before[0])
        except JournalError as error:
            found = error
        # What a server has open is read as of one commit; all else must have stayed as it was meanwhile.
        sound = isinstance(found, Report) and not found.damage and not any(map(_odd, found.lanes.values()))
        if before == _state(file) or (before[0] is not None and sound) or look + 1 == LOOKS:
            break
        time.sleep(PAUSE)
    if isinstance(found, JournalError):
        raise found
    return found


def _odd(lane: LaneReport) -> bool:
    return bool(lane.damage) or lane.broken is not None


def _state(file: JournalFile) -> tuple[str | None, list[tuple[int, int, int] | None]]:
    """Return who has a journal open, and what shows that it was written to."""
    return holder(file.folder / "lock"), [_stamp(file.file), _stamp(_beside(file, "-wal"))]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        about = file.stat()
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _beside(file: JournalFile, suffix: str) -> Path:
    return file.file.with_name(file.file.name + suffix)


def _look(file: JournalFile, held_by: str | None) -> Report:
    with file.named("read"):
        file.check_there()
        if held_by is None:
            file.check_log()
        with _opened(file, held_by) as db:
            file.check_format(db)
            file.check_pages(db)
            (boots,) = db.execute("SELECT value FROM meta WHERE name = 'boots'").fetchone()
            past = recover(db, Snapshots(file.folder / "snapshots"), boots)
            return _Teller(db, past).tell(held_by)


@contextmanager
def _opened(file: JournalFile, held_by: str | None) -> Iterator[sqlite3.Connection]:
    """Open a journal so that SQLite makes no file and changes none: the index of its log is the witness of losses."""
    log = _stamp(_beside(file, "-wal"))
    if held_by is None and (log is None or not log[1]):
        how = "immutable=1"  # else SQLite would make a log, and an index
    elif _beside(file, "-shm").exists():
        how = "readonly_shm=1"
    else:
        raise JournalError(f"{file.file}-wal has no index: start a server on this store, which makes one")
    where = f"file:{quote(str(file.file))}?mode=ro&{how}"
    db = sqlite3.connect(where, uri=True, isolation_level=None, timeout=PATIENCE)
    try:
        db.execute("BEGIN")
        yield db
    finally:
        db.close()


class _Teller:
    """Lays out what was read.

    Args:
        db: the same journal, for what is counted in it.
    """

    def __init__(self, db: sqlite3.Connection, past: Recovered) -> None:
        self._db, self._past = db, past
        self._back = {row[0]: row for row in self._rows_back()}

    def tell(self, held_by: str | None) -> Report:
        keys = [key for (key,) in self._db.execute("SELECT key FROM lanes ORDER BY rowid")]
        known = {past.about.lane: past for past in self._past.lanes}
        lanes = {key: self._lane(known[key]) if key in known else self._lost(key) for key in keys}
        rest = tuple(str(error) for error in self._past.damage if error.lane not in lanes)
        return Report(held_by, lanes, rest)

    def _lane(self, past: PastLane) -> LaneReport:
        about, found = past.about, self._counted(past.about.lane)
        _, boots, number, again, why, _ = self._back.get(about.lane, (None, None, None, 0, None, None))
        if boots != self._past.boots:
            number, again, why = None, 0, None
        broken = why if past.broken is None else str(past.broken)
        return attrs.evolve(
            found,
            owner=about.owner,
            base_model=about.base_model,
            rank=None if about.lora is None else about.lora.rank,
            again=0 if broken else sum(self._runs(each, past) for each in past.requests),
            back=None if broken else number,
            ran_again=again,
            broken=broken,
        )

    def _lost(self, lane: str) -> LaneReport:
        """Tell of a lane whose own row is damaged."""
        found = self._counted(lane)
        return attrs.evolve(found, broken=found.damage[0])

    def _counted(self, lane: str) -> LaneReport:
        """Count a lane's requests: those that a snapshot covers have a result, and may be gone."""
        (snapshot,) = self._one("SELECT max(number) FROM snapshots WHERE lane = ?", lane)
        covered = -1 if snapshot is None else snapshot
        gaps = self._db.execute("SELECT first, last FROM skipped WHERE lane = ?", (lane,))
        before = covered + 1 - sum(min(last, covered) - first + 1 for first, last in gaps if first <= covered)
        (after,) = self._one("SELECT count(*) FROM requests WHERE lane = ? AND number > ?", lane, covered)
        (done,) = self._one("SELECT count(*) FROM results WHERE lane = ? AND number > ?", lane, covered)
        damage = tuple(str(error) for error in self._past.damage if error.lane == lane)
        counts = {"accepted": before + after, "recorded": before + done, "snapshot": snapshot}
        return LaneReport(lane, **counts, damage=damage)

    def _runs(self, request: PastRequest, past: PastLane) -> bool:
        """Whether a start has to run a request: one without a result always, others for what they have changed."""
        if request.result is None:
            return True
        samplers = {each.key for each in self._past.samplers if each.held and each.lane == past.about.lane}
        unfinished = any(each.result is None for each in (*past.requests, *past.early))
        wanted = not past.about.released or unfinished or bool(samplers)
        failed = isinstance(request.result.value, BaseException)
        return wanted and not failed and changes(request.payload, samplers)

    def _rows_back(self) -> Iterator[Any]:
        (there,) = self._one("SELECT count(*) FROM sqlite_master WHERE name = 'back'")
        for row in self._db.execute("SELECT lane, boots, number, again, why, seal FROM back") if there else ():
            try:
                check("back", row, lane=row[0])
            except JournalError:
                continue  # it is told as if nothing were known
            yield row

    def _one(self, query: str, *values: Any) -> Any:
        return self._db.execute(query, values).fetchone()
