"""The bench of many clients: what its rows say, and that merged steps took fewer passes than steps one by one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from bench import clients, record, train_cuda
from bench.clients import memory, sampling
from bench.clients.cases import CASES, Case
from bench.clients.drive import Figures, Side, Turn, _figures, _turn
from bench.clients.plot import plot
from bench.clients.rows import IN_LINE, MERGED, latencies, speeds
from bench.table import table
from bench.workloads import Workload, make_qwen205k, tiny

SMALL = Case("small", "random 205k", make_qwen205k, 1024, (1, 2, 8), (2,), (1, 2, 4), {8: 1.0}, length=8)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What one short run of a small case leaves behind."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clients, "CASES", {"small": SMALL})
        patch.setattr(sampling, "TOKENS", 4)
        patch.setattr(record.save, "__defaults__", (folder,))
        assert clients.main(["--rounds", "1", "--seconds", "0.1", "--invariant"]) == 0
    (path,) = folder.glob("clients-*.json")
    return SimpleNamespace(folder=folder, rows=json.loads(path.read_text())["rows"])


def figures(rows: list[dict[str, Any]], speed: str) -> dict[int, dict[str, Any]]:
    """Return the rows of one speed with equal lengths, by number of clients."""
    return {row["clients"]: row for row in rows if row["speed"] == speed and " to " not in row["rows"]}


def test_merged_steps_share_passes_and_steps_one_by_one_do_not(outcome: SimpleNamespace) -> None:
    """A step is one pass where nothing is merged; of eight clients at once several are."""
    alone, many = (figures(outcome.rows, "training")[count]["figures"] for count in (1, 8))

    assert alone[MERGED]["passes"] == alone[IN_LINE]["passes"] == 1
    assert many[IN_LINE]["passes"] == 1
    assert many[MERGED]["passes"] < 0.6


def test_every_number_of_clients_has_its_rows(outcome: SimpleNamespace) -> None:
    """Speeds and latencies of both parts, passes of training, one cost of being invariant in it."""
    assert set(figures(outcome.rows, "training")) == {1, 2, 8}
    assert set(figures(outcome.rows, "training, passes")) == {1, 2, 8}
    assert set(figures(outcome.rows, "training, cost of invariant")) == {8}
    assert set(figures(outcome.rows, "sampling")) == {1, 2, 4}
    assert [row["clients"] for row in outcome.rows if row["rows"] == "4 rows of 2 to 14"] == [2, 2, 2]
    assert {count: row["wanted"] for count, row in figures(outcome.rows, "training, latency").items()} == {
        1: "<= 1.02",
        2: "",
        8: "",
    }


def test_charts_lie_beside_the_result(outcome: SimpleNamespace) -> None:
    """One for training, one for sampling."""
    pytest.importorskip("matplotlib")

    assert sorted(path.stem.split("-")[-1] for path in outcome.folder.glob("*.png")) == ["sampling", "training"]


def test_no_chart_is_drawn_of_two_points(tmp_path: Any) -> None:
    """A line wants more than two numbers of clients."""
    found = {MERGED: Figures(4.0, 1.0, 1.0, 0.5), IN_LINE: Figures(2.0, 4.0, 4.0, 1.0)}
    rows = [speeds("training", SMALL, count, "rows", found, 3.0) for count in (1, 8)]

    assert plot(tmp_path / "x.json", rows) == []
    assert rows[0]["ratio"] == 2.0
    assert [row.style for row in table(rows).rows] == ["bold red"] * 2
    assert latencies("training", SMALL, 8, "rows", found)["ratio"] == 0.25


async def test_a_turn_counts_every_act_and_clients_in_line_wait_for_each_other(autojump_clock: Any) -> None:
    """Two clients of 10 tokens each; in line never two at once."""
    import trio

    under_way: list[int] = []
    most = 0

    async def act() -> int:
        nonlocal most
        under_way.append(1)
        most = max(most, len(under_way))
        await trio.sleep(1)
        under_way.pop()
        return 10

    service: Any = None
    for in_line, expected in ((False, 2), (True, 1)):
        most = 0
        turn = await _turn(Side(service, [act, act], in_line), 0.0)
        assert (most, turn.tokens, len(turn.latencies)) == (expected, 20, 2)


def test_figures_are_medians_over_turns_and_acts() -> None:
    """Speed by turn, latency by act, passes by act."""
    turns = [Turn(1.0, [0.001, 0.003], 100, 1), Turn(2.0, [0.002, 0.002], 100, 1), Turn(1.0, [0.002, 0.002], 300, 2)]
    found = _figures(turns)

    assert (found.tokens_per_second, found.p50, found.passes) == (100.0, pytest.approx(2.0), pytest.approx(4 / 6))


def test_a_client_holds_its_weights_gradient_and_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an adapter's state must take at least, it takes; the row says how much more."""
    monkeypatch.setattr(memory, "MORE", 4)
    case = CASES["tiny"]
    (row,) = memory.measure(case, case.make(record.RESULTS))

    # rank 8 on attention, feed-forward and head of tickwork/tiny
    assert row["values"] == 8 * (4 * (4 * 384 + 3 * 704) + 192 + 264)
    assert row["ratio"] > 0.8


def test_a_client_has_as_many_tokens_in_varied_rows() -> None:
    """256 of them, between 16 and 112 a row."""
    for case in CASES.values():
        assert sum(case.lengths(varied=True)) == sum(case.lengths(varied=False)) == 4 * case.length
    assert CASES["tiny"].lengths(varied=True) == [16, 48, 80, 112]


@pytest.mark.parametrize("way", ["ours", "peft"])
def test_the_steps_of_the_gpu_rows_run(way: str) -> None:
    """In bfloat16, here on a few rows on the CPU."""
    whole = tiny("equal")
    few: Workload = attrs.evolve(whole, rows=whole.rows[:2], prompts=whole.prompts[:2])

    assert train_cuda.run(way, few, 8, "cpu")["tokens_per_second"] > 0


def test_a_row_without_both_figures_has_no_ratio() -> None:
    """What did not fit is said, and nothing is wanted of it."""
    fast, slow = ({"tokens_per_second": speed, "peak_bytes": 2**30} for speed in (200.0, 100.0))
    rows = train_cuda.rows_of("8B", 8, {"ours": fast, "peft": slow, "liger": {"error": "out of memory"}})

    assert [(row["ratio"], row["wanted"]) for row in rows] == [(2.0, ">= 1.3"), ("-", "")]
    assert rows[1]["against"] == "liger out of memory"
    assert len(table(rows).rows) == 2
