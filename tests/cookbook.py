"""The official cookbook against a server: ``make test-cookbook``; not collected by a plain ``pytest``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tickwork.models import locate

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-cookbook" / "bin" / "python"


@pytest.fixture
def recipe(server_url, tmp_path):
    def run(name):
        env = {
            **os.environ,
            "TINKER_BASE_URL": server_url,
            "TINKER_API_KEY": "tml-cookbook",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HOME": str(tmp_path),
            "TINKER_TELEMETRY": "0",
        }
        folder = tmp_path / name
        folder.mkdir()
        command = [PYTHON, ROOT / "tests" / "cookbook_recipes.py", name, locate("tickwork/tiny"), folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def series(found, name):
    return [line[name] for line in found["metrics"] if name in line]


def test_supervised_training(recipe):
    found = recipe("supervised")
    losses = series(found, "train_mean_nll")
    assert losses[-1] < 0.8 * losses[0]
    assert series(found, "test/nll")
    assert {Path(line["state_path"]).name for line in found["checkpoints"]} >= {"final"}


def test_preferences(recipe):
    found = recipe("dpo")
    accuracy, losses = series(found, "accuracy"), series(found, "dpo_loss")
    assert losses[-1] < losses[0]
    assert accuracy[-1] >= accuracy[0]


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic_async"])
def test_reinforcement(recipe, name):
    found = recipe(name)
    assert len(series(found, "optim/lr")) >= 3
    assert all(abs(x) < 1e-3 for x in series(found, "optim/kl_sample_train_v1")[:1]), "sampler and trainer agree"
    assert found["checkpoints"]


def test_download(recipe):
    assert set(recipe("download")) >= {"adapter_config.json", "adapter_model.safetensors"}


def test_sampler_and_trainer_agree(recipe):
    assert recipe("compare") < 1e-4
