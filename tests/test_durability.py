"""What survives the end of a server, however it comes: the official SDK trains on while it is killed beneath it."""

from __future__ import annotations

import random

import pytest

from killing import POINTS, killed, nurse, undisturbed

pytestmark = [
    pytest.mark.filterwarnings("ignore::tinker.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
]


def test_what_was_accepted_runs_exactly_once_whenever_the_server_is_killed(tmp_path):
    """Killed 33 times, everything the client was told and every checkpoint is bit by bit that of a run left alone."""
    random_ones = [None] * 25
    ends = [*random_ones, *[(point, random.Random(point).randrange(4)) for point in POINTS]]
    random.Random(0).shuffle(ends)
    with nurse(tmp_path / "calm") as calm:
        told, files = undisturbed(calm, 60)
    with nurse(tmp_path / "killed") as server:
        again, same, count = killed(server, 60, ends, seed=1)
    assert again == told
    assert same == files
    assert len(files) > 10
    assert count == 33
