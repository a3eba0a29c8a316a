"""``Database``: the file of a journal, opened by one process, checked before anything is read from it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tickwork.errors import JournalError
from tickwork.files import sync, write_json
from tickwork.journal.lock import Lock
from tickwork.journal.witness import lost_pages

FORMAT = 1
NAMED = ("sessions", "lanes", "samplers", "losses")
# "process": what was acknowledged outlives the process. "power": the machine too, at one sync for each group.
Durability = Literal["process", "power"]

_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    *(f"CREATE TABLE {name} (key TEXT PRIMARY KEY, body BLOB NOT NULL, seal BLOB NOT NULL)" for name in NAMED),
    """CREATE TABLE requests (lane TEXT NOT NULL, number INTEGER NOT NULL, owner TEXT NOT NULL, kind TEXT NOT NULL,
        body BLOB NOT NULL, seal BLOB NOT NULL, UNIQUE (lane, number))""",
    """CREATE TABLE results (lane TEXT NOT NULL, number INTEGER NOT NULL, owner TEXT NOT NULL, kind TEXT NOT NULL,
        settled REAL NOT NULL, fetched REAL, body BLOB, seal BLOB NOT NULL, UNIQUE (lane, number))""",
    """CREATE TABLE gradients (lane TEXT NOT NULL, number INTEGER NOT NULL, body BLOB NOT NULL, seal BLOB NOT NULL,
        UNIQUE (lane, number))""",
    """CREATE TABLE skipped (lane TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, seal BLOB NOT NULL,
        UNIQUE (lane, first))""",
    """CREATE TABLE snapshots (lane TEXT NOT NULL, number INTEGER NOT NULL, file TEXT NOT NULL, size INTEGER NOT NULL,
        checksum TEXT NOT NULL, seal BLOB NOT NULL, UNIQUE (lane, number))""",
    f"INSERT INTO meta VALUES ('format', {FORMAT}), ('boots', 0)",
)


class Database:
    """An open journal file.

    Args:
        folder: made if it is not there.
        durability: what it survives.

    Raises:
        JournalError: in use by another process, not writable, damaged, cut short, or of another version.

    Room: one thread at a time.
    """

    def __init__(self, folder: Path, durability: Durability = "process") -> None:
        self.folder, self.file = folder, folder / "journal.sqlite3"
        with self.named("open"):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(folder / "lock")
        try:
            with self.named("open"):
                self.connection = self._connect(durability)
                self.boots = self._boot()
        except BaseException:
            self.abandon()
            raise

    def close(self) -> None:
        """Close the file and let the next process in."""
        with self.named("close"):
            self.abandon()

    def abandon(self) -> None:
        """Let go of everything, whatever state it is in."""
        try:
            if hasattr(self, "connection"):
                self.connection.close()
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def named(self, act: str) -> Iterator[None]:
        """Turn what SQLite and the disk raise into a ``JournalError`` that says what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._explained(act, error) from error
        except OSError as error:
            raise JournalError(
                f"can not {act} the journal in {self.folder}: {error}; it needs a folder it can write"
            ) from error

    def _connect(self, durability: Durability) -> sqlite3.Connection:
        known = self.folder / "format.json"
        if known.exists() and not (self.file.exists() and self.file.stat().st_size):
            raise self._damaged("its file is gone or empty")
        self._check_log()
        # Handed from the thread that opens it to the one that writes.
        connection = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False, timeout=0)
        self.connection = connection
        self._prepare(connection, durability)
        self._check(connection)
        if not known.exists():
            write_json(known, {"format": FORMAT})
        return connection

    def _prepare(self, connection: sqlite3.Connection, durability: Durability) -> None:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables:
            self._check_format(connection)
        else:
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={'FULL' if durability == 'power' else 'NORMAL'}")
        connection.execute("PRAGMA journal_size_limit=16777216")
        connection.execute("PRAGMA secure_delete=FAST")
        if not tables:
            for line in ("BEGIN IMMEDIATE", *_SCHEMA, "COMMIT"):
                connection.execute(line)
            sync(self.folder)

    def _check_format(self, connection: sqlite3.Connection) -> None:
        try:
            (found,) = connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
        except (sqlite3.OperationalError, TypeError):
            raise JournalError(f"{self.file} is no journal: give this process a store of its own") from None
        if found != FORMAT:
            raise JournalError(
                f"the journal in {self.folder} is of format {found}; this version of Tickwork reads {FORMAT}: "
                f"use the version that wrote it, or move the folder away to start without it"
            )

    def _check_log(self) -> None:
        lost = lost_pages(self.file)
        if lost:
            raise JournalError(
                f"{self.file}-wal lacks {lost} pages that were committed: it is damaged or was cut short. "
                f"Bring it back from a copy; or delete {self.file}-shm to go on without what those pages held"
            )

    def _check(self, connection: sqlite3.Connection) -> None:
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(verdict)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _boot(self) -> int:
        self.connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'boots'")
        (boots,) = self.connection.execute("SELECT value FROM meta WHERE name = 'boots'").fetchone()
        return int(boots)

    def _damaged(self, what: object) -> JournalError:
        return JournalError(
            f"the journal in {self.folder} is damaged: {what}. Bring it back from a copy; or move the folder away to "
            f"start without what was in flight: checkpoints are not in it"
        )

    def _explained(self, act: str, error: sqlite3.DatabaseError) -> JournalError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return JournalError(
                f"the disk of {self.folder} is full: make room and start again; what was acknowledged is there"
            )
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(error)
        return JournalError(f"can not {act} the journal in {self.folder}: {error}; it needs a folder it can write")
