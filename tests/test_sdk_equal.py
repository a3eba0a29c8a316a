"""One script, word for word the same, through the official SDK and in process: the same numbers."""

from __future__ import annotations

import numpy as np
import tinker

import tickwork
from sdk_script import run
from served import sdk


def test_the_same_numbers(server_url, tmp_path):
    with sdk(server_url) as service:
        served = np.array(run(tinker, service, custom=True))
    with tickwork.ServiceClient(store=tmp_path) as service:
        in_process = np.array(run(tickwork, service, custom=True))
    assert served.shape == in_process.shape
    assert served.size > 300
    np.testing.assert_allclose(served, in_process, rtol=1e-6, atol=1e-6)


def test_the_official_package_is_the_pinned_one():
    assert tinker.__version__ == "0.38.0"
