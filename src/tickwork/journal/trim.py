"""``trim``: what no recovery and no client will ask for any more."""

from __future__ import annotations

from sqlite3 import Connection

from tickwork.journal.codec import is_error
from tickwork.journal.records import IN_PROCESS, TrimRecord
from tickwork.journal.seals import seal

# Pages given back to the file system at a time.
PAGES = 4096

_COVERED = "number <= (SELECT min(number) FROM snapshots WHERE snapshots.lane = {0}.lane)"
_OF_REQUEST = "results.lane = requests.lane AND results.number = requests.number"
# A lane without order is never replayed.
_LOOSE = "lane NOT IN (SELECT key FROM lanes)"
_EXPIRED = "(settled < :settled OR fetched < :fetched)"
# Whose rows: those of one lane, or of everybody but the services in process.
_MEANT = "(lane = :lane OR (:lane IS NULL AND owner <> :process))"


def trim(db: Connection, record: TrimRecord) -> None:
    """Delete requests that a snapshot covers, and results that were fetched or that nobody has fetched for long.

    The results of requests that may be replayed lose their body only; errors keep it, since they are not replayed.
    """
    terms = {
        "settled": record.settled_before,
        "fetched": record.fetched_before,
        "lane": record.lane,
        "process": IN_PROCESS,
    }
    db.execute(f"DELETE FROM requests WHERE {_MEANT} AND {_COVERED.format('requests')}", terms)
    db.execute(f"DELETE FROM gradients WHERE {_COVERED.format('gradients')}")
    answered = f"EXISTS (SELECT 1 FROM results WHERE {_OF_REQUEST} AND {_EXPIRED})"
    db.execute(f"DELETE FROM requests WHERE {_MEANT} AND {_LOOSE} AND {answered}", terms)
    unasked = f"NOT EXISTS (SELECT 1 FROM requests WHERE {_OF_REQUEST})"
    db.execute(f"DELETE FROM results WHERE {_MEANT} AND {_EXPIRED} AND {unasked}", terms)
    _drop_bodies(db, terms)
    db.execute(f"PRAGMA incremental_vacuum({PAGES})").fetchall()


def _drop_bodies(db: Connection, terms: dict[str, float | str | None]) -> None:
    columns = "lane, number, owner, kind, settled"
    query = f"SELECT body, {columns} FROM results WHERE {_MEANT} AND {_EXPIRED} AND body IS NOT NULL"
    found = [cells for body, *cells in db.execute(query, terms) if not is_error(body)]
    update = "UPDATE results SET body = NULL, seal = ? WHERE lane = ? AND number = ?"
    db.executemany(update, [(seal("results", *cells, None), cells[0], cells[1]) for cells in found])
