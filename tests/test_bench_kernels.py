"""Tests of the kernel benchmark: what it measures, and what it refuses to show a speed of."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = '''
import torch

from tickwork_kernels.head_torch import TorchHead
from tickwork_kernels.heads import register_head_kernel
from tickwork_kernels.token_losses import TokenLoss, register_token_loss


class Toy(TorchHead):
    """The reference under another name."""

    name = "toy"

    def preference(self, case):
        return -1


class Wrong(Toy):
    """Forgets a part of every gradient."""

    name = "wrong"

    def through(self, rows, chunk, alpha, beta):
        return 0.9 * super().through(rows, chunk, alpha, beta)


def hinge(logp, inputs, config):
    """Ask for a margin and no more."""
    short = (logp < config["margin"]).to(logp.dtype) * inputs["weights"]
    return short * (config["margin"] - logp), -short


register_token_loss(TokenLoss("hinge", hinge, ("weights",), {"margin": -1.0}, zero_when="weights"))
register_head_kernel(Toy())
register_head_kernel(Wrong())
'''
PROVIDERS = ("torch", "attention", "toy", "wrong", "naive", "liger", "base GEMM", "torch-fused", "hinge", "ppo")


class Outcome:
    """What one run of the benchmark left behind."""

    def __init__(self, folder: Path) -> None:
        (folder / "toys.py").write_text(PLUGIN)
        options = [part for name in PROVIDERS for part in ("--provider", name)]
        command = [sys.executable, "-m", "bench", "kernels", "--preset", "smoke", *options]
        paths = [str(folder), str(ROOT / "kernels"), str(ROOT)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self.folder = folder / "results"
        self.done = subprocess.run(
            [*command, "--plugin", "toys", "--out", str(self.folder)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip
        self.results = [json.loads(path.read_text()) for path in self.folder.glob("*.json")]

    def rows(self, provider: str, **wanted: Any) -> list[dict[str, Any]]:
        """Return the rows of a provider."""
        (result,) = self.results
        wanted = {"operation": "head", "rank": 0, "provider": provider, **wanted}
        return [row for row in result["rows"] if wanted.items() <= row.items()]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run serves all tests."""
    outcome = Outcome(tmp_path_factory.mktemp("bench"))
    assert outcome.results, outcome.done.stderr
    return outcome


@pytest.mark.parametrize("provider", ["torch", "attention", "toy", "naive"])
def test_a_correct_provider_has_errors_and_speeds_in_every_mode(outcome: Outcome, provider: str) -> None:
    """Forward, backward and full are timed, with their errors; all but a backward have a floor."""
    rows = outcome.rows(provider)

    assert [row["mode"] for row in rows] == ["forward", "backward", "full"]
    for row in rows:
        assert row["status"] == "ok"
        assert row["seconds_p20"] <= row["seconds_p50"] <= row["seconds_p80"]
        assert row["logp_error"] < 1e-4
        assert row["dx_error"] < 1e-2
        assert row["deterministic"]
        assert row["ratio_to_best_anchor"] > 0
        assert (row["floor_fraction"] is None) == (row["mode"] == "backward")
    assert rows[-1]["extra_bytes"] >= 0


@pytest.mark.parametrize("loss", ["hinge", "ppo"])
def test_a_registered_loss_is_measured(outcome: Outcome, loss: str) -> None:
    """A user's loss stands beside the built-in ones, held to float64 and to the suite."""
    (row,) = outcome.rows(loss, operation="losses")

    assert row["status"] == "ok"
    assert row["checks"] == "all 5 passed"
    assert row["seconds_p50"] > 0
    assert row["dx_error"] < 1e-3


def test_a_wrong_kernel_has_no_speed_and_fails_the_run(outcome: Outcome) -> None:
    """Its checks fail, so nothing of its time is told, and the exit status is 1."""
    rows = outcome.rows("wrong")

    assert outcome.done.returncode == 1, outcome.done.stderr
    assert len(rows) == 1
    assert rows[0]["status"].startswith("failed: check")
    assert all(rows[0][name] is None for name in rows[0] if name.startswith(("seconds", "useful", "floor", "ratio")))
    assert "failed: wrong" in outcome.done.stdout


def test_what_refuses_or_is_missing_is_listed_with_its_reason(outcome: Outcome) -> None:
    """Nothing is left out in silence."""
    assert outcome.rows("attention", rank=4)[0]["status"] == "refused: lora: not supported"
    assert outcome.rows("liger")[0]["status"].startswith("absent: liger_kernel is not installed")


@pytest.mark.parametrize(
    ("operation", "providers"), [("adamw", ("torch", "torch-fused")), ("multi_lora", ("torch", "base GEMM"))]
)
def test_other_operations_are_measured(outcome: Outcome, operation: str, providers: tuple[str, ...]) -> None:
    """Each against what it is compared with."""
    for provider in providers:
        (row,) = outcome.rows(provider, operation=operation, mode="full", rank=4 if operation == "multi_lora" else 0)
        assert row["status"] == "ok"
        assert row["seconds_p50"] > 0


def test_results_are_written_as_json_csv_and_charts(outcome: Outcome) -> None:
    """The CSV has the JSON's rows; each case has a chart; circumstances and ceilings are told."""
    (result,), (table,) = outcome.results, list(outcome.folder.glob("*.csv"))
    with table.open() as file:
        assert [row["provider"] for row in csv.DictReader(file)] == [row["provider"] for row in result["rows"]]
    assert result["versions"]["torch"]
    assert result["ceilings"]["copy_gb_per_s"] > 0
    pytest.importorskip("matplotlib")
    assert len(list(outcome.folder.glob("*.png"))) == 5
