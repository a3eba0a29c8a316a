"""Tests of crashes: at each point between two writes, against a model; and of processes that are killed."""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from journals import GUARD, LANE, crashed, lane, numbers, request, result, state
from tickwork.errors import JournalError
from tickwork.futures import Inner
from tickwork.journal.journal import Journal
from tickwork.journal.records import FetchedRecord, ForgetRecord, Record, SkippedRecord
from tickwork.journal.recovery import Recovered

# A RAM disk where there is one: what is copied here is what a process left, and not what a disk has kept.
FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


class CrashError(BaseException):
    """The process ends here."""


class Fuse:
    """A hook that raises once it has been passed so many times, and ever after."""

    def __init__(self) -> None:
        self.left: int | None = None

    def __call__(self, point: str) -> None:
        if self.left == 0:
            raise CrashError(point)
        if self.left is not None:
            self.left -= 1


@attrs.define
class Kept:
    """What a model remembers of a result."""

    settled: float
    fetched: float | None = None
    expired: bool = False


@attrs.define
class Lane:
    """What a model remembers of a lane."""

    requests: set[int] = attrs.Factory(set)
    skipped: list[tuple[int, int]] = attrs.Factory(list)
    snapshot: int | None = None

    def follow(self) -> list[int]:
        """Return the numbers after the snapshot that follow each other, or numbers given up."""
        number, found = (0 if self.snapshot is None else self.snapshot + 1), []
        gone = {number for first, last in self.skipped for number in range(first, last + 1)}
        while number in self.requests | gone:
            found += [number] if number in self.requests else []
            number += 1
        return [*found, number]

    @property
    def next(self) -> int:
        """The number that has to come next."""
        return self.follow()[-1]


@attrs.define
class Model:
    """What a journal should hold."""

    lanes: dict[str, Lane] = attrs.Factory(dict)
    results: dict[tuple[str, int], Kept] = attrs.Factory(dict)

    def summary(self) -> Any:
        """Say everything in a form that can be compared."""
        lanes = {}
        for name, each in self.lanes.items():
            *run, after = each.follow()
            kept = [(number, self.known(name, number)) for number in run]
            early = sorted(number for number in each.requests if number > after)
            lanes[name] = (each.snapshot, kept, after, early, sorted(each.skipped))
        served = {key: kept.fetched for key, kept in self.results.items() if not kept.expired}
        return lanes, served

    def known(self, name: str, number: int) -> str:
        """Say what is known of a request."""
        kept = self.results.get((name, number))
        return "accepted" if kept is None else "expired" if kept.expired else "settled"

    def unsettled(self, name: str) -> list[int]:
        """Return the requests that can run and have not."""
        return [number for number in self.lanes[name].follow()[:-1] if (name, number) not in self.results]

    def trim(self, settled: float, fetched: float) -> None:
        """Let go of what is covered, fetched or old."""
        for each in self.lanes.values():
            each.requests -= set(range(0 if each.snapshot is None else each.snapshot + 1))
        for (name, number), kept in list(self.results.items()):
            if kept.settled < settled or (kept.fetched is not None and kept.fetched < fetched):
                kept.expired = True
                if name not in self.lanes or number not in self.lanes[name].requests:
                    del self.results[name, number]


def told(recovered: Recovered) -> Any:
    """Say what a journal holds in the form of ``Model.summary``."""
    lanes = {}
    for past in recovered.lanes:
        asked = [(each.number, "accepted" if each.result is None else each.result) for each in past.requests]
        kept = [(n, r if isinstance(r, str) else "expired" if r.expired else "settled") for n, r in asked]
        snapshot = None if past.snapshot is None else past.snapshot.number
        lanes[past.about.lane] = (snapshot, kept, past.next, numbers(past.early), list(past.skipped))
        assert [each.payload.params.learning_rate for each in past.requests] == [each.number for each in past.requests]
    served = {(each.lane, each.number): each.fetched for each in recovered.results}
    assert all(each.value.metrics == {"step": each.number} for each in recovered.results)
    return lanes, served


# What is done to the journal, and to its model.
Step = tuple[Callable[[], Inner[None]], Callable[[Model], object]]


class Crashes(RuleBasedStateMachine):
    """A journal and its model; after a crash it holds all that was acknowledged, and of the rest a beginning."""

    at_once = False

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=FOLDER))
        self.copies, self.opened, self.clock = 0, 0, 0.0
        self.fuse = Fuse()
        self.journal = Journal(self.folder / "0", at=self.fuse, at_once=self.at_once)
        self.model = Model()
        self.open_lane()

    def teardown(self) -> None:
        self.restart([self.model])
        self.journal.close()
        shutil.rmtree(self.folder)

    def act(self, steps: list[Step], together: bool = False) -> None:
        """Do things one after the other, or in one commit; at a crash, begin again with what is on the disk."""
        states, futures = [self.model], []
        # What decides how many share a commit must not be the speed of threads, or no example could be run again.
        hold = self.journal._writer._changed if together else nullcontext()
        try:
            with hold:
                for do, change in steps:
                    after = copy.deepcopy(states[-1])
                    change(after)
                    states.append(after)
                    futures.append(do())
                    if not together:
                        futures[-1].result(GUARD)
            for future in futures:
                future.result(GUARD)
            self.model = states[-1]
        except (CrashError, JournalError):
            assert self.fuse.left == 0
            acknowledged = sum(future.exception(GUARD) is None for future in futures)
            self.restart(states[acknowledged:])

    def accepting(self, name: str, number: int) -> Step:
        return self.append(request(number, name)), lambda model: model.lanes[name].requests.add(number)

    def settling(self, name: str, number: int) -> Step:
        kept = Kept(self.clock)
        do = self.append(result(number, name, settled=self.clock))
        return do, lambda model: model.results.update({(name, number): kept})

    def append(self, *records: Record) -> Callable[[], Inner[None]]:
        return lambda: self.journal.append(records)

    def restart(self, possible: list[Model]) -> None:
        self.copies += 1
        store = crashed(self.folder / str(self.copies - 1), self.folder / str(self.copies))
        self.journal.close()
        self.fuse.left = None
        self.journal = Journal(store, at=self.fuse, at_once=self.at_once)
        assert self.journal.recovered.damage == ()
        found = told(self.journal.recovered)
        matching = [model for model in possible if model.summary() == found]
        assert matching, (found, [model.summary() for model in possible])
        self.model = matching[0]
        for past in self.journal.recovered.lanes:
            if past.snapshot is not None:
                arrays = self.journal.read_snapshot(past.snapshot).arrays
                np.testing.assert_array_equal(arrays["adapter"], state(past.snapshot.number).arrays["adapter"])
        files = {file.name for file in store.glob("journal/snapshots/*")}
        assert files == {past.snapshot.file for past in self.journal.recovered.lanes if past.snapshot is not None}

    @rule(points=st.integers(0, 12))
    @precondition(lambda self: self.fuse.left is None)
    def light(self, points: int) -> None:
        self.fuse.left = points

    @rule()
    @precondition(lambda self: self.opened < 2 or not self.model.lanes)
    def open_lane(self) -> None:
        name = f"lane-{self.opened}"
        self.opened += 1
        self.act([(self.append(lane(name)), lambda model: model.lanes.setdefault(name, Lane()))])

    @rule(data=st.data(), count=st.integers(1, 4), ahead=st.integers(0, 2), together=st.booleans())
    @precondition(lambda self: self.model.lanes)
    def accept(self, data: st.DataObject, count: int, ahead: int, together: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.lanes)))
        known = self.model.lanes[name]
        first = known.next + ahead
        fresh = [number for number in range(first, first + count) if number not in known.requests]
        self.act([self.accepting(name, number) for number in fresh], together)

    @rule(data=st.data(), count=st.integers(1, 4))
    @precondition(lambda self: any(map(self.model.unsettled, self.model.lanes)))
    def settle(self, data: st.DataObject, count: int) -> None:
        name = data.draw(st.sampled_from([name for name in sorted(self.model.lanes) if self.model.unsettled(name)]))
        self.clock += 1.0
        self.act([self.settling(name, number) for number in self.model.unsettled(name)[:count]])

    @rule(data=st.data())
    @precondition(lambda self: self.model.results)
    def fetch(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.results)))
        self.clock += 1.0
        when = self.clock

        def change(model: Model) -> None:
            model.results[key].fetched = model.results[key].fetched or when

        self.act([(self.append(FetchedRecord(key[0], (key[1],), when)), change)])

    @rule(data=st.data())
    @precondition(lambda self: self.model.lanes)
    def give_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.lanes)))
        known = self.model.lanes[name]
        early = [number for number in known.requests if number > known.next]
        if early:
            gap = (known.next, min(early) - 1)
            record = SkippedRecord(name, *gap)
            self.act([(self.append(record), lambda model: model.lanes[name].skipped.append(gap))])

    @rule(data=st.data(), count=st.integers(0, 3), cover=st.booleans(), together=st.booleans())
    @precondition(lambda self: self.model.lanes)
    def work(self, data: st.DataObject, count: int, cover: bool, together: bool) -> None:
        """Accept some requests, settle all that can run and perhaps cover them."""
        name = data.draw(st.sampled_from(sorted(self.model.lanes)))
        plan = copy.deepcopy(self.model)
        first = plan.lanes[name].next
        fresh = [number for number in range(first, first + count) if number not in plan.lanes[name].requests]
        plan.lanes[name].requests.update(fresh)
        self.clock += 1.0
        steps = [self.accepting(name, number) for number in fresh]
        steps += [self.settling(name, number) for number in plan.unsettled(name)]
        if cover and plan.lanes[name].follow()[:-1]:
            last = plan.lanes[name].follow()[-2]
            write = partial(self.journal.write_snapshot, name, last, state(last))
            steps.append((write, lambda model: setattr(model.lanes[name], "snapshot", last)))
        self.act(steps, together)

    @rule(ago=st.integers(0, 2))
    def trim(self, ago: int) -> None:
        self.clock += 1.0
        times = (self.clock - 3 * ago, self.clock - ago)
        self.act([(lambda: self.journal.trim(*times), lambda model: model.trim(*times))])

    @rule(data=st.data())
    @precondition(lambda self: self.model.lanes)
    def forget(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.lanes)))
        if all((name, number) in self.model.results for number in self.model.lanes[name].requests):
            self.act([(self.append(ForgetRecord("lanes", name)), lambda model: model.lanes.pop(name))])


class CrashesAtOnce(Crashes):
    """Where whoever appends a small record writes it."""

    at_once = True


TestCrashes, TestCrashesAtOnce = Crashes.TestCase, CrashesAtOnce.TestCase
TestCrashes.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestCrashesAtOnce.settings = TestCrashes.settings


POINTS = [
    "write",
    "commit",
    "remove",
    "settle",
    "snapshot-write",
    "snapshot-sync",
    "snapshot-rename",
    "snapshot-folder",
]


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_each_point_of_a_snapshot_leaves_the_old_state_or_the_new(tmp_path: Path, point: str) -> None:
    """Between any two writes of a snapshot that replaces another, the lane is whole."""
    armed = False

    def at(passed: str) -> None:
        if armed and passed == point:
            raise CrashError(point)

    journal = Journal(tmp_path / "store", at=at)
    records = [lane(), *[request(number) for number in range(4)], *[result(number) for number in range(4)]]
    journal.append(records).result(GUARD)
    journal.write_snapshot(LANE, 1, state(1)).result(GUARD)
    armed = True
    with pytest.raises((CrashError, JournalError)):
        journal.write_snapshot(LANE, 3, state(3)).result(GUARD)
    store = crashed(tmp_path / "store", tmp_path / "copy")
    journal.close()
    journal = Journal(store)
    journal.close()
    (past,) = journal.recovered.lanes
    assert past.snapshot is not None
    durable = point in ("remove", "settle")
    assert (past.snapshot.number, numbers(past.requests)) == ((3, []) if durable else (1, [2, 3]))
    assert len(list(store.glob("journal/snapshots/*"))) == 1


@pytest.fixture
def nurse() -> Iterator[subprocess.Popen[str]]:
    """A process that forks writers."""
    command = [sys.executable, "-c", "import journals; journals.nurse()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, bufsize=1, env=environment, **pipes) as process:
        yield process


def test_killed_at_any_instant_all_that_was_acknowledged_is_there(nurse: subprocess.Popen[str], tmp_path: Path) -> None:
    """Ten writers on one store, one after the other, each killed in the middle of its work."""
    assert nurse.stdin is not None
    assert nurse.stdout is not None
    dice = random.Random(11)
    for _ in range(10):
        nurse.stdin.write(f"{tmp_path}\n")
        child = int(nurse.stdout.readline())
        seen = [int(nurse.stdout.readline()) for _ in range(dice.randrange(1, 40))]
        for _ in range(dice.randrange(20_000)):
            pass  # lands anywhere in the writer's work, not just after an answer
        os.kill(child, signal.SIGKILL)
        while (line := nurse.stdout.readline()) != "ended\n":
            seen.append(int(line))
        journal = Journal(tmp_path)
        assert journal.recovered.damage == ()
        (past,) = journal.recovered.lanes
        assert past.next > seen[-1]
        assert past.early == ()
        settled = {each.number for each in past.requests if each.result is not None}
        covered = -1 if past.snapshot is None else past.snapshot.number
        assert set(range(covered + 1, seen[-1] + 1)) <= settled
        if past.snapshot is not None:
            assert journal.read_snapshot(past.snapshot).metadata == {"steps": covered}
        journal.close()
