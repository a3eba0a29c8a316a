"""Peak memory of the custom loss, and of layers run again, against the built-in loss, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.train import Ours
from bench.workloads import Workload, by_name

STEPS = 3
# The built-in loss with checkpoint_activations.
AGAIN = "again"


def measure(workload: Workload) -> list[dict[str, Any]]:
    """Return the rows of one workload."""
    peaks = {way: _peak(workload, way) for way in ("built_in", "custom", AGAIN)}
    return [
        {
            "speed": speed,
            "workload": workload.name,
            "ours": f"{peaks[way] / 1024:,.0f} MiB peak",
            "against": f"built-in {peaks['built_in'] / 1024:,.0f} MiB peak",
            "ratio": round(peaks[way] / peaks["built_in"], 3),
            "wanted": wanted,
        }
        for speed, way, wanted in (
            ("custom memory", "custom", "<= 1.10"),
            ("memory, layers run again", AGAIN, "<= 1.00"),
        )
    ]


def _peak(workload: Workload, way: str) -> int:
    """Return the greatest resident size of a process that trains this way, in KiB."""
    command = [sys.executable, "-m", "bench.memory", workload.key, workload.model, way]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(answer.stdout.splitlines()[-1]))


def main(key: str, model: str, way: str) -> None:
    """Train a few steps one way and print this process's peak."""
    ours = Ours(by_name(key, model), checkpoint_activations=way == AGAIN)
    with ours.service:
        for _ in range(STEPS):
            getattr(ours, "built_in" if way == AGAIN else way)()
    print(json.dumps(_high_water()))


def _high_water() -> int:
    """Return this process's greatest resident size, in KiB; getrusage would count the parent's before exec too."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:])
