"""Training scripts in process that are killed and run again end as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nursing import POINTS, start

RANDOM = 6


class Nurse:
    """Runs scripts one after the other, from a process that has all they need."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab")
        self._process = start("script_nurse.py", self._log)
        assert self._line() == "ready"

    def run(self, kill: tuple[int, float] | None = None, **about: Any) -> tuple[dict[int, str], Any, str]:
        """Run a script to its end, however that comes.

        Args:
            kill: once it is told of a result of that place or a later one, and so many seconds after.

        Returns:
            what it was told, what was saved in the end, and how it ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(about) + "\n")
        pid, told, saved = int(self._line().removeprefix("pid ")), {}, None
        while not (line := self._line()).startswith("ended"):
            assert not line.startswith("error"), line
            if line.startswith("saved"):
                saved = json.loads(line.removeprefix("saved "))
                continue
            place, digest = line.split()
            told[int(place)] = digest
            if kill is not None and int(place) >= kill[0]:
                time.sleep(kill[1])
                with contextlib.suppress(ProcessLookupError):  # it was quicker
                    os.kill(pid, signal.SIGKILL)
                kill = None
        return told, saved, line.removeprefix("ended ")

    def close(self) -> None:
        """End."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._log.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nurse has died"
        return line.strip()


@pytest.fixture(scope="module")
def nurse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nurse]:
    found = Nurse(tmp_path_factory.mktemp("scripts") / "log")
    yield found
    found.close()


@pytest.fixture(scope="module")
def calm(nurse: Nurse, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, str], Any]:
    """What a script is told and saves that nobody kills."""
    told, saved, ended = nurse.run(store=str(tmp_path_factory.mktemp("calm")), script="sync")
    assert ended == "0"
    assert len(told) == 38
    assert sorted(saved) == ["weights/final", "weights/turn-1", "weights/turn-13", "weights/turn-5", "weights/turn-9"]
    return told, saved


@pytest.mark.parametrize("script", ["sync", "trio"])
def test_a_script_that_is_killed_and_run_again_ends_as_one_that_was_left_alone(
    tmp_path: Path, nurse: Nurse, calm: Any, script: str
) -> None:
    """Killed at random instants and at each point of the journal, all it is told and saves is bit by bit the same."""
    dice = random.Random(script)
    ends: list[str | None] = [None] * RANDOM + list(POINTS)
    dice.shuffle(ends)
    killed = place = 0
    for point in ends:
        if point is None:
            where: dict[str, Any] = {"kill": (place + dice.randrange(3), 0.02 * dice.random())}
        else:
            where = {"at": point, "after": 0 if point.startswith("snapshot") else dice.randrange(3)}
        told, saved, ended = nurse.run(store=str(tmp_path), script=script, **where)
        assert told.items() <= calm[0].items()
        if saved is not None:
            break
        assert ended == str(-signal.SIGKILL)
        killed, place = killed + 1, max([place, *told])
    told, saved, ended = nurse.run(store=str(tmp_path), script=script)
    assert ended == "0"
    assert told == calm[0]
    assert saved == calm[1]
    assert killed > 6
