"""The kill test at length: ``make torture``; not collected by a plain ``pytest``.

Runs of at most ``MOST`` kills each have a seed, a way and servers of their own. ``TORTURE_KILLS`` is how many kills are
done in all (500), ``TORTURE_SEED`` the first run's seed (0): each run prints the two values that repeat it alone.
"""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest

from killing import Nurse, hurry, killed, script, several, undisturbed
from nursing import POINTS

KILLS, SEED = int(os.environ.get("TORTURE_KILLS", "500")), int(os.environ.get("TORTURE_SEED", "0"))
# Turns of a script for each kill: with fewer, servers would have nothing to do.
MOST, TURNS = 50, 2
WAYS = (
    (script, {"snapshot_seconds": 0.1}),
    (several, {"snapshot_seconds": 0.1, "invariant": True}),
    (script, {"snapshot_seconds": 0.02, "journal": "power"}),
)
RUNS = [(SEED + place, min(MOST, KILLS - first)) for place, first in enumerate(range(0, KILLS, MOST))]

pytestmark = [
    pytest.mark.filterwarnings("ignore::tinker.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
]


@pytest.fixture(scope="module")
def nurse(tmp_path_factory):
    found = Nurse(tmp_path_factory.mktemp("servers") / "log")
    yield found
    found.close()


def ends_of(seed: int, kills: int) -> list[tuple[str, int] | None]:
    """Return where each server ends: some at the points of the journal, all others at any instant."""
    chance = random.Random(seed)
    chosen = chance.sample(POINTS, min(len(POINTS), kills // 5))
    # Until its point comes a server is left to work: a later snapshot would use up the turns of all the kills after it.
    points = [(point, chance.randrange(2 if point.startswith("snapshot") else 6)) for point in chosen]
    ends = [*points, *[None] * (kills - len(points))]
    chance.shuffle(ends)
    return ends


@pytest.mark.parametrize(("seed", "kills"), RUNS)
def test_what_was_accepted_runs_exactly_once(tmp_path, monkeypatch, nurse, seed, kills):
    """All that the client is told, and every checkpoint, bit by bit as by a server that is let be."""
    hurry(monkeypatch)
    begun = time.perf_counter()
    play, about = WAYS[seed % len(WAYS)]
    rounds = TURNS * kills + 10
    print(f"\nTORTURE_SEED={seed} TORTURE_KILLS={kills}: {play.__name__}, {about}", flush=True)  # noqa: T201
    told, files = undisturbed(nurse.at(tmp_path / "calm", **about), play, rounds, seed)
    again, same, count = killed(nurse.at(tmp_path / "killed", **about), play, rounds, ends_of(seed, kills), seed)
    assert again == told
    assert same == files
    assert files
    assert count == kills
    what = f"{count} kills, {len(told)} results and {len(files)} files the same"
    print(f"{what}, {time.perf_counter() - begun:.0f} s", flush=True)  # noqa: T201
    shutil.rmtree(tmp_path)  # those of runs that fail stay
