"""Tests of the journal's file: one process at a time, and whatever is wrong with it is named when it is opened."""

from __future__ import annotations

import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tickwork.journal.lock as lock_module
from journals import GUARD, change, crashed, database, fill, flip, lane, numbers, put, request, result, state
from tickwork.errors import JournalError
from tickwork.journal.journal import Journal
from tickwork.journal.witness import committed, lost_pages

HOLDER = """
import sys
from tickwork.journal.journal import Journal
journal = Journal(sys.argv[1])
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a closed journal of some requests."""
    journal = Journal(tmp_path / "store")
    fill(journal, 6, settled=3)
    journal.close()
    return tmp_path / "store"


def refused(store: Path) -> str:
    """Open a journal that can not be opened, and return why."""
    with pytest.raises(JournalError) as caught:
        Journal(store)
    return str(caught.value)


def test_a_journal_is_opened_again(store: Path) -> None:
    """A closed journal is read as it was left, its openings are counted, and nothing but its files is left."""
    journal = Journal(store)
    assert numbers(journal.recovered.lanes[0].requests) == [0, 1, 2, 3, 4, 5]
    assert numbers(journal.recovered.results) == [0, 1, 2]
    assert journal.recovered.boots == 2
    journal.close()
    journal.close()
    assert {file.name for file in (store / "journal").iterdir()} == {"format.json", "journal.sqlite3", "lock"}


def test_one_folder_has_one_holder(store: Path) -> None:
    """A second journal on one store is told who holds it, in this process and from another, until that one ends."""
    command = [sys.executable, "-c", HOLDER, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        assert f"is in use by process {child.pid}: end that one" in refused(store)
        child.send_signal(signal.SIGKILL)
    journal = Journal(store)
    assert f"in use by process {os.getpid()}" in refused(store)
    journal.close()
    Journal(store).close()


@pytest.mark.parametrize("place", ["/proc/tickwork", "/sys/tickwork", "file/store"])
def test_a_folder_that_can_not_be_written_is_named(place: str, tmp_path: Path) -> None:
    """File systems that are read-only, and a file in the place of a folder."""
    (tmp_path / "file").touch()
    why = refused(tmp_path / place)
    assert "can not open the journal" in why
    assert "it needs a folder it can write" in why


def test_a_store_that_became_read_only_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock can not be taken on a file system that was mounted read-only."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(lock_module.os, "open", refuse)
    assert "Read-only file system; it needs a folder it can write" in refused(store)


@pytest.mark.parametrize("found", [0, 2])
def test_other_versions_are_refused(store: Path, found: int) -> None:
    """An older and a newer format are named with their number, and nothing is changed."""
    change(store, "UPDATE meta SET value = ? WHERE name = 'format'", found)
    before = database(store).read_bytes()
    assert f"is of format {found}; this version of Tickwork reads 1" in refused(store)
    assert database(store).read_bytes() == before


def test_somebody_elses_file_is_refused(tmp_path: Path) -> None:
    """Another database, or no database at all, is not taken over."""
    (tmp_path / "journal").mkdir()
    other = sqlite3.connect(database(tmp_path))
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    assert "is no journal" in refused(tmp_path)
    database(tmp_path).write_bytes(b"not a database, but long enough to be looked at " * 100)
    assert "is damaged" in refused(tmp_path)


def test_a_file_that_is_gone_is_missed(store: Path) -> None:
    """A journal that was there is not replaced by an empty one."""
    raw = database(store).read_bytes()
    database(store).unlink()
    assert "its file is gone or empty" in refused(store)
    database(store).touch()
    assert "its file is gone or empty" in refused(store)
    database(store).write_bytes(raw)
    Journal(store).close()


def test_a_file_cut_short_is_named(store: Path) -> None:
    """Whole pages missing at the end, and a part of one."""
    raw = database(store).read_bytes()
    for size in (len(raw) - 4096, len(raw) // 2 + 100, 4096, 1000):
        database(store).write_bytes(raw[:size])
        assert "is damaged" in refused(store)


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path) -> None:
    """Wherever a byte changes, the journal is refused, or names the row, or holds what was written."""
    journal = Journal(tmp_path)
    fill(journal, 60, settled=50)
    journal.close()
    journal = Journal(tmp_path)
    told = summary(journal)
    journal.close()
    raw = database(tmp_path).read_bytes()
    used = [place for place, byte in enumerate(raw) if byte]
    found = {"refused": 0, "named": 0, "whole": 0}
    for place in random.Random(5).sample(used, 60):
        flip(database(tmp_path), place)
        found[outcome(tmp_path, told)] += 1
        database(tmp_path).write_bytes(raw)
    assert found["refused"] > 5
    assert found["named"] > 20


def summary(journal: Journal) -> Any:
    """What a journal tells, as text."""
    past = journal.recovered.lanes[0] if journal.recovered.lanes else None
    asks = [(each.number, repr(each.payload.params)) for each in past.requests] if past else []
    return asks, [(each.number, repr(each.value)) for each in journal.recovered.results]


def outcome(store: Path, told: Any) -> str:
    """Open a damaged journal: ``refused`` as a whole, damage ``named``, or ``whole`` for all that is told."""
    try:
        journal = Journal(store)
    except JournalError:
        return "refused"
    try:
        if journal.recovered.damage:
            return "named"
        assert summary(journal) == told
        return "whole"
    finally:
        journal.close()


def test_a_log_damaged_in_its_middle_is_named(tmp_path: Path) -> None:
    """SQLite would end the log there and say nothing; the index of the log knows better."""
    journal = Journal(tmp_path / "store")
    put(journal, lane())
    for number in range(20):
        put(journal, request(number))
    copies = [crashed(tmp_path / "store", tmp_path / str(n)) for n in range(5)]
    journal.close()
    logs = [copy / "journal" / "journal.sqlite3-wal" for copy in copies]
    size = logs[0].stat().st_size
    flip(logs[0], size // 2)
    flip(logs[1], 18)
    os.truncate(logs[2], size // 2)
    logs[3].unlink()
    for copy in copies[:4]:
        for _ in range(2):  # the refusal leaves everything as it is
            assert "that were committed: it is damaged or was cut short" in refused(copy)
    (copies[0] / "journal" / "journal.sqlite3-shm").unlink()
    journal = Journal(copies[0])
    (past,) = journal.recovered.lanes
    assert 0 < past.next < 20
    journal.close()
    journal = Journal(copies[4])
    assert journal.recovered.lanes[0].next == 20
    journal.close()


def test_a_torn_end_of_the_log_is_no_damage(tmp_path: Path) -> None:
    """What was being written when the process ended was not acknowledged, and is not missed."""
    journal = Journal(tmp_path / "store")
    fill(journal, 3)
    copy = crashed(tmp_path / "store", tmp_path / "copy")
    journal.close()
    log = copy / "journal" / "journal.sqlite3-wal"
    with log.open("ab") as stream:
        stream.write(log.read_bytes()[32 : 32 + 2000])
    journal = Journal(copy)
    assert journal.recovered.lanes[0].next == 3
    assert not journal.recovered.damage
    journal.close()


def test_the_log_is_counted_as_sqlite_counts_it(tmp_path: Path) -> None:
    """Frames up to the last commit before the first damage, byte for byte."""
    db = sqlite3.connect(tmp_path / "x.sqlite3", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("CREATE TABLE t (x)")
    for number in range(6):
        db.execute("INSERT INTO t VALUES (zeroblob(9000 + ?))", (number,))
    _, frames, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    db.execute("INSERT INTO t VALUES (1)")  # begins the log anew, over the old frames
    _, again, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    log = (tmp_path / "x.sqlite3-wal").read_bytes()
    assert 0 < again < frames == (len(log) - 32) // (24 + 4096)
    assert committed(log) == again
    assert lost_pages(tmp_path / "x.sqlite3") == 0
    db.close()
    for place in (0, 9, 30, 40, 50, 60, 200):
        changed = bytearray(log)
        changed[place] ^= 1
        assert committed(bytes(changed)) == 0
    assert committed(b"") == committed(log[:40]) == 0


def test_an_index_that_is_no_index_tells_nothing(tmp_path: Path) -> None:
    """None at all, two halves that differ, or one that was never initialised."""
    assert lost_pages(tmp_path / "x.sqlite3") == 0
    for raw in (bytes(32768), b"\1" * 48 + b"\2" * 100, b"\1" * 20):
        (tmp_path / "x.sqlite3-shm").write_bytes(raw)
        assert lost_pages(tmp_path / "x.sqlite3") == 0


def test_durabilities_differ_in_their_syncs(tmp_path: Path) -> None:
    """``power`` syncs at each commit, ``process`` leaves it to the system."""
    for durability, expected in (("process", 1), ("power", 2)):
        journal = Journal(tmp_path / durability, durability=durability)  # type: ignore[arg-type]
        assert journal._database.connection.execute("PRAGMA synchronous").fetchone() == (expected,)
        assert journal._database.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        journal.close()


def test_growth_is_bounded(tmp_path: Path) -> None:
    """With snapshots and trimming, files stay as small as what is in flight, whatever has gone through."""
    journal, sizes = Journal(tmp_path), []
    put(journal, lane())
    for turn in range(60):
        first = 10 * turn
        put(journal, *[request(n, size=20_000) for n in range(first, first + 10)])
        put(journal, *[result(n, settled=float(turn)) for n in range(first, first + 10)])
        journal.write_snapshot(lane().lane, first + 9, state(first + 9, cells=10_000)).result(GUARD)
        journal.trim(settled_before=turn - 2.0, fetched_before=0.0).result(GUARD)
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
    assert max(sizes[30:]) <= 1.05 * max(sizes[:30])
    assert len(list((tmp_path / "journal" / "snapshots").iterdir())) == 1
    journal.close()
    assert database(tmp_path).stat().st_size < 500_000
