"""Tests of the report on a journal: what it tells, beside whom, and that nothing is changed by it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tickwork.journal.lock as lock_module
import tickwork.journal.report as report_module
from journals import GUARD, LANE, change, crashed, database, fill, flip, lane, put, request, result, state
from tickwork.catalogue import Catalogue
from tickwork.cli import main
from tickwork.errors import InvalidRequestError, JournalError
from tickwork.journal.codec import encode
from tickwork.journal.journal import Journal
from tickwork.journal.records import (
    BackRecord,
    ForgetRecord,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
    SkippedRecord,
)
from tickwork.journal.report import LaneReport, Report, report
from tickwork.records import Run
from tickwork.requests import ForwardBackward, OpenSampler
from tickwork.types import LoraConfig

WRITER = "import journals, pathlib, sys; journals.write_for_ever(pathlib.Path(sys.argv[1]))"


def told(store: Path, name: str = LANE) -> LaneReport:
    """Return what is told of a lane."""
    found = report(store)
    assert found is not None
    return found.lanes[name]


def refused(store: Path) -> str:
    """Return why a journal can not be told of."""
    with pytest.raises(JournalError) as caught:
        report(store)
    return str(caught.value)


def files(store: Path) -> dict[str, tuple[str, int]]:
    """Return the contents and times of all files of a store, by name."""
    found = [file for file in store.rglob("*") if file.is_file()]
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in found}


def runs(store: Path, *more: str) -> Result:
    """Run ``tickwork runs``."""
    return CliRunner(env={"COLUMNS": "600"}).invoke(main, ["runs", "--store", str(store), *more])


def listed(store: Path) -> dict[str, Any]:
    """Return what ``tickwork runs --json`` lists, by run."""
    return {each["training_run_id"]: each for each in json.loads(runs(store, "--json").stdout)}


def test_a_store_without_a_journal_has_no_report(tmp_path: Path) -> None:
    """Runs of clients in process have no lane, and looking makes nothing."""
    Catalogue(tmp_path).open_run(Run("run", "tickwork/tiny", LoraConfig(rank=4), {}))
    before = files(tmp_path)
    assert report(tmp_path) is None
    assert listed(tmp_path)["run"]["lane"] is None
    assert "run" in runs(tmp_path).stdout
    assert files(tmp_path) == before
    assert report(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_requests_are_counted_whether_trimmed_or_not(tmp_path: Path) -> None:
    """What a snapshot covers counts after it was trimmed away; given up numbers do not; early ones do."""
    about = lane(base_model="tickwork/tiny", lora=LoraConfig(rank=4))
    journal = Journal(tmp_path)
    put(journal, about, *[request(number) for number in (0, 1, 4, 5, 6, 9)], SkippedRecord(LANE, 2, 3))
    put(journal, *[result(number) for number in (0, 1, 4, 5)])
    expected = LaneReport(LANE, "owner", "tickwork/tiny", 4, accepted=6, recorded=4, again=5)
    journal.close()
    assert told(tmp_path) == expected
    journal = Journal(tmp_path)
    journal.write_snapshot(LANE, 4, state(4)).result(GUARD)
    journal.trim(settled_before=1.0, fetched_before=1.0).result(GUARD)
    journal.close()
    expected = LaneReport(LANE, "owner", "tickwork/tiny", 4, accepted=6, recorded=4, snapshot=4, again=2)
    assert told(tmp_path) == expected


def test_only_what_would_run_again_is_counted(tmp_path: Path) -> None:
    """Not what failed, a pass without a backward, or a sampler that was let go; without results all of it."""
    journal = Journal(tmp_path)
    asks: list[Any] = [
        *(ForwardBackward(LANE, (), "cross_entropy", {}, True), ForwardBackward(LANE, (), "cross_entropy", {}, False)),
        *(OpenSampler("held", model_id=LANE), OpenSampler("gone", model_id=LANE), InvalidRequestError("wrong")),
    ]
    samplers = [SamplerRecord(key, "o", "s", 0, LANE, held=key == "held") for key in ("held", "gone")]
    put(journal, lane(), *samplers, *[RequestRecord(LANE, n, "o", "k", encode(ask)) for n, ask in enumerate(asks)])
    failed = encode(InvalidRequestError("is wrong"))
    put(journal, *[ResultRecord(LANE, number, 1.0, failed if number == 4 else encode(None)) for number in range(5)])
    journal.close()
    assert told(tmp_path).again == 2
    change(tmp_path, "DELETE FROM results")
    assert told(tmp_path).again == 5


def test_what_nobody_wants_is_not_run_again(tmp_path: Path) -> None:
    """A model that was let go, with nothing unfinished and no sampler."""
    journal = Journal(tmp_path)
    put(journal, lane(released=True), request(0), request(1), result(0), result(1))
    journal.close()
    assert told(tmp_path).again == 0


def test_the_last_return_of_a_lane_is_told(tmp_path: Path) -> None:
    """That of this opening only; forgotten with its lane; one that is damaged is as if it were not there."""
    journal = Journal(tmp_path)
    fill(journal, 3)
    put(journal, BackRecord(LANE, 1, 7, 5))
    assert (told(tmp_path).back, told(tmp_path).ran_again, told(tmp_path).broken) == (7, 5, None)
    assert "3 requests, 3 done; 3 to run at the next start; back at request 7, 5 ran again" in runs(tmp_path).stdout
    put(journal, BackRecord(LANE, 1, 7, why="its base model is not served"))
    assert (told(tmp_path).back, told(tmp_path).broken) == (None, "its base model is not served")
    journal.close()
    journal = Journal(tmp_path)
    assert (told(tmp_path).back, told(tmp_path).broken) == (None, None)
    put(journal, BackRecord(LANE, 2, 8, 1))
    journal.close()
    assert (told(tmp_path).back, told(tmp_path).ran_again) == (8, 1)
    change(tmp_path, "UPDATE back SET number = 9")
    assert told(tmp_path).back is None
    change(tmp_path, "DELETE FROM back")
    assert told(tmp_path).accepted == 3
    journal = Journal(tmp_path)
    put(journal, BackRecord(LANE, 3, 8, 1), ForgetRecord("lanes", LANE))
    journal.close()
    found = report(tmp_path)
    assert found == Report(None, {}, ())
    assert journal._database.boots == 3


def test_a_journal_from_before_returns_were_noted_is_read(tmp_path: Path) -> None:
    """Without their table, by the report and by the next opening."""
    journal = Journal(tmp_path)
    fill(journal, 2)
    journal.close()
    drop(tmp_path, "back")
    assert told(tmp_path).accepted == 2
    journal = Journal(tmp_path)
    put(journal, BackRecord(LANE, 2, 1))
    assert told(tmp_path).back == 1
    journal.close()


@pytest.mark.parametrize("way", ["closed", "crashed", "open"])
def test_looking_changes_nothing(tmp_path: Path, way: str) -> None:
    """No file is made and none is changed: not the index of the log either, by which a damaged log is found."""
    journal = Journal(tmp_path / "open")
    fill(journal, 4, settled=2)
    store = crashed(tmp_path / "open", tmp_path / "crashed") if way == "crashed" else tmp_path / "open"
    if way == "closed":
        journal.close()
    before = files(store)
    # In a process of its own: within one, SQLite shares the index between all that have the file open.
    look = "import sys, pathlib; from tickwork.journal.report import report; print(report(pathlib.Path(sys.argv[1])))"
    shown = subprocess.run([sys.executable, "-c", look, str(store)], capture_output=True, text=True, check=True)
    assert f"Report(holder={str(os.getpid()) if way == 'open' else None!r}" in shown.stdout
    assert "accepted=4, recorded=2" in shown.stdout
    assert files(store) == before
    assert len(before) == (3 if way == "closed" else 5)
    journal.close()


def test_it_may_be_asked_beside_a_process_that_writes(tmp_path: Path) -> None:
    """Each look is sound and none goes back; the writer takes no notice, and is told apart once it is gone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        looks: list[Report] = []
        acknowledged: list[int] = []
        for _ in range(30):
            acknowledged.append(int(writer.stdout.readline()))
            found = report(tmp_path)
            assert found is not None
            looks.append(found)
        writer.send_signal(signal.SIGKILL)
    assert {each.holder for each in looks} == {str(writer.pid)}
    assert not any(each.damage or each.lanes[LANE].damage or each.lanes[LANE].broken for each in looks)
    accepted = [each.lanes[LANE].accepted for each in looks]
    assert accepted == sorted(accepted)
    assert all(seen > number for seen, number in zip(accepted, acknowledged, strict=True))
    assert any(each.lanes[LANE].snapshot is not None for each in looks)
    last = report(tmp_path)
    assert last is not None
    assert last.holder is None
    assert last.lanes[LANE].accepted >= accepted[-1]


def test_who_looks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that finds itself looked at while it opens waits for the look to end."""
    journal = Journal(tmp_path)
    fill(journal, 2)
    journal.close()
    looking = (tmp_path / "journal" / "lock").open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    waits: list[float] = []

    def end(seconds: float) -> None:
        waits.append(seconds)
        looking.close()

    monkeypatch.setattr(lock_module.time, "sleep", end)
    Journal(tmp_path).close()
    assert waits == [lock_module.LOOK]


def test_a_look_that_meets_a_change_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that is replaced between two reads is no damage; one that stays away is."""
    journal = Journal(tmp_path)
    fill(journal, 4)
    journal.write_snapshot(LANE, 1, state(1)).result(GUARD)
    real, turns = report_module.recover, []

    def replaced(*args: Any) -> Any:
        if not turns:
            turns.append(1)
            args[0].execute("SELECT count(*) FROM requests").fetchone()  # from here on it sees this commit
            journal.write_snapshot(LANE, 3, state(3)).result(GUARD)
        return real(*args)

    monkeypatch.setattr(report_module, "recover", replaced)
    found = told(tmp_path)
    assert (found.snapshot, found.broken, found.damage) == (3, None, ())
    journal.close()
    (file,) = (tmp_path / "journal" / "snapshots").iterdir()
    file.unlink()
    assert "at request 3 is damaged" in told(tmp_path).damage[0]


DAMAGE = {
    "a request": "UPDATE requests SET body = zeroblob(9) WHERE number = 2",
    "the lane itself": "UPDATE lanes SET body = zeroblob(9)",
    "a result": "UPDATE results SET body = zeroblob(9) WHERE number = 1",
    "a session": "UPDATE sessions SET body = zeroblob(9)",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_by_name(tmp_path: Path, what: str) -> None:
    """Whatever is damaged is listed where it belongs, beside what is whole."""
    journal = Journal(tmp_path)
    put(journal, SessionRecord("session", "o", {}, datetime.now(UTC)))
    for name in (LANE, "session:train:1"):
        fill(journal, 4, name, settled=3)
    journal.close()
    change(tmp_path, f"{DAMAGE[what]}{' AND' if 'WHERE' in DAMAGE[what] else ' WHERE'} {key(what)}")
    found, shown = report(tmp_path), runs(tmp_path)
    assert found is not None
    assert found.lanes["session:train:1"] == LaneReport("session:train:1", "owner", accepted=4, recorded=3, again=4)
    hurt = found.lanes[LANE]
    assert (hurt.accepted, hurt.recorded) == (4, 3)
    assert (hurt.broken is not None) == (what in ("a request", "the lane itself"))
    assert bool(hurt.damage) == (what != "a session")
    named = {"a request": "request 2 of", "a result": "request 1 of", "the lane itself": f"the row of lane '{LANE}'"}
    if what == "a session":
        assert "the row of lane 'session' is damaged" in shown.stderr
    else:
        assert named[what] in hurt.damage[0]
        assert (f"broken: {hurt.broken}" in shown.stdout) == (hurt.broken is not None)
        assert hurt.damage[0] in shown.stdout
    assert shown.exit_code == 0


def key(what: str) -> str:
    """Return which rows of a table are damaged."""
    return {"the lane itself": f"key = '{LANE}'", "a session": "key = 'session'"}.get(what, f"lane = '{LANE}'")


def test_a_journal_that_can_not_be_read_leaves_the_runs(tmp_path: Path) -> None:
    """Another version, another file, a damaged log or pages: told on standard error, beside the runs."""
    Catalogue(tmp_path).open_run(Run(LANE, "tickwork/tiny", LoraConfig(rank=4), {}))
    journal = Journal(tmp_path)
    fill(journal, 30)
    copies = [crashed(tmp_path, tmp_path / str(number)) for number in range(2)]
    journal.close()
    assert listed(tmp_path)[LANE]["lane"]["accepted"] == 30
    assert listed(tmp_path)[LANE]["lora_rank"] == 4

    log = copies[0] / "journal" / "journal.sqlite3-wal"
    flip(log, log.stat().st_size // 2)
    for _ in range(2):
        assert "pages that were committed: it is damaged" in refused(copies[0])
    (copies[1] / "journal" / "journal.sqlite3-shm").unlink()
    before = files(copies[1])
    assert "has no index: start a server on this store" in refused(copies[1])
    assert files(copies[1]) == before

    raw = database(tmp_path).read_bytes()
    change(tmp_path, "UPDATE meta SET value = 2 WHERE name = 'format'")
    before = files(tmp_path)
    shown = runs(tmp_path, "--json")
    assert "is of format 2; this version of Tickwork reads 1" in shown.stderr
    assert [(each["training_run_id"], each["lane"]) for each in json.loads(shown.stdout)] == [(LANE, None)]
    assert (shown.exit_code, files(tmp_path)) == (0, before)
    for damage, why in ((raw[: len(raw) // 2], "is damaged"), (b"other " * 999, "is damaged"), (b"", "gone or empty")):
        database(tmp_path).write_bytes(damage)
        assert why in refused(tmp_path)


def test_a_model_that_was_not_made_yet_is_listed(tmp_path: Path) -> None:
    """Accepted, and then the server was gone: it has no run, and is told with what the journal knows."""
    journal = Journal(tmp_path)
    put(journal, lane(base_model="tickwork/tiny", lora=LoraConfig(rank=4)), request(0))
    journal.close()
    (found,) = listed(tmp_path).values()
    assert (found["training_run_id"], found["base_model"], found["lora_rank"]) == (LANE, "tickwork/tiny", 4)
    assert (found["last_request_time"], found["lane"]["accepted"], found["lane"]["again"]) == (None, 1, 1)
    shown = runs(tmp_path).stdout
    assert LANE in shown
    assert "1 requests, 0 done; 1 to run at the next start" in shown


def drop(store: Path, table: str) -> None:
    """Take a table out of a closed journal."""
    db = sqlite3.connect(database(store), isolation_level=None)
    db.execute(f"DROP TABLE {table}")
    db.close()
