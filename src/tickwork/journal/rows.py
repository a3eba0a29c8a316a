"""``write``: one record into its table, or a refusal that leaves everything as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from sqlite3 import Connection
from typing import Any

import attrs

from tickwork.errors import JournalError
from tickwork.journal.codec import encode
from tickwork.journal.database import NAMED
from tickwork.journal.records import (
    BackRecord,
    Change,
    FetchedRecord,
    ForgetRecord,
    LaneRecord,
    LossRecord,
    Named,
    Record,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
    SkippedRecord,
    SnapshotRecord,
    TrimRecord,
)
from tickwork.journal.seals import seal
from tickwork.journal.trim import trim

# What a row weighs besides its body.
OVERHEAD = 256
# Instead of a query before each row.
_ONCE = "ON CONFLICT (lane, number) DO NOTHING"

_TABLES: dict[type, tuple[str, str]] = {
    SessionRecord: ("sessions", "session_id"),
    LaneRecord: ("lanes", "lane"),
    SamplerRecord: ("samplers", "key"),
    LossRecord: ("losses", "loss_id"),
}


@attrs.frozen
class NamedRow:
    """A row that replaces the last one of its key."""

    table: str
    key: str
    body: bytes


Row = NamedRow | Change


def as_row(record: Record) -> Row:
    """Return a record as what is written.

    Raises:
        JournalError: it holds what can not be stored.
    """
    if isinstance(record, Named):
        table, key = _TABLES[type(record)]
        return NamedRow(table, getattr(record, key), encode(record))
    return record


def weight(row: Row) -> int:
    """Return about how many bytes a row takes."""
    return OVERHEAD + len(getattr(row, "body", b"")) + len(getattr(row, "gradients", None) or b"")


def is_one(row: Row) -> bool:
    """Whether a row is written by a statement that is a transaction of its own."""
    return isinstance(row, RequestRecord) or (isinstance(row, ResultRecord) and row.gradients is None)


def write(db: Connection, row: Row, keep: int) -> list[str]:
    """Write a row, inside a transaction unless it ``is_one``.

    Args:
        keep: snapshots of a lane that stay.

    Returns:
        snapshot files that are not needed any more once this is committed.

    Raises:
        JournalError: it contradicts what is written.
    """
    if isinstance(row, SnapshotRecord):
        return _snapshot(db, row, keep)
    if isinstance(row, ForgetRecord):
        return _forget(db, row)
    _WRITE[type(row)](db, row)
    return []


def _named(db: Connection, row: NamedRow) -> None:
    values = (row.key, row.body, seal(row.table, row.key, row.body))
    db.execute(f"INSERT OR REPLACE INTO {row.table} VALUES (?, ?, ?)", values)


def _request(db: Connection, row: RequestRecord) -> None:
    key, cells = (row.lane, row.number), (row.lane, row.number, row.owner, row.kind, row.body)
    covered = "SELECT 1 FROM snapshots WHERE lane = ? AND number >= ?"
    insert = f"INSERT INTO requests SELECT ?, ?, ?, ?, ?, ? WHERE NOT EXISTS ({covered}) {_ONCE}"
    if not db.execute(insert, (*cells, seal("requests", *cells), *key)).rowcount:
        raise _twice(*key, "accepted")


def _result(db: Connection, row: ResultRecord) -> None:
    key, settled = (row.lane, row.number), float(row.settled)
    whole = "lane, number, owner, kind"
    insert = f"INSERT INTO results SELECT {whole}, ?, NULL, ?, seal('results', {whole}, ?, ?) FROM requests"
    values = (settled, row.body, settled, row.body, *key)
    if not db.execute(f"{insert} WHERE lane = ? AND number = ? {_ONCE}", values).rowcount:
        if db.execute("SELECT 1 FROM requests WHERE lane = ? AND number = ?", key).fetchone() is not None:
            raise _twice(*key, "settled")
        message = f"request {row.number} of lane {row.lane!r} is not in the journal, so it can have no result"
        raise JournalError(message, lane=row.lane, number=row.number)
    if row.gradients is not None:
        db.execute(
            "INSERT INTO gradients VALUES (?, ?, ?, ?)", (*key, row.gradients, seal("gradients", *key, row.gradients))
        )


def _fetched(db: Connection, row: FetchedRecord) -> None:
    where = "WHERE lane = ? AND number IN (SELECT value FROM json_each(?)) AND fetched IS NULL"
    db.execute(f"UPDATE results SET fetched = ? {where}", (float(row.fetched), row.lane, json.dumps(row.numbers)))


def _skipped(db: Connection, row: SkippedRecord) -> None:
    cells = (row.lane, row.first, row.last)
    taken = db.execute("SELECT 1 FROM requests WHERE lane = ? AND number BETWEEN ? AND ?", cells).fetchone()
    if taken is not None or row.first > row.last:
        raise JournalError(f"not all of {row.first} to {row.last} are missing in lane {row.lane!r}", lane=row.lane)
    db.execute("INSERT INTO skipped VALUES (?, ?, ?, ?)", (*cells, seal("skipped", *cells)))


def _back(db: Connection, row: BackRecord) -> None:
    cells = (row.lane, row.boots, row.number, row.again, row.why)
    db.execute("INSERT OR REPLACE INTO back VALUES (?, ?, ?, ?, ?, ?)", (*cells, seal("back", *cells)))


def _snapshot(db: Connection, row: SnapshotRecord, keep: int) -> list[str]:
    waiting = _unsettled(db, row.lane, row.number)
    if waiting is not None:
        message = f"a snapshot can not cover request {waiting} of lane {row.lane!r}: its result is not in the journal"
        raise JournalError(message, lane=row.lane, number=waiting)
    query = "SELECT number, file FROM snapshots WHERE lane = ? ORDER BY number DESC"
    older: list[tuple[int, str]] = db.execute(query, (row.lane,)).fetchall()
    if older and older[0][0] >= row.number:
        raise _twice(row.lane, row.number, "covered by a snapshot")
    cells = (row.lane, row.number, row.file, row.size, row.checksum)
    db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?)", (*cells, seal("snapshots", *cells)))
    for number, _ in older[keep - 1 :]:
        db.execute("DELETE FROM snapshots WHERE lane = ? AND number = ?", (row.lane, number))
    return [file for _, file in older[keep - 1 :]]


def _forget(db: Connection, row: ForgetRecord) -> list[str]:
    if row.table not in NAMED:
        raise JournalError(f"{row.table!r} is none of {', '.join(NAMED)}")
    db.execute(f"DELETE FROM {row.table} WHERE key = ?", (row.key,))
    if row.table != "lanes":
        return []
    waiting = _unsettled(db, row.key, 2**62)
    if waiting is not None and not row.unsettled:
        message = f"lane {row.key!r} can not be forgotten before its request {waiting} is settled"
        raise JournalError(message, lane=row.key, number=waiting)
    files = db.execute("SELECT file FROM snapshots WHERE lane = ?", (row.key,)).fetchall()
    for table in ("requests", "gradients", "skipped", "snapshots", "back"):
        db.execute(f"DELETE FROM {table} WHERE lane = ?", (row.key,))
    return [file for (file,) in files]


def _unsettled(db: Connection, lane: str, until: int) -> int | None:
    """Return the first request without a result among those up to a number."""
    answered = "SELECT 1 FROM results WHERE results.lane = requests.lane AND results.number = requests.number"
    query = f"SELECT min(number) FROM requests WHERE lane = ? AND number <= ? AND NOT EXISTS ({answered})"
    (found,) = db.execute(query, (lane, until)).fetchone()
    return None if found is None else int(found)


def _twice(lane: str, number: int, what: str) -> JournalError:
    return JournalError(f"request {number} of lane {lane!r} is already {what}", lane=lane, number=number)


_WRITE: dict[type, Callable[[Connection, Any], None]] = {
    NamedRow: _named,
    RequestRecord: _request,
    ResultRecord: _result,
    FetchedRecord: _fetched,
    SkippedRecord: _skipped,
    BackRecord: _back,
    TrimRecord: trim,
}
