"""``Writer``: writes to the journal, what is small at once, the rest in a thread where what waits shares a commit."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Sequence

import attrs

from tickwork.errors import ClosedError, JournalError, QueueFullError, fresh
from tickwork.futures import Inner
from tickwork.journal.database import Database
from tickwork.journal.records import Record
from tickwork.journal.rows import Row, as_row, is_one, weight, write
from tickwork.journal.snapshots import Hook, Snapshots

# Bytes of a record that is written by whoever appends it, in some 0.05 ms: a thread takes longer to wake. Once that
# has taken SLOW seconds, the thread writes everything for BESIDE seconds: the disk is busy.
SMALL, SLOW, BESIDE = 32 * 1024, 0.01, 1.0
# About the pages of a row besides its body, and the pages of the log after which it is brought into the file: 16 MiB.
PAGES, PAGE, CHECKPOINT = 5, 4096, 4096

# What is wrong with one record alone.
_OWN = (
    *(JournalError, sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError),
    *(OverflowError, TypeError, ValueError),
)


def _running() -> Inner[None]:
    future: Inner[None] = Inner()
    # Running from the start: else cancelling one waiter would cancel the future.
    future.set_running_or_notify_cancel()
    return future


@attrs.frozen(eq=False)
class _Post:
    rows: tuple[Row, ...]
    weight: int
    durable: Inner[None] = attrs.Factory(_running)


# What every small record that is written at once shares.
_DURABLE = _running()
_DURABLE.set_result(None)


class Writer:
    """Writes records in the order in which they are appended.

    Args:
        database: used by the writer's thread alone from here on.
        snapshots: where files that are not needed any more are removed.
        limit: bytes of everything appended and not yet durable; further records are refused for now.
        keep: snapshots of each lane that stay.
        at: told ``write``, ``commit``, ``settle``, ``remove`` before each is done.
        at_once: whether whoever appends a small record writes it, where nobody else writes; see ``Journal``.

    Room: any thread; futures are settled before ``append`` returns or in the writer's thread, where callbacks must be
    quick.
    """

    def __init__(
        self, database: Database, snapshots: Snapshots, limit: int, keep: int, at: Hook, *, at_once: bool = False
    ) -> None:
        self._database, self._snapshots = database, snapshots
        self._limit, self._keep, self._at = limit, keep, at
        self._changed = threading.Condition()
        self._posts: list[_Post] = []
        self._inside = 0
        self._waiting: list[Inner[None]] = []
        self._refusal: Exception | None = None
        self._may = at_once
        self._writing = False  # the database is in use, by whichever thread
        self._beside_until = 0.0
        self._pages = 0  # of the log, about
        self._thread = threading.Thread(target=self._main, name="tickwork-journal", daemon=True)
        self._thread.start()

    def append(self, records: Sequence[Record]) -> Inner[None]:
        """Write records, all or none of them, after everything appended before.

        Returns:
            what is settled once they are durable; or fails, alone where these records contradict the journal, with
            all that follow where the disk does not take them.

        Raises:
            QueueFullError: there is no room now; see ``room``. Never while the writer is idle, whatever the size.
            JournalError: a record holds what can not be stored.
        """
        rows = tuple(map(as_row, records))
        size = sum(map(weight, rows))
        if self._turn_at_once(rows, size):
            return self._at_once(rows[0], size)
        post = _Post(rows, size)
        with self._changed:
            if self._refusal is not None:
                post.durable.set_exception(fresh(self._refusal))
                return post.durable
            if self._inside and self._inside + post.weight > self._limit:
                raise QueueFullError(f"{self._inside} bytes wait for the disk: wait for room in the journal")
            self._inside += post.weight
            self._posts.append(post)
            self._changed.notify()
        return post.durable

    @property
    def failure(self) -> Exception | None:
        """Why everything is refused, or None."""
        return self._refusal

    def room(self) -> Inner[None]:
        """Return what is settled as soon as less than half the limit waits for the disk."""
        ticket = _running()
        with self._changed:
            self._waiting.append(ticket)
            tickets = self._let_in()
        _settle(tickets)
        return ticket

    def close(self) -> None:
        """Write everything appended, then end."""
        with self._changed:
            self._refusal = self._refusal or ClosedError("the journal is closed")
            self._changed.notify()
        self._thread.join()

    def _turn_at_once(self, rows: Sequence[Row], size: int) -> bool:
        """Take the database for a small record, where nobody writes, nothing waits and the disk is quick."""
        if not self._may or len(rows) != 1 or size > SMALL or not is_one(rows[0]):
            return False
        with self._changed:
            busy = self._writing or self._posts or self._refusal is not None
            if busy or self._pages >= CHECKPOINT or time.monotonic() < self._beside_until:
                return False
            self._writing = True
            return True

    def _at_once(self, row: Row, size: int) -> Inner[None]:
        begun, durable = time.monotonic(), _DURABLE
        try:
            with self._database.named("write"):
                refusal = self._write_one(row)
            self._wrote(1, size)
            self._at("settle")
        except BaseException as error:
            self._die(error, [dead := _Post((row,), size)])
            return dead.durable
        if (now := time.monotonic()) - begun > SLOW:
            self._beside_until = now + BESIDE
        if refusal is not None:
            durable = _running()
            durable.set_exception(refusal)
        self._free()
        return durable

    def _main(self) -> None:
        while posts := self._take():
            try:
                done = self._write(posts)
            except BaseException as error:
                self._die(error, posts)
                return
            self._leave(posts)
            _tell(done)
            self._checkpoint()
            self._free()

    def _take(self) -> list[_Post]:
        """Wait for something to write, and for the database."""
        with self._changed:
            while self._writing or not (self._posts or self._refusal):
                self._changed.wait()
            posts, self._posts = self._posts, []
            self._writing = bool(posts)
            return posts

    def _free(self) -> None:
        with self._changed:
            self._writing = False
            if self._posts or self._refusal:
                self._changed.notify()

    def _checkpoint(self) -> None:
        """Bring the log into the file, now and then; it is as durable before, so that this fails is no matter."""
        if self._pages >= CHECKPOINT:
            self._pages = 0
            with contextlib.suppress(sqlite3.Error):  # what is damaged is told by the next write
                self._database.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _write(self, posts: list[_Post]) -> list[tuple[_Post, JournalError | None]]:
        gone: list[str] = []
        first, rows = posts[0], sum(len(post.rows) for post in posts)
        # After each statement this thread waits for the interpreter, which the device wants as well.
        one = rows == 1 and is_one(first.rows[0])
        with self._database.named("write"):
            done = [(first, self._write_one(first.rows[0]))] if one else self._write_all(posts, gone)
        self._wrote(rows, sum(post.weight for post in posts))
        self._at("remove")
        with contextlib.suppress(OSError):  # it goes when the journal is next opened
            self._snapshots.remove(gone)
        self._at("settle")
        return done

    def _wrote(self, rows: int, size: int) -> None:
        self._pages += PAGES * rows + size // PAGE

    def _write_one(self, row: Row) -> JournalError | None:
        self._at("write")
        self._at("commit")
        try:
            write(self._database.connection, row, self._keep)
        except _OWN as error:
            return _refusal(error)
        return None

    def _write_all(self, posts: list[_Post], gone: list[str]) -> list[tuple[_Post, JournalError | None]]:
        db, done = self._database.connection, []
        db.execute("BEGIN IMMEDIATE")
        for post in posts:
            refusal = None
            db.execute("SAVEPOINT post")
            try:
                gone += self._write_post(db, post)
            except _OWN as error:
                db.execute("ROLLBACK TO post")
                refusal = _refusal(error)
            db.execute("RELEASE post")
            done.append((post, refusal))
        self._at("commit")
        db.execute("COMMIT")
        return done

    def _write_post(self, db: sqlite3.Connection, post: _Post) -> list[str]:
        gone: list[str] = []
        for row in post.rows:
            self._at("write")
            gone += write(db, row, self._keep)
        return gone

    def _leave(self, posts: list[_Post]) -> None:
        with self._changed:
            self._inside -= sum(post.weight for post in posts)
            tickets = self._let_in()
        _settle(tickets)

    def _let_in(self) -> list[Inner[None]]:
        if 2 * self._inside >= self._limit and self._refusal is None:
            return []
        tickets, self._waiting = self._waiting, []
        return tickets

    def _die(self, cause: BaseException, posts: list[_Post]) -> None:
        """Fail everything, now and later: after a failed write nobody knows what a next one would find."""
        death = cause if isinstance(cause, JournalError) else JournalError(f"the journal's writer died: {cause!r}")
        with self._changed:
            self._refusal, self._writing = death, False
            posts, self._posts = posts + self._posts, []
            tickets = self._let_in()
            self._changed.notify()
        for post in posts:
            post.durable.set_exception(fresh(death))
        _settle(tickets)


def _tell(done: Sequence[tuple[_Post, JournalError | None]]) -> None:
    for post, refusal in done:
        if refusal is None:
            post.durable.set_result(None)
        else:
            post.durable.set_exception(refusal)


def _settle(tickets: Sequence[Inner[None]]) -> None:
    for ticket in tickets:
        ticket.set_result(None)


def _refusal(error: Exception) -> JournalError:
    return error if isinstance(error, JournalError) else JournalError(f"a record can not be stored: {error}")
