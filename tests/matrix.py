"""Several generations of the official SDK against one server: ``make test-sdk-matrix``.

Each lives in an environment of its own, ``.venv-sdk-VERSION``; not collected by a plain ``pytest``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import tickwork
from sdk_script import run

ROOT = Path(__file__).parent.parent
SDKS = ("0.38.0", "0.25.0", "0.24.1")


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    with tickwork.ServiceClient(store=tmp_path_factory.mktemp("store")) as service:
        return np.array(run(tickwork, service))


@pytest.mark.parametrize("version", SDKS)
def test_every_generation_gets_the_numbers_of_the_engine(server_url, in_process, version):
    python = ROOT / f".venv-sdk-{version}" / "bin" / "python"
    env = {**os.environ, "TINKER_BASE_URL": server_url, "TINKER_API_KEY": "tml-matrix"}
    done = subprocess.run(
        [python, ROOT / "tests" / "sdk_script.py"], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["version"] == version
    np.testing.assert_allclose(np.array(told["numbers"]), in_process, rtol=1e-6, atol=1e-6)
