"""Tests of checkpoints on disk: what is written is read, and nothing else is taken for a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from models import CPU
from tickwork import catalogue as catalogue_module
from tickwork.catalogue import Catalogue
from tickwork.compute.lora import Adapter
from tickwork.compute.optimizer import Trainable
from tickwork.errors import CheckpointError, InvalidRequestError
from tickwork.records import META, Meta, Run
from tickwork.store import ADAPTER, CONFIG, MOMENTS, Store
from tickwork.types import AdamParams, LoraConfig

SHAPES = {"model.a": (5, 7), "model.b": (3, 2), "lm_head": (4, 11)}
RUN = "123e4567-e89b-12d3-a456-426614174000:train:0"


def make(seed: int = 0, steps: int = 2, rank: int = 2) -> Trainable:
    """Return a model that has taken some steps."""
    state = Trainable(Adapter(SHAPES, LoraConfig(rank=rank), seed, CPU))
    for number in range(steps):
        push(state, seed + number)
        state.step(AdamParams(learning_rate=0.1))
    return state


def push(state: Trainable, seed: int) -> None:
    """Accumulate a random gradient."""
    state.grad.add_(torch.randn(state.grad.shape, generator=torch.Generator().manual_seed(seed)))
    state.requests += 1


def meta(name: str = "x", kind: str = "weights", run_id: str = RUN, **changes: Any) -> Meta:
    """Describe a checkpoint."""
    described = Meta(run_id, kind, name, "some/base", LoraConfig(rank=2, seed=5), 2, {"who": "me"})
    return attrs.evolve(described, **changes)


def write(store: Store, state: Trainable | None = None, overwrite: bool = False, **changes: Any) -> str:
    """Write a checkpoint."""
    return store.write(meta(**changes), state or make(), None, overwrite)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in a folder of its own."""
    return Store(Catalogue(tmp_path / "store"))


def files(store: Store) -> list[str]:
    """Return everything that lies in the store, temporary things included."""
    root = store.catalogue.root
    return sorted(str(path.relative_to(root)) for path in root.rglob("*")) if root.exists() else []


def assert_holds(store: Store, path: str, state: Trainable) -> None:
    """The checkpoint holds these weights, bit for bit."""
    tensors, want = store.read(path).tensors, state.adapter.named()
    assert tensors.keys() == want.keys()
    assert all(torch.equal(tensors[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_what_is_written_is_read(store: Store, kind: str) -> None:
    """Weights come back bit for bit, with their description; moments come with training checkpoints only."""
    state = make()
    path = write(store, state, kind=kind)
    assert path == f"tinker://{RUN}/{kind}/x"
    assert_holds(store, path, state)
    saved, want = store.read(path), state.adapter.named()
    assert (saved.meta.run_id, saved.meta.kind, saved.meta.name, saved.meta.steps) == (RUN, kind, "x", 2)
    assert (saved.meta.base_model, saved.meta.lora, saved.meta.user_metadata) == (
        "some/base",
        LoraConfig(rank=2, seed=5),
        {"who": "me"},
    )
    assert len(saved.moments) == (2 * len(want) if kind == "weights" else 0)
    names = {ADAPTER, CONFIG, MOMENTS} if kind == "weights" else {ADAPTER, CONFIG}
    assert set(saved.meta.checksums) == set(saved.meta.sizes) == names


def test_resuming_with_the_optimizer_makes_the_same_next_step(store: Store) -> None:
    """After a restore with optimizer state the next step is bit-equal to that of the model that was saved."""
    state = make(seed=1, steps=3)
    path = write(store, state, steps=3)
    other = make(seed=9, steps=1)
    push(other, 5)
    store.read(path).restore(other, with_optimizer=True)
    for each in (state, other):
        push(each, 77)
        assert each.step(AdamParams(learning_rate=0.05, weight_decay=0.1))["optim/step"] == 4
    assert torch.equal(state.adapter.arena, other.adapter.arena)
    assert torch.equal(state.exp_avg, other.exp_avg)
    assert torch.equal(state.exp_avg_sq, other.exp_avg_sq)


def test_resuming_without_the_optimizer_starts_it_afresh(store: Store) -> None:
    """A restore without optimizer state has the weights, no moments, step 0 and no leftover gradient."""
    state = make(seed=1)
    path = write(store, state)
    other = make(seed=9)
    push(other, 5)
    store.read(path).restore(other, with_optimizer=False)
    assert torch.equal(other.adapter.arena, state.adapter.arena)
    assert (other.exp_avg, other.exp_avg_sq, other.steps, other.requests) == (None, None, 0, 0)
    assert not other.grad.any()


def test_a_model_saved_before_its_first_step_resumes(store: Store) -> None:
    """With no step taken there are no moments, and a restore with optimizer is a fresh optimizer."""
    path = write(store, make(steps=0), steps=0)
    other = make(seed=9)
    store.read(path).restore(other, with_optimizer=True)
    assert (other.exp_avg, other.steps) == (None, 0)


def test_sampler_weights_hold_no_optimizer(store: Store) -> None:
    """Asking a sampler checkpoint for its optimizer is refused and leaves the model as it was."""
    path = write(store, kind="sampler_weights")
    other = make(seed=9)
    before = other.adapter.arena.clone()
    with pytest.raises(CheckpointError, match="no optimizer state"):
        store.read(path).restore(other, with_optimizer=True)
    assert torch.equal(other.adapter.arena, before)


def test_another_shape_or_base_does_not_load(store: Store) -> None:
    """A checkpoint of another rank or base is refused with what differs, and the model stays as it was."""
    saved = store.read(write(store))
    other = make(rank=4)
    before = other.adapter.arena.clone()
    with pytest.raises(CheckpointError, match=r"rank 2 .* rank 4"):
        saved.restore(other, with_optimizer=False)
    assert torch.equal(other.adapter.arena, before)
    with pytest.raises(CheckpointError, match="'some/base', not on 'another'"):
        saved.check_fits("another", make().adapter)


def test_a_name_is_taken_until_overwritten(store: Store) -> None:
    """A second write under a name is refused, unless told to overwrite; then the new one is all there is."""
    first, second = make(seed=1), make(seed=2)
    path = write(store, first)
    with pytest.raises(CheckpointError, match="exists"):
        write(store, second)
    assert_holds(store, path, first)
    before = files(store)
    write(store, second, overwrite=True)
    assert_holds(store, path, second)
    assert files(store) == before


def test_kinds_and_runs_do_not_share_names(store: Store) -> None:
    """One name may stand once for each kind and run."""
    paths = {write(store, kind=kind, run_id=run) for kind in ("weights", "sampler_weights") for run in ("a", "b:c")}
    assert {c.tinker_path for c in store.catalogue.checkpoints()} == paths
    assert len(store.catalogue.checkpoints("b:c")) == 2


@pytest.mark.parametrize("name", ["a b", "50%", "a:b", "ünïcode-模型", "a%2Fb", "x" * 200, "-", "a.b", "é" * 40])
def test_odd_names_are_kept(store: Store, name: str) -> None:
    """Spaces, colons, percent signs, dots and letters of any script may be in a name."""
    path = write(store, name=name)
    assert store.read(path).meta.name == name
    assert [c.checkpoint_id for c in store.catalogue.checkpoints()] == [f"weights/{name}"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "/", "x" * 201, "nul\0", 7, None, "\ud800", "é" * 200]
)
def test_bad_names_are_refused(store: Store, name: Any) -> None:
    """Names that are empty, too long, hidden or hold a slash are refused by name before anything is written."""
    with pytest.raises(InvalidRequestError) as caught:
        write(store, name=name)
    assert caught.value.field == "name"
    assert files(store) == []


@pytest.mark.parametrize(
    "path",
    [
        "tinker://run/weights",
        "tinker://run/other/x",
        "tinker:///weights/x",
        "run/weights/x",
        "tinker://run/weights/x/y",
        "tinker://run/weights/..",
        "tinker://../weights/x",
        "tinker://./weights/x",
        "tinker://run/weights/.new-0123",
        "tinker://run/weights/\ud800",
        "tinker://run/weights/" + "x" * 300,
        None,
        7,
    ],
)
@pytest.mark.parametrize("act", ["meta", "delete", "info"])
def test_bad_paths_are_refused(store: Store, path: Any, act: str) -> None:
    """What is not a checkpoint's path, or would lead out of its run, is refused and touches nothing."""
    write(store, run_id="run")
    store.catalogue.open_run(Run("run", "some/base", LoraConfig(), {}))
    before = files(store)
    with pytest.raises(InvalidRequestError):
        getattr(store.catalogue, act)(path)
    assert files(store) == before


def test_an_unknown_checkpoint_is_named(store: Store) -> None:
    """Reading, publishing or deleting what is not there is an error that repeats the path."""
    path = f"tinker://{RUN}/weights/none"
    acts: list[Callable[[str], object]] = [
        store.read,
        store.catalogue.delete,
        store.catalogue.info,
        lambda p: store.catalogue.set_public(p, True),
        lambda p: store.catalogue.set_ttl(p, 5),
    ]
    for act in acts:
        with pytest.raises(CheckpointError, match=f"no checkpoint {path}"):
            act(path)


def test_deleting_leaves_nothing(store: Store) -> None:
    """A deleted checkpoint is gone, with its files, and its name is free."""
    path = write(store)
    kept = write(store, name="kept")
    store.catalogue.delete(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.read(path)
    assert [c.tinker_path for c in store.catalogue.checkpoints()] == [kept]
    assert not any("/x" in name or ".gone" in name for name in files(store))
    write(store)


def test_publishing_is_remembered(store: Store) -> None:
    """Publishing and withdrawing change the description alone; the checkpoint stays readable."""
    path = write(store)
    for public in (True, False):
        store.catalogue.set_public(path, public)
        assert store.catalogue.checkpoints()[0].public is public
        assert store.read(path).meta.public is public


def test_checkpoints_expire(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time to live a checkpoint can not be read, and the next listing deletes it."""
    path = store.write(meta(), make(), 60, False)
    lasting = write(store, name="lasting")
    expires = store.catalogue.checkpoints()[1].expires_at
    assert expires is not None
    assert timedelta(seconds=50) < expires - datetime.now(UTC) <= timedelta(seconds=60)
    store.read(path)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=61)

    monkeypatch.setattr(catalogue_module, "datetime", Later)
    with pytest.raises(CheckpointError, match="expired"):
        store.read(path)
    assert [c.tinker_path for c in store.catalogue.checkpoints()] == [lasting]
    assert not any("/x" in name for name in files(store))


def test_a_time_to_live_can_be_changed(store: Store) -> None:
    """``set_ttl`` sets and removes the moment of expiry."""
    path = write(store)
    store.catalogue.set_ttl(path, 100)
    assert store.catalogue.checkpoints()[0].expires_at is not None
    store.catalogue.set_ttl(path, None)
    assert store.catalogue.checkpoints()[0].expires_at is None


@pytest.mark.parametrize("ttl", [0, -1, 1.5, True, "9"])
def test_bad_times_to_live_are_refused(store: Store, ttl: Any) -> None:
    """A time to live is a whole number of seconds, at least one."""
    with pytest.raises(InvalidRequestError) as caught:
        store.write(meta(), make(), ttl, False)
    assert caught.value.field == "ttl_seconds"
    assert files(store) == []


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def _change_meta(**changes: Any) -> Callable[[Path], None]:
    def act(place: Path) -> None:
        data = json.loads((place / META).read_text())
        (place / META).write_text(json.dumps({**data, **changes}))

    return act


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped weight": (lambda p: _flip(p / ADAPTER), f"{ADAPTER} is missing or not what was written"),
    "flipped moment": (lambda p: _flip(p / MOMENTS), f"{MOMENTS} is missing or not what was written"),
    "flipped configuration": (lambda p: _flip(p / CONFIG), f"{CONFIG} is missing or not what was written"),
    "cut short": (lambda p: os.truncate(p / ADAPTER, 100), f"{ADAPTER} is missing or not what was written"),
    "missing file": (lambda p: (p / ADAPTER).unlink(), f"{ADAPTER} is missing or not what was written"),
}
FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda p: (p / META).unlink(), "not a Tickwork checkpoint"),
    "half a description": (lambda p: os.truncate(p / META, 50), "not a Tickwork checkpoint"),
    "empty description": (lambda p: (p / META).write_text("{}"), "not a Tickwork checkpoint"),
    "another's description": (lambda p: (p / META).write_text("[1]"), "not a Tickwork checkpoint"),
    "binary description": (lambda p: (p / META).write_bytes(b"\xff\xfe\x00"), "not a Tickwork checkpoint"),
    "unknown field": (_change_meta(surprise=1), "not a Tickwork checkpoint"),
    "no checksums": (_change_meta(checksums=None), "not a Tickwork checkpoint"),
    "newer format": (_change_meta(format=2), "format 2; this version reads 1"),
}


@pytest.mark.parametrize("case", [*DAMAGE, *FOREIGN])
def test_damage_is_found_and_named(store: Store, case: str) -> None:
    """One flipped bit, a missing file or a foreign description is an error that says so, and no weights load."""
    path = write(store)
    act, words = {**DAMAGE, **FOREIGN}[case]
    act(store.catalogue.folder(path))
    with pytest.raises(CheckpointError, match=words):
        store.read(path)


@pytest.mark.parametrize("case", FOREIGN)
def test_the_listing_skips_what_is_not_ours(store: Store, case: str) -> None:
    """A folder that is no checkpoint of ours neither shows in a listing nor makes it fail."""
    store.catalogue.open_run(Run(RUN, "some/base", LoraConfig(rank=2), {}))
    path, whole = write(store), write(store, name="whole")
    FOREIGN[case][0](store.catalogue.folder(path))
    assert [c.tinker_path for c in store.catalogue.checkpoints()] == [whole]
    assert store.catalogue.run(RUN).last_checkpoint.tinker_path == whole
    assert len(store.catalogue.runs()) == 1


def test_foreign_folders_are_left_alone(store: Store) -> None:
    """An empty folder or a stray file in a run is not a checkpoint, and listing does not delete it."""
    path = write(store)
    place = store.catalogue.folder(path).parent
    (place / "empty").mkdir()
    (place / "stray.txt").write_text("hello")
    assert len(store.catalogue.checkpoints()) == 1
    assert (place / "empty").exists()
    assert (place / "stray.txt").exists()
    with pytest.raises(CheckpointError, match="not a Tickwork checkpoint"):
        store.read(f"tinker://{RUN}/weights/empty")


def test_another_checkpoints_weights_do_not_load(store: Store) -> None:
    """Weights moved in from another checkpoint are not what was written."""
    one, two = write(store, make(seed=1)), write(store, make(seed=2), name="y")
    shutil.copy(store.catalogue.folder(two) / ADAPTER, store.catalogue.folder(one) / ADAPTER)
    with pytest.raises(CheckpointError, match="not what was written"):
        store.read(one)


def _crash(*args: Any, **kwargs: Any) -> None:
    raise OSError("simulated crash")


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_a_crash_before_the_rename_leaves_no_name(store: Store, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that dies before its last act leaves nothing under the name, and the next write succeeds."""
    with monkeypatch.context() as patch:
        patch.setattr(os, where, _crash)
        with pytest.raises(OSError, match="simulated"):
            write(store)
    path = f"tinker://{RUN}/weights/x"
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.read(path)
    assert store.catalogue.checkpoints() == []
    assert not any(".new-" in name for name in files(store))
    assert store.read(write(store)).meta.name == "x"


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failed_overwrite_keeps_the_old_one(store: Store, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overwrite that fails at any of its renames leaves the old checkpoint whole."""
    first = make(seed=1)
    path = write(store, first)
    replace, calls = os.replace, []

    def sometimes(*args: Any) -> None:  # two descriptions, then the old name away, then the new one in
        calls.append(args)
        if len(calls) == failing:
            raise OSError("simulated crash")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", sometimes)
        with pytest.raises(OSError, match="simulated"):
            write(store, make(seed=2), overwrite=True)
    assert_holds(store, path, first)
    assert not any(".new-" in name or ".gone-" in name for name in files(store))


def test_a_half_written_folder_is_not_listed(store: Store) -> None:
    """What a killed process left of a write is neither listed nor readable."""
    path = write(store)
    place = store.catalogue.folder(path)
    place.rename(place.with_name(".new-0123"))
    assert store.catalogue.checkpoints() == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.read(path)


def test_a_store_without_a_folder_goes_with_its_service(caplog: pytest.LogCaptureFixture) -> None:
    """Without a store folder checkpoints live in a temporary one, which is said once and then deleted."""
    store = Store(Catalogue(None))
    root = store.catalogue.root
    write(store)
    write(store, name="y")
    assert len(store.catalogue.checkpoints()) == 2
    assert [record.message for record in caplog.records if "no store folder" in record.message] == [
        "no store folder was given: runs and checkpoints live until this service is closed"
    ]
    store.catalogue.close()
    assert not root.exists()


def test_runs_are_listed_with_their_latest_checkpoints(store: Store) -> None:
    """A run is found by its id, colons included, with its newest checkpoint of each kind; newest run first."""
    start = datetime.now(UTC)
    store.catalogue.open_run(Run("old:train:0", "some/base", LoraConfig(), {}, start - timedelta(days=1)))
    store.catalogue.open_run(Run(RUN, "some/base", LoraConfig(rank=2), {"a": "b"}, start))
    write(store, name="one", time=start)
    newest = write(store, name="two", time=start + timedelta(seconds=5))
    write(store, name="zero", time=start - timedelta(seconds=5))
    run = store.catalogue.run(RUN)
    assert [r.training_run_id for r in store.catalogue.runs()] == [RUN, "old:train:0"]
    assert (run.base_model, run.lora_rank, run.user_metadata) == ("some/base", 2, {"a": "b"})
    assert run.last_checkpoint.tinker_path == newest
    assert run.last_sampler_checkpoint is None
    assert run.last_request_time == start + timedelta(seconds=5)
    with pytest.raises(CheckpointError, match="no training run 'nobody'"):
        store.catalogue.run("nobody")
