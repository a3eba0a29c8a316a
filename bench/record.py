"""What a result file says besides its figures: commit, versions, machine, time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("tickwork", "torch", "transformers", "peft", "trio", "numpy")


def circumstances() -> dict[str, Any]:
    """Return commit, versions and machine."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "src", "kernels", "bench/*.py")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
        "load_before": os.getloadavg()[0],
    }


def save(name: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write one run's result file and return its path."""
    RESULTS.mkdir(exist_ok=True)
    stamp = about["time"].replace(":", "").replace("-", "")[:13]
    path = RESULTS / f"{name}-{stamp}.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return path


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    return answer.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
