"""The main job as a user runs it: wall time and greatest memory of ``tickwork demo``."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any


def measure() -> list[dict[str, Any]]:
    """Run the demo in a process of its own and return its two rows."""
    with tempfile.TemporaryDirectory() as store:
        begun = time.perf_counter()
        command = [sys.executable, "-m", "tickwork.cli", "demo", "--store", store]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - begun
    result = json.loads(answer.stdout.splitlines()[-1])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    learnt = f"exact match {result['exact_match_before']:.2f} to {result['exact_match_after']:.2f}"
    return [
        _row("demo time", learnt, f"{seconds:.0f} s", "120 s", seconds / 120),
        _row("demo memory", learnt, f"{peak:.2f} GiB resident", "2 GiB", peak / 2),
    ]


def _row(speed: str, workload: str, ours: str, against: str, ratio: float) -> dict[str, Any]:
    values = {"ours": ours, "against": against, "ratio": round(ratio, 3), "wanted": "<= 1.00"}
    return {"speed": speed, "workload": workload, **values}
