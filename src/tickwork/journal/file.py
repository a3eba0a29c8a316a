"""``JournalFile``: where a journal lies, and what is wrong with it, by name."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from tickwork.errors import JournalError
from tickwork.journal.witness import lost_pages

FORMAT = 1


class JournalFile:
    """The folder of a journal and the checks that come before anything is read from it.

    Args:
        folder: that of the journal, not of the store.
        needs: what whoever opens it needs.
    """

    def __init__(self, folder: Path, needs: str) -> None:
        self.folder, self.file, self.known = folder, folder / "journal.sqlite3", folder / "format.json"
        self._needs = needs

    @contextlib.contextmanager
    def named(self, act: str) -> Iterator[None]:
        """Turn what SQLite and the disk raise into a ``JournalError`` that says what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._explained(act, error) from error
        except OSError as error:
            raise JournalError(
                f"can not {act} the journal in {self.folder}: {error}; it needs {self._needs}"
            ) from error

    def check_there(self) -> None:
        """Miss a file that was there.

        Raises:
            JournalError: it is gone or empty.
        """
        if self.known.exists() and not (self.file.exists() and self.file.stat().st_size):
            raise self._damaged("its file is gone or empty")

    def check_log(self) -> None:
        """Miss what was committed to the log; only while nobody has the file open.

        Raises:
            JournalError: pages are lost.
        """
        lost = lost_pages(self.file)
        if lost:
            raise JournalError(
                f"{self.file}-wal lacks {lost} pages that were committed: it is damaged or was cut short. "
                f"Bring it back from a copy; or delete {self.file}-shm to go on without what those pages held"
            )

    def check_format(self, connection: sqlite3.Connection) -> None:
        """Refuse what is not a journal, or one of another version.

        Raises:
            JournalError: naming the version.
        """
        try:
            (found,) = connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
        except (sqlite3.OperationalError, TypeError):
            raise JournalError(f"{self.file} is no journal: give this process a store of its own") from None
        if found != FORMAT:
            raise JournalError(
                f"the journal in {self.folder} is of format {found}; this version of Tickwork reads {FORMAT}: "
                f"use the version that wrote it, or move the folder away to start without it"
            )

    def check_pages(self, connection: sqlite3.Connection) -> None:
        """Read every page.

        Raises:
            JournalError: what is wrong with the first that is damaged.
        """
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(verdict)

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
        return JournalError(f"can not {act} the journal in {self.folder}: {error}; it needs {self._needs}")
