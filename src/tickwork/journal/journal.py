"""``Journal``: what was accepted in a store folder, and what became of it.

::

    STORE/journal/lock                  held by the one process that has it open
    STORE/journal/journal.sqlite3       requests, results, sessions ...
    STORE/journal/snapshots/            states of training models, named by the rows of the file above
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tickwork.errors import QueueFullError
from tickwork.futures import Inner
from tickwork.journal.database import Database, Durability
from tickwork.journal.records import Record, SnapshotRecord, TrimRecord
from tickwork.journal.recovery import Recovered, recover
from tickwork.journal.snapshots import Hook, Snapshot, Snapshots, nothing
from tickwork.journal.writer import Writer

# Bytes of what may wait for the disk.
LIMIT = 2**26


class Journal:
    """Opens the journal of a store folder, or makes one.

    Args:
        store: the store folder.
        durability: ``"process"`` outlives the end of the process, however it comes; ``"power"`` that of the machine
            as well, and syncs the disk before anything is acknowledged.
        limit: bytes appended and not yet durable, past which more is refused for now.
        keep: newest snapshots of each lane that stay; requests are kept back to the oldest of them.
        at: told the name of each point at which a crash would matter, just before it; for tests.
        at_once: whether ``append`` writes a small record itself where nobody else is writing, which takes some 0.05 ms;
            a thread takes longer to wake. It then waits for the disk only where that is slower than writing to memory,
            and for a second after that it does not. Not for ``"power"``, where each commit waits for the disk.

    Raises:
        JournalError: in use by another process, not writable, damaged as a whole, or of another version. Damaged rows
            are told by ``recovered`` instead.

    Room: any thread; ``append`` and ``room`` never block, ``append`` but for ``at_once``.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        *,
        durability: Durability = "process",
        limit: int = LIMIT,
        keep: int = 1,
        at: Hook = nothing,
        at_once: bool = False,
    ) -> None:
        folder = Path(store).absolute() / "journal"
        self._database = Database(folder, durability)
        self._snapshots = Snapshots(folder / "snapshots", at)
        try:
            with self._database.named("read"):
                self.recovered: Recovered = recover(self._database.connection, self._snapshots, self._database.boots)
                self._sweep()
        except BaseException:
            self._database.abandon()
            raise
        self._writer = Writer(self._database, self._snapshots, limit, keep, at, at_once=at_once)

    def append(self, records: Sequence[Record]) -> Inner[None]:
        """Write records, all or none of them, after everything appended before; see ``Writer.append``.

        Raises:
            QueueFullError: there is no room now.
            JournalError: a record holds what can not be stored.
        """
        return self._writer.append(records)

    @property
    def failure(self) -> Exception | None:
        """Why nothing can be written any more, or None."""
        return self._writer.failure

    def room(self) -> Inner[None]:
        """Return what is settled once there is room to append again."""
        return self._writer.room()

    def write_snapshot(self, lane: str, number: int, snapshot: Snapshot, before: Sequence[Record] = ()) -> Inner[None]:
        """Write the state of a lane after all its requests up to ``number``, whose results have been appended.

        Args:
            before: appended together with it, just before it.

        Room: a worker thread: it writes to the disk before it returns.

        Returns:
            what is settled once the snapshot stands in for those requests; older ones are then removed.

        Raises:
            QueueFullError: there is no room now.
            JournalError: the disk, or what can not be stored; the last snapshot still stands.
        """
        record = self._snapshots.write(lane, number, snapshot)
        try:
            return self._writer.append([*before, record])
        except QueueFullError:
            self._snapshots.remove([record.file])
            raise

    def trim(self, settled_before: float, fetched_before: float) -> Inner[None]:
        """Let go of requests that a snapshot covers, and of results settled or fetched before those times.

        Args:
            settled_before: seconds since the epoch.
            fetched_before: seconds since the epoch.

        Raises:
            QueueFullError: there is no room now.
        """
        return self._writer.append([TrimRecord(settled_before, fetched_before)])

    def read_snapshot(self, record: SnapshotRecord) -> Snapshot:
        """Return a snapshot that ``recovered`` tells of.

        Raises:
            JournalError: it is damaged.
        """
        return self._snapshots.read(record)

    def close(self) -> None:
        """Write everything appended and let the next process in. May be called again."""
        self._writer.close()
        self._database.close()

    def _sweep(self) -> None:
        names = self._database.connection.execute("SELECT file FROM snapshots").fetchall()
        self._snapshots.sweep({name for (name,) in names})
