"""Tests of the journal's writer: order, one commit for many, back-pressure, refusals, and the end of the disk."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from journals import GUARD, LANE, crashed, fill, lane, numbers, put, request, result, state
from keeping import until
from tickwork.errors import ClosedError, JournalError, QueueFullError
from tickwork.futures import wait
from tickwork.journal import writer
from tickwork.journal.codec import encode
from tickwork.journal.journal import Journal
from tickwork.journal.records import (
    FetchedRecord,
    ForgetRecord,
    RequestRecord,
    ResultRecord,
    SkippedRecord,
    SnapshotRecord,
)
from tickwork.journal.snapshots import Snapshot


class Gate:
    """A hook that holds the writer at one point, and notes all that it passes."""

    def __init__(self, point: str) -> None:
        self.point, self.passed = point, list[str]()
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, point: str) -> None:
        self.passed.append(point)
        if point == self.point:
            self.reached.set()
            assert self.open.wait(GUARD)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A journal with an empty lane."""
    journal = Journal(tmp_path)
    put(journal, lane())
    yield journal
    journal.close()


def test_what_waits_shares_one_commit_in_order(tmp_path: Path) -> None:
    """Everything appended during a commit is durable with the next one, and futures settle in the order of appends."""
    gate = Gate("commit")
    journal = Journal(tmp_path, at=gate)
    first = journal.append([lane(), request(0)])
    assert gate.reached.wait(GUARD)
    order: list[int] = []
    later = [journal.append([request(number)]) for number in range(1, 50)]
    for number, future in enumerate(later, 1):
        future.add_done_callback(lambda _, number=number: order.append(number))
    assert not first.done()
    assert not any(future.done() for future in later)
    gate.open.set()
    later[-1].result(GUARD)
    journal.close()
    assert order == list(range(1, 50))
    assert gate.passed.count("commit") == 2


def test_a_full_mailbox_refuses_until_there_is_room(tmp_path: Path) -> None:
    """Past its limit the journal takes nothing; what it has taken is written, and then there is room again."""
    gate = Gate("commit")
    journal = Journal(tmp_path, limit=90_500, at=gate)
    assert journal.room().done()
    held = journal.append([lane(), request(0, size=90_000)])
    assert gate.reached.wait(GUARD)
    room = journal.room()
    with pytest.raises(QueueFullError, match="wait for room"):
        journal.append([request(1, size=20_000)])
    assert not room.done()
    with pytest.raises(QueueFullError):
        journal.write_snapshot(LANE, 0, Snapshot({}, {"odd": "x"}))
    assert not list((tmp_path / "journal" / "snapshots").iterdir())
    gate.open.set()
    held.result(GUARD)
    room.result(GUARD)
    journal.append([request(1, size=10**6)]).result(GUARD)  # alone, it may be of any size
    journal.close()
    assert numbers(reopened(tmp_path).lanes[0].requests) == [0, 1]


def reopened(store: Path) -> Any:
    """Open a closed journal, close it, and return what it held."""
    journal = Journal(store)
    journal.close()
    return journal.recovered


def test_closing_drains(tmp_path: Path) -> None:
    """Everything appended is written; afterwards nothing more is taken."""
    journal = Journal(tmp_path)
    futures = [journal.append([lane()]), *(journal.append([request(number)]) for number in range(100))]
    journal.close()
    assert all(future.exception(0) is None for future in futures)
    with pytest.raises(ClosedError):
        journal.append([request(100)]).result(0)
    assert reopened(tmp_path).lanes[0].next == 100


@pytest.mark.parametrize("host", [trio.run, lambda main: asyncio.run(main())], ids=["trio", "asyncio"])
def test_durability_is_awaited_under_trio_and_asyncio(journal: Journal, host: Any) -> None:
    """The future of an append is one that ``futures.wait`` knows."""

    async def main() -> None:
        future = journal.append([request(0)])
        await wait(future, GUARD)
        future.result(0)

    host(main)


def test_a_small_append_is_durable_within_a_millisecond(journal: Journal) -> None:
    """The median of many, on an idle writer."""
    spent = []
    for number in range(100):
        begun = time.perf_counter()
        put(journal, request(number))
        spent.append(time.perf_counter() - begun)
    assert statistics.median(spent) < 1e-3


class Where:
    """A hook that notes which thread passes each commit, and may hold one."""

    def __init__(self) -> None:
        self.threads = list[str]()
        self.held: str | None = None
        self.pause = 0.0
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, point: str) -> None:
        if point != "commit":
            return
        name = threading.current_thread().name
        self.threads.append(name)
        time.sleep(self.pause)
        if name == self.held:
            self.reached.set()
            assert self.open.wait(GUARD)

    def taken(self) -> list[str]:
        """Return the threads since the last time."""
        found, self.threads = self.threads, []
        return found


@pytest.fixture
def where(tmp_path: Path) -> Iterator[tuple[Journal, Where]]:
    """A journal with an empty lane that writes small records at once."""
    hook = Where()
    journal = Journal(tmp_path, at=hook, at_once=True)
    put(journal, lane())
    hook.taken()
    yield journal, hook
    hook.open.set()
    journal.close()


WRITER, HERE = "tickwork-journal", threading.main_thread().name


def test_at_once_whoever_appends_a_small_record_writes_it(where: tuple[Journal, Where]) -> None:
    """What is large, or more than one record, or not a request or a plain result, goes to the writer's thread."""
    journal, hook = where
    small = [journal.append([each]) for each in (request(0), request(1), result(0))]
    assert all(future.done() and future.exception() is None for future in small)
    assert hook.taken() == [HERE] * 3
    put(journal, request(2, size=10**5))
    put(journal, request(3), request(4))
    put(journal, result(1, gradients=encode(())))
    put(journal, FetchedRecord(LANE, (0,), 1.0))
    assert hook.taken() == [WRITER] * 4
    with pytest.raises(JournalError, match="already accepted"):
        put(journal, request(1))
    assert hook.taken() == [HERE]


def test_at_once_nobody_overtakes(where: tuple[Journal, Where]) -> None:
    """While one thread writes, what others append waits its turn; afterwards it is at once again."""
    journal, hook = where
    for first, held in enumerate(("other", WRITER)):
        hook.held = held
        size = 10**5 if held == WRITER else 10
        thread = threading.Thread(target=put, args=(journal, request(3 * first, size=size)), name="other")
        thread.start()
        assert hook.reached.wait(GUARD)
        later = [journal.append([request(number)]) for number in (3 * first + 1, 3 * first + 2)]
        assert not any(future.done() for future in later)
        hook.open.set()
        thread.join(GUARD)
        for future in later:
            future.result(GUARD)
        assert hook.taken() == [held, WRITER]
        hook.held = None
        hook.reached.clear()
        hook.open.clear()
    until(lambda: not journal._writer._writing)
    assert journal.append([request(6)]).done()


def test_at_once_not_while_the_disk_is_slow(where: tuple[Journal, Where], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has waited for the disk does not wait again for a while."""
    journal, hook = where
    monkeypatch.setattr(writer, "BESIDE", 0.5)
    hook.pause = 2 * writer.SLOW
    put(journal, request(0), request(1))
    put(journal, request(2))
    put(journal, request(3))
    assert hook.taken() == [WRITER, HERE, WRITER]
    hook.pause = 0.0
    time.sleep(0.6)
    assert journal.append([request(4)]).done()


def test_at_once_an_error_that_nobody_foresaw_ends_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path, at_once=True)
    put(journal, lane())
    journal._database.connection.execute("DROP TABLE requests")
    with pytest.raises(JournalError, match="no such table"):
        put(journal, request(0))
    with pytest.raises(JournalError, match="no such table"):
        put(journal, request(1))
    assert journal.failure is not None
    journal.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_the_log_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """Every so often it is brought into the file, in the writer's thread, and begins anew."""
    monkeypatch.setattr(writer, "CHECKPOINT", 200)
    journal = Journal(tmp_path, at_once=at_once)
    put(journal, lane())
    for number in range(1000):
        put(journal, request(number, size=2000))
    log = tmp_path / "journal" / "journal.sqlite3-wal"
    assert log.stat().st_size < 500 * 4096
    journal.close()
    assert reopened(tmp_path).lanes[0].next == 1000


def contradictions() -> list[tuple[str, Any, str]]:
    """Records that contradict a lane of three requests, of which the first is settled and covered."""
    odd = "\ud800"
    return [
        ("accepted twice", request(1), "request 1 of lane 'session:train:0' is already accepted"),
        ("accepted below the snapshot", request(0), "request 0 of lane 'session:train:0' is already accepted"),
        ("settled twice", result(0), "request 0 of lane 'session:train:0' is already settled"),
        ("settled and never asked", result(7), "request 7 of lane 'session:train:0' is not in the journal"),
        ("skipped though it came", SkippedRecord(LANE, 1, 1), "not all of 1 to 1 are missing"),
        ("covered before it is settled", SnapshotRecord(LANE, 1, "x", 1, "x"), "can not cover request 1"),
        ("covered twice", SnapshotRecord(LANE, 0, "x", 1, "x"), "already covered by a snapshot"),
        ("forgotten while it waits", ForgetRecord("lanes", LANE), "can not be forgotten before its request 1"),
        ("of no table", ForgetRecord("meta", "format"), "'meta' is none of"),
        ("too large a number", RequestRecord(LANE, 2**63, "o", "k", b""), "too large"),
        ("no text", RequestRecord(odd, 1, "o", "k", b""), "surrogates not allowed"),
        ("no time", ResultRecord(LANE, 1, "now", b""), "could not convert"),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(("bad", "why"), [pytest.param(bad, why, id=name) for name, bad, why in contradictions()])
def test_a_contradiction_is_refused_alone_and_whole(journal: Journal, bad: Any, why: str, tmp_path: Path) -> None:
    """A record that can not be true fails its own append, of which nothing is written; others go on."""
    fill(journal, 3, settled=1)
    journal.write_snapshot(LANE, 0, state(0)).result(GUARD)
    before = journal.append([request(3)])
    refused = journal.append([request(4), bad, request(5)])
    after = journal.append([request(6)])
    with pytest.raises(JournalError, match=why):
        refused.result(GUARD)
    before.result(GUARD)
    after.result(GUARD)
    journal.close()
    (past,) = reopened(tmp_path).lanes
    assert numbers(past.requests) == [1, 2, 3]
    assert numbers(past.early) == [6]


def test_what_can_not_be_stored_is_refused_at_once(journal: Journal) -> None:
    """A record that the codec does not take never enters the mailbox."""
    with pytest.raises(JournalError, match=r"LaneRecord.lora holds 'one'"):
        journal.append([lane("other", lora="one")])


def test_a_full_disk_ends_the_journal_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    """The first write that does not fit fails by name, all later ones too; a restart finds the rest."""
    journal = Journal(tmp_path)
    put(journal, lane())
    (pages,) = journal._database.connection.execute("PRAGMA page_count").fetchone()
    journal._database.connection.execute(f"PRAGMA max_page_count={pages + 20}")
    kept = 0
    with pytest.raises(JournalError, match="is full: make room and start again; what was acknowledged is there"):
        for kept in range(100):
            put(journal, request(kept, size=9000))
    assert 2 < kept < 20
    with pytest.raises(JournalError, match="is full"):
        journal.append([request(0)]).result(GUARD)
    journal.room().result(GUARD)
    journal.close()
    assert numbers(reopened(tmp_path).lanes[0].requests) == list(range(kept))


def test_a_writer_that_dies_fails_everything(tmp_path: Path) -> None:
    """An error that nobody foresaw is told to all that wait, at once."""
    gate = Gate("commit")

    def at(point: str) -> None:
        gate(point)
        if point == "commit":
            raise KeyError("unforeseen")

    journal = Journal(tmp_path, at=at)
    futures = [journal.append([lane()])]
    assert gate.reached.wait(GUARD)
    futures.append(journal.append([request(0)]))
    gate.open.set()
    for future in futures:
        with pytest.raises(JournalError, match="writer died: KeyError"):
            future.result(GUARD)
    journal.close()
    assert not reopened(tmp_path).lanes


def test_snapshots_replace_each_other(tmp_path: Path) -> None:
    """The newest stays, or as many as asked for; files go once their successor is recorded."""
    for keep in (1, 2):
        store = tmp_path / str(keep)
        journal = Journal(store, keep=keep)
        fill(journal, 4)
        for number in range(4):
            journal.write_snapshot(LANE, number, state(number)).result(GUARD)
        files = sorted(file.name for file in (store / "journal" / "snapshots").iterdir())
        assert [name.split("-")[1] for name in files] == ["2", "3"][-keep:]
        with pytest.raises(JournalError, match="already covered"):
            journal.write_snapshot(LANE, 3, state(7)).result(GUARD)
        journal.close()
        journal = Journal(store)
        record = journal.recovered.lanes[0].snapshot
        assert record is not None
        assert journal.read_snapshot(record).metadata == {"steps": 3}
        journal.close()


def test_trimming_keeps_what_may_be_asked_for(journal: Journal, tmp_path: Path) -> None:
    """Covered requests go at once, results when fetched or old; of what may be replayed it stays known that it ran."""
    fill(journal, 4)
    put(journal, request(0, "sampler"), request(1, "sampler"), result(0, "sampler", settled=50.0))
    put(journal, FetchedRecord(LANE, (0,), 10.0), FetchedRecord(LANE, (2,), 10.0), FetchedRecord(LANE, (3,), 90.0))
    put(journal, FetchedRecord(LANE, (3,), 1.0))  # a result that is fetched again stays as long as after the first time
    journal.write_snapshot(LANE, 1, state(1)).result(GUARD)
    journal.trim(settled_before=-1.0, fetched_before=20.0).result(GUARD)
    copy = reopened(crashed(tmp_path, tmp_path / "copy"))
    (past,) = copy.lanes
    assert numbers(past.requests) == [2, 3]
    assert [each.result.expired for each in past.requests] == [True, False]
    assert sorted((each.lane, each.number) for each in copy.results) == [("sampler", 0), (LANE, 1), (LANE, 3)]
    assert numbers(copy.loose) == [0, 1]
    journal.trim(settled_before=60.0, fetched_before=20.0).result(GUARD)
    journal.write_snapshot(LANE, 3, state(3)).result(GUARD)
    journal.trim(settled_before=60.0, fetched_before=20.0).result(GUARD)
    for table, left in (("requests", 1), ("results", 0), ("snapshots", 1)):
        assert journal._database.connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (left,)


def test_a_forgotten_lane_leaves_only_its_results(journal: Journal, tmp_path: Path) -> None:
    """A lane that is over goes with its requests, gradients, gaps and snapshots; what it answered is served still."""
    fill(journal, 2, settled=0)
    put(journal, result(0), result(1, gradients=encode(())), SkippedRecord(LANE, 2, 3))
    journal.write_snapshot(LANE, 0, state(0)).result(GUARD)
    put(journal, ForgetRecord("lanes", LANE))
    counts = [
        journal._database.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("lanes", "requests", "gradients", "skipped", "snapshots", "results")
    ]
    assert counts == [0, 0, 0, 0, 0, 2]
    assert not list((tmp_path / "journal" / "snapshots").iterdir())
    journal.trim(settled_before=1.0, fetched_before=0.0).result(GUARD)
    assert journal._database.connection.execute("SELECT count(*) FROM results").fetchone() == (0,)
