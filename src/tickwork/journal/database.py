"""``Database``: the file of a journal, opened by one process, checked before anything is read from it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Literal

from tickwork.files import sync, write_json
from tickwork.journal.file import FORMAT, JournalFile
from tickwork.journal.lock import Lock
from tickwork.journal.seals import seal

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
# For whoever looks on: nothing is brought back from it, so the format is the same with and without.
_BACK = """CREATE TABLE IF NOT EXISTS back (lane TEXT PRIMARY KEY, boots INTEGER NOT NULL, number INTEGER NOT NULL,
    again INTEGER NOT NULL, why TEXT, seal BLOB NOT NULL)"""


class Database(JournalFile):
    """An open journal file.

    Args:
        folder: made if it is not there.
        durability: what it survives.

    Raises:
        JournalError: in use by another process, not writable, damaged, cut short, or of another version.

    Room: one thread at a time.
    """

    def __init__(self, folder: Path, durability: Durability = "process") -> None:
        super().__init__(folder, "a folder it can write")
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

    def _connect(self, durability: Durability) -> sqlite3.Connection:
        self.check_there()
        self.check_log()
        # Handed from the thread that opens it to the one that writes.
        connection = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False, timeout=0)
        self.connection = connection
        self._prepare(connection, durability)
        self.check_pages(connection)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute(_BACK)
        if not self.known.exists():
            write_json(self.known, {"format": FORMAT})
        return connection

    def _prepare(self, connection: sqlite3.Connection, durability: Durability) -> None:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables:
            self.check_format(connection)
        else:
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={'FULL' if durability == 'power' else 'NORMAL'}")
        connection.execute("PRAGMA wal_autocheckpoint=0")  # a commit would wait for it; the writer sees to it
        connection.execute("PRAGMA journal_size_limit=16777216")
        connection.execute("PRAGMA secure_delete=FAST")
        connection.create_function("seal", -1, seal, deterministic=True)
        if not tables:
            for line in ("BEGIN IMMEDIATE", *_SCHEMA, "COMMIT"):
                connection.execute(line)
            sync(self.folder)

    def _boot(self) -> int:
        self.connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'boots'")
        (boots,) = self.connection.execute("SELECT value FROM meta WHERE name = 'boots'").fetchone()
        return int(boots)
