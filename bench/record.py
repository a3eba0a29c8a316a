"""What a result file says besides its figures: commit, versions, machine, time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("tickwork", "torch", "triton", "transformers", "peft", "trio", "numpy")


def circumstances() -> dict[str, Any]:
    """Return commit, versions and machine."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", ":/src", ":/kernels", ":/bench/*.py")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system(), **_gpu()},
        "load_before": os.getloadavg()[0],
    }


def save(name: str, about: dict[str, Any], rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write one run's result file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = about["time"].replace(":", "").replace("-", "")[:15]
    path = folder / f"{name}-{stamp}.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return path


def _git(*arguments: str) -> str:
    return _output(["git", "--no-optional-locks", *arguments])


def _output(command: list[str]) -> str:
    """Return what a command prints; nothing where there is no such command."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> dict[str, str]:
    """Return the device, its driver and CUDA's version, where there is one."""
    if not torch.cuda.is_available():
        return {}
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda)}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
