"""Tests of the journal's recovery: each request once and in order, and whatever is missing or damaged by its name."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from journals import GUARD, LANE, change, fill, flip, lane, numbers, put, request, result, state
from tickwork.errors import InvalidRequestError, JournalError
from tickwork.journal.codec import encode
from tickwork.journal.journal import Journal
from tickwork.journal.losses import PastLoss
from tickwork.journal.records import (
    FetchedRecord,
    ForgetRecord,
    LossRecord,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
    SkippedRecord,
)
from tickwork.journal.recovery import Recovered
from tickwork.journal.snapshots import Snapshot, Snapshots
from tickwork.requests import ForwardBackward, LossGraph, LossNode, Sample
from tickwork.types import LoraConfig, SamplingParams


def reopened(store: Path) -> Recovered:
    """Open a closed journal, close it, and return what it held."""
    journal = Journal(store)
    journal.close()
    return journal.recovered


def written(store: Path, count: int = 6, settled: int = 4) -> Path:
    """Return a store with a lane."""
    journal = Journal(store)
    fill(journal, count, settled=settled)
    journal.close()
    return store


def named(recovered: Recovered) -> list[tuple[str | None, int | None]]:
    """Return what damage names."""
    return [(error.lane, error.number) for error in recovered.damage]


def test_everything_is_there_again(tmp_path: Path) -> None:
    """Sessions, models, samplers and losses come back as of their last change, requests and results beside them."""
    session = SessionRecord("s", "owner", {"a": "b"}, datetime.now(UTC), tags=("x",))
    ended = SessionRecord("s", "owner", {"a": "b"}, session.created_at, ended="its client finished it", finish={"t": 1})
    about = lane(base_model="tickwork/tiny", lora=LoraConfig(rank=4))
    sampler = SamplerRecord("s:sample:0", "owner", "s", 0, LANE, clones=3)
    graph = LossGraph("loss", (("logprobs", 1),), (LossNode("output", "o", "output", [{"ref": "x"}], {}),))
    sample = Sample("s:sample:0", (1, 2, 3), 1, SamplingParams(seed=1))
    refused = InvalidRequestError("is wrong", field="data")
    journal = Journal(tmp_path)
    put(journal, session, about, sampler, LossRecord("s:loss:0", "owner", "s", 0, graph))
    put(journal, RequestRecord(sampler.key, 7, "owner", "sample", encode(sample)))
    put(journal, RequestRecord(LANE, 0, "owner", "create_model", encode(refused)), ended)
    put(journal, ResultRecord(LANE, 0, 5.0, encode(refused)), FetchedRecord(LANE, (0,), 6.0))
    put(journal, SessionRecord("t", "owner", {}, session.created_at), ForgetRecord("sessions", "t"))
    journal.close()
    found = reopened(tmp_path)
    assert found.sessions == (ended,)
    assert found.samplers == (sampler,)
    assert [loss.graph.nodes[0].args for loss in found.losses] == [[{"ref": "x"}]]
    assert [(each.lane, each.number, each.payload.prompt) for each in found.loose] == [(sampler.key, 7, (1, 2, 3))]
    (past,) = found.lanes
    assert past.about == about
    assert (past.next, past.early, past.broken, past.snapshot) == (1, (), None, None)
    (kept,) = found.results
    assert (kept.owner, kept.kind, kept.settled, kept.fetched) == ("owner", "create_model", 5.0, 6.0)
    assert str(kept.value) == str(past.requests[0].payload) == str(refused)
    assert past.requests[0].result is kept
    assert not found.damage


def test_a_lane_goes_on_from_its_snapshot(tmp_path: Path) -> None:
    """What the snapshot covers is not told again; what came after is, settled or not, and the snapshot is whole."""
    journal = Journal(tmp_path)
    fill(journal, 6, settled=4)
    journal.write_snapshot(LANE, 2, state(2)).result(GUARD)
    journal.close()
    journal = Journal(tmp_path)
    (past,) = journal.recovered.lanes
    assert numbers(past.requests) == [3, 4, 5]
    assert [each.payload.params.learning_rate for each in past.requests] == [3.0, 4.0, 5.0]
    assert [each.result is not None for each in past.requests] == [True, False, False]
    assert numbers(journal.recovered.results) == [0, 1, 2, 3]
    assert past.snapshot is not None
    snapshot = journal.read_snapshot(past.snapshot)
    assert snapshot.metadata == {"steps": 2}
    np.testing.assert_array_equal(snapshot.arrays["adapter"], np.full(4, 2, np.float32))
    journal.close()


def test_numbers_that_have_not_come_are_no_damage(tmp_path: Path) -> None:
    """Early requests wait for those before them; numbers that were given up are passed over."""
    journal = Journal(tmp_path)
    put(journal, lane(), *[request(number) for number in (0, 1, 4, 7)])
    put(journal, result(0), result(1), SkippedRecord(LANE, 2, 3), result(4))
    journal.close()
    (past,) = reopened(tmp_path).lanes
    assert numbers(past.requests) == [0, 1, 4]
    assert (past.next, numbers(past.early), past.skipped) == (5, [7], ((2, 3),))
    assert past.broken is None


def test_gradients_of_a_loss_in_process_come_back(tmp_path: Path) -> None:
    """A pass whose callable had run can be applied again; one whose callable had not says what is gone."""
    gradients = (np.array([0.5, np.nan, -0.0], np.float32), np.empty(0, np.float32))
    ask = encode(ForwardBackward(LANE, (), len, {}, True))  # type: ignore[arg-type]
    journal = Journal(tmp_path)
    put(journal, lane(), *[RequestRecord(LANE, number, "o", "k", ask) for number in (0, 1)])
    put(journal, result(0, gradients=encode(gradients)))
    journal.close()
    losses = [each.payload.loss_fn for each in reopened(tmp_path).lanes[0].requests]
    assert all(isinstance(loss, PastLoss) and loss.name == "builtins.len" for loss in losses)
    assert [array.tobytes() for array in losses[0].gradients] == [array.tobytes() for array in gradients]
    assert losses[1].gradients is None


DAMAGE = {
    "requests": "UPDATE requests SET body = zeroblob(9) WHERE number = 3",
    "kind": "UPDATE requests SET kind = 'other' WHERE number = 3",
    "number": "UPDATE requests SET number = 99 WHERE number = 3",
    "swap": "UPDATE requests SET body = (SELECT body FROM requests WHERE number = 2) WHERE number = 3",
    "gone": "DELETE FROM requests WHERE number = 3",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_request_ends_what_can_be_followed(tmp_path: Path, damage: str) -> None:
    """A row that is not what was written, or is not there, is named; what came after it is not run without it."""
    change(written(tmp_path, count=6, settled=5), damage)
    found = reopened(tmp_path)
    (past,) = found.lanes
    assert numbers(past.requests) == [0, 1, 2]
    assert past.broken is not None
    assert (past.broken.lane, past.broken.number) == (LANE, 3)
    assert set(past.cut) - {3, 99} == {4, 5}
    assert past.early == ()
    assert (LANE, 3) in named(found)
    assert numbers(found.results) == [0, 1, 2, 3, 4]


def test_a_damaged_early_request_is_named(tmp_path: Path) -> None:
    """One that still waits for its turn is told as lost, others that wait go on waiting."""
    journal = Journal(tmp_path)
    put(journal, lane(), *[request(number) for number in (0, 5, 6)])
    journal.close()
    change(tmp_path, "UPDATE requests SET body = zeroblob(9) WHERE number = 5")
    found = reopened(tmp_path)
    assert (numbers(found.lanes[0].early), found.lanes[0].cut) == ([6], (5,))
    assert named(found) == [(LANE, 5)]


def test_a_damaged_result_fails_by_name(tmp_path: Path) -> None:
    """Its request has run, and is told so; what is served is the error that names the row."""
    change(written(tmp_path), "UPDATE results SET body = NULL WHERE number = 1")
    found = reopened(tmp_path)
    assert named(found) == [(LANE, 1)]
    kept = found.results[1]
    assert isinstance(kept.value, JournalError)
    assert "request 1 of lane 'session:train:0' is damaged" in str(kept.value)
    assert numbers(found.lanes[0].requests) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("table", ["lanes", "sessions"])
def test_a_damaged_named_row_is_named(tmp_path: Path, table: str) -> None:
    """A session or a model whose row is damaged is not there, and what waited in it is named."""
    journal = Journal(tmp_path)
    fill(journal, 3, settled=2)
    put(journal, SessionRecord("s", "o", {}, datetime.now(UTC)))
    journal.close()
    change(tmp_path, f"UPDATE {table} SET body = zeroblob(9)")
    found = reopened(tmp_path)
    expected = {"lanes": {(LANE, None), (LANE, 2)}, "sessions": {("s", None)}}[table]
    assert set(named(found)) == expected
    assert len(found.lanes) == (table != "lanes")
    assert not found.loose


def test_damaged_gradients_and_gaps_are_named(tmp_path: Path) -> None:
    """Both belong to a number, where what can be followed ends."""
    journal = Journal(tmp_path)
    put(journal, lane(), request(0), request(1), request(4), SkippedRecord(LANE, 2, 3))
    put(journal, result(0), result(1, gradients=encode(())), result(4))
    journal.close()
    change(tmp_path, "UPDATE skipped SET last = 2")
    found = reopened(tmp_path)
    assert named(found) == [(LANE, 2), (LANE, 2)]
    assert "is missing, while later ones have run" in str(found.lanes[0].broken)
    change(tmp_path, "UPDATE gradients SET body = zeroblob(3)")
    assert numbers(reopened(tmp_path).lanes[0].requests) == [0]


def damage_snapshot(store: Path, how: str) -> None:
    """Do something to the newest snapshot."""
    folder = store / "journal" / "snapshots"
    file = max(folder.iterdir(), key=lambda file: int(file.stem.split("-")[1]))
    if how == "flip":
        flip(file, file.stat().st_size - 2)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "gone":
        file.unlink()
    else:
        change(store, "UPDATE snapshots SET size = size + 1 WHERE number = (SELECT max(number) FROM snapshots)")


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "row"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_snapshot_is_named(tmp_path: Path, how: str, keep: int) -> None:
    """An older one stands in if there is one, with all that came after it; without one the lane is lost by name."""
    journal = Journal(tmp_path, keep=keep)
    fill(journal, 6, settled=5)
    for number in (1, 3):
        journal.write_snapshot(LANE, number, state(number)).result(GUARD)
    journal.trim(settled_before=-1.0, fetched_before=-1.0).result(GUARD)
    journal.close()
    damage_snapshot(tmp_path, how)
    found = reopened(tmp_path)
    (past,) = found.lanes
    assert named(found) == [(LANE, 3)]
    if keep == 2:
        assert past.snapshot is not None
        assert (past.snapshot.number, numbers(past.requests), past.broken) == (1, [2, 3, 4, 5], None)
    else:
        assert (past.snapshot, past.requests, past.cut) == (None, (), (4, 5))
        assert past.broken is not None
        assert "the snapshot" in str(past.broken) or "is damaged" in str(past.broken)
    assert numbers(found.results) == [0, 1, 2, 3, 4]


def test_a_damaged_snapshot_of_a_whole_lane_costs_time_only(tmp_path: Path) -> None:
    """As long as the first request is there, the lane is made again from it."""
    journal = Journal(tmp_path)
    fill(journal, 3)
    journal.write_snapshot(LANE, 1, state(1)).result(GUARD)
    journal.close()
    damage_snapshot(tmp_path, "flip")
    (past,) = reopened(tmp_path).lanes
    assert (past.snapshot, numbers(past.requests), past.broken) == (None, [0, 1, 2], None)


def test_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    """Snapshots that were never recorded, and parts of such, go when the journal is next opened."""
    journal = Journal(tmp_path)
    fill(journal, 2)
    journal.write_snapshot(LANE, 0, state(0)).result(GUARD)
    folder = tmp_path / "journal" / "snapshots"
    Snapshots(folder).write(LANE, 1, state(1))
    (folder / "half.safetensors.new").touch()
    journal.close()
    assert len(list(folder.iterdir())) == 3
    reopened(tmp_path)
    assert [file.stem.split("-")[1] for file in folder.iterdir()] == ["0"]


ARRAYS: dict[str, Any] = {
    "scalar": np.array(1.5, np.float32),
    "empty": np.empty((0, 3), np.float32),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "bits": np.array([np.nan, -np.inf, -0.0], np.float16),
    "ints": np.array([2**62, -1]),
    "bytes": np.arange(3, dtype=np.uint8),
    "big-endian": np.arange(3, dtype=">i4"),
}


def test_snapshots_hold_arrays_bit_by_bit(tmp_path: Path) -> None:
    """Any shape and layout, odd names, and metadata of any text."""
    snapshots = Snapshots(tmp_path)
    about = {"text": "ünï/cöde", "deep": [1, {"a": None}], "number": 0.1}
    record = snapshots.write("../../odd lane", 3, Snapshot(ARRAYS, about))
    assert (tmp_path / record.file).parent == tmp_path
    found = snapshots.read(record)
    assert found.metadata == about
    assert set(found.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found.arrays[name], array)
    empty = snapshots.write("m", 0, Snapshot({}, {}))
    assert snapshots.read(empty).arrays == {}


def test_a_snapshot_of_another_lane_is_refused(tmp_path: Path) -> None:
    """A whole file under a wrong name is not taken."""
    snapshots = Snapshots(tmp_path)
    one, other = snapshots.write("one", 3, state(3)), snapshots.write("other", 3, state(3))
    (tmp_path / one.file).write_bytes((tmp_path / other.file).read_bytes())
    with pytest.raises(JournalError, match="is not what was written"):
        snapshots.read(one)
    mixed = type(one)("one", 3, other.file, other.size, other.checksum)
    with pytest.raises(JournalError, match="it is of lane 'other' at 3"):
        snapshots.read(mixed)


@pytest.mark.parametrize("snapshot", [Snapshot({"x": np.zeros(1, complex)}, {}), Snapshot({}, {"x": float("nan")})])
def test_what_is_no_snapshot_is_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    """Other dtypes, and metadata that JSON does not hold; the last snapshot still stands."""
    journal = Journal(tmp_path)
    fill(journal, 2)
    journal.write_snapshot(LANE, 0, state(0)).result(GUARD)
    with pytest.raises(JournalError, match="at 1 could not be written"):
        journal.write_snapshot(LANE, 1, snapshot)
    journal.close()
    last = reopened(tmp_path).lanes[0].snapshot
    assert last is not None
    assert last.number == 0


def test_a_snapshot_that_does_not_fit_on_the_disk_is_named(tmp_path: Path) -> None:
    """The error of the disk is told with the lane and the number."""
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="is the disk full") as caught:
        Snapshots(tmp_path / "file").write("m", 3, state(3))
    assert (caught.value.lane, caught.value.number) == ("m", 3)
