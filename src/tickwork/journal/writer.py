"""``Writer``: the one thread that writes to the journal; what waits for it shares a commit."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Sequence

import attrs

from tickwork.errors import ClosedError, JournalError, QueueFullError, fresh
from tickwork.futures import Inner
from tickwork.journal.database import Database
from tickwork.journal.records import Record
from tickwork.journal.rows import Row, as_row, is_one, weight, write
from tickwork.journal.snapshots import Hook, Snapshots

# What is wrong with one record alone.
_OWN = (
    *(JournalError, sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError),
    *(OverflowError, TypeError, ValueError),
)


@attrs.frozen(eq=False)
class _Post:
    rows: tuple[Row, ...]
    weight: int
    durable: Inner[None]


def _running() -> Inner[None]:
    future: Inner[None] = Inner()
    # Running from the start: else cancelling one waiter would cancel the future.
    future.set_running_or_notify_cancel()
    return future


class Writer:
    """Writes records in the order in which they are appended.

    Args:
        database: used by the writer's thread alone from here on.
        snapshots: where files that are not needed any more are removed.
        limit: bytes of everything appended and not yet durable; further records are refused for now.
        keep: snapshots of each lane that stay.
        at: told ``write``, ``commit``, ``settle``, ``remove`` before each is done.

    Room: any thread; futures are settled in the writer's thread, where callbacks must be quick.
    """

    def __init__(self, database: Database, snapshots: Snapshots, limit: int, keep: int, at: Hook) -> None:
        self._database, self._snapshots = database, snapshots
        self._limit, self._keep, self._at = limit, keep, at
        self._changed = threading.Condition()
        self._posts: list[_Post] = []
        self._inside = 0
        self._waiting: list[Inner[None]] = []
        self._refusal: Exception | None = None
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
        post = _Post(rows, sum(map(weight, rows)), _running())
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

    def _main(self) -> None:
        while posts := self._take():
            try:
                done = self._write(posts)
            except BaseException as error:
                self._die(error, posts)
                return
            self._leave(posts)
            for post, refusal in done:
                if refusal is None:
                    post.durable.set_result(None)
                else:
                    post.durable.set_exception(refusal)

    def _take(self) -> list[_Post]:
        with self._changed:
            while not self._posts and self._refusal is None:
                self._changed.wait()
            posts, self._posts = self._posts, []
            return posts

    def _write(self, posts: list[_Post]) -> list[tuple[_Post, JournalError | None]]:
        gone: list[str] = []
        # After each statement this thread waits for the interpreter, which the device wants as well.
        small = len(posts) == len(posts[0].rows) == 1 and is_one(posts[0].rows[0])
        with self._database.named("write"):
            done = [(posts[0], self._write_one(posts[0]))] if small else self._write_all(posts, gone)
        self._at("remove")
        with contextlib.suppress(OSError):  # it goes when the journal is next opened
            self._snapshots.remove(gone)
        self._at("settle")
        return done

    def _write_one(self, post: _Post) -> JournalError | None:
        self._at("write")
        self._at("commit")
        try:
            write(self._database.connection, post.rows[0], self._keep)
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
            self._refusal = death
            posts, self._posts = posts + self._posts, []
            tickets = self._let_in()
        for post in posts:
            post.durable.set_exception(fresh(death))
        _settle(tickets)


def _settle(tickets: Sequence[Inner[None]]) -> None:
    for ticket in tickets:
        ticket.set_result(None)


def _refusal(error: Exception) -> JournalError:
    return error if isinstance(error, JournalError) else JournalError(f"a record can not be stored: {error}")
