"""The bench of the journal: each part works on tiny sizes, and its rows say what was measured."""

from __future__ import annotations

import json
import signal

import pytest
from bench.durability import recovery, speed, stall
from bench.durability.client import Trainer, batch, open_sdk, random_rows
from bench.durability.serving import LISTENING, WAIT, served
from bench.table import table
from bench.workloads import make_qwen205k

ROWS = random_rows(2, 12, 1024)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_qwen205k(tmp_path_factory.mktemp("models") / "205k"))


@pytest.fixture(scope="module")
def urls(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    with speed.pair(model, folder) as found:
        yield found
    assert (folder / speed.ON / "journal").is_dir()
    assert not (folder / speed.OFF / "journal").exists()


def test_tokens_a_second_with_the_journal_and_without(urls):
    (row,) = speed.tokens(urls, "tiny", ROWS, rounds=1, steps=2)
    on, off = (row["figures"]["seconds"][way] for way in (speed.ON, speed.OFF))
    assert row["ratio"] == round(off / on, 3)
    assert row["ours"] == f"{48 / on:,.0f} tokens/s"


def test_acceptance_with_the_journal_and_without(urls):
    passed, stepped = speed.acceptance(urls, "tiny", ROWS, rounds=2, steps=3)
    assert passed["figures"]["answers"] == stepped["figures"]["answers"] == 6
    assert passed["workload"] != stepped["workload"]
    for row in (passed, stepped):
        on, off = (float(row[side].removeprefix("journal off ").split()[0]) for side in ("ours", "against"))
        assert row["ratio"] == pytest.approx(on - off, abs=0.003)


def test_a_lane_is_brought_back(tmp_path, model):
    (row,) = recovery.measure(model, "tiny", ROWS, tmp_path, rounds=1, requests=6)
    [(run, back)] = row["figures"]["rounds"]
    assert run > 0
    assert row["ratio"] == round(back / run, 3)


def test_a_server_that_ends_is_told(tmp_path):
    with served("", tmp_path, program=("-c", "print('what went wrong')")) as server:
        with pytest.raises(SystemExit, match="what went wrong"):
            server.wait_for(LISTENING)


def test_a_watched_server_tells_of_stages_copies_and_writes(tmp_path, model):
    server = stall.watched(model, tmp_path, stall.ON)
    service = open_sdk(server.url)
    trainer = Trainer(service, batch(ROWS), stall.RANK)
    trainer.ahead(20)
    service.close("success").result(WAIT)
    server.end(signal.SIGTERM)
    spans = json.loads((tmp_path / f"{stall.ON}.json").read_text())
    assert len(spans["stages"]) >= 20
    assert len(spans["copies"]) >= len(spans["writes"]) >= 1
    assert all(begun < ended for several in spans.values() for begun, ended in several)
    found = stall.seen(spans, (spans["stages"][0][0], spans["stages"][-1][1]))
    assert found.gap > 0
    assert found.copies


SPANS = {
    "stages": [*[(float(n), n + 0.5) for n in range(stall.ARRIVING)], (10, 11), (11.001, 12), (12.5, 14), (14.002, 15)],
    "copies": [(11.5, 11.75)],
    "writes": [(12.1, 12.6)],
}


def test_gaps_stages_and_copies_are_told_apart():
    """Gaps between stages once requests have arrived; stages beside a write, and others; none that holds a copy."""
    found = stall.seen(SPANS, (0.0, 15.0))
    assert found.gap == pytest.approx(500)
    assert found.writing == pytest.approx([1500])
    assert found.plain == pytest.approx([1000, 998])
    assert found.copies == pytest.approx([250])
    assert stall.seen(SPANS, (0.0, 12.0)).gap == pytest.approx(1)


def test_what_a_snapshot_costs_is_told_beside_none():
    on = [stall.Seen(gap, [30.0], [20.0], [4.0, 6.0]) for gap in (3.0, 5.0, 4.0)]
    off = [stall.Seen(gap, [], [20.0, 20.0], []) for gap in (1.0, 2.0, 9.0)]
    idle, copy, stage = stall.rows_of(on, off, "tiny")
    assert (idle["ratio"], copy["ratio"], stage["ratio"]) == (2.0, 0.25, 1.5)
    assert [row.style for row in table([idle, copy, stage]).rows] == ["bold red", "", ""]
    with pytest.raises(SystemExit, match="no snapshot was taken"):
        stall.rows_of(off, off, "tiny")
