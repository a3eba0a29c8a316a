"""Peak memory of one full run, beyond its inputs: by torch's counter on CUDA, by a process of its own on CPU."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.kernels.cases import ADAMW, Case
from bench.kernels.job import FULL, Candidate
from bench.kernels.jobs import build, load

LIMIT_SECONDS = 300


def extra_bytes(candidate: Candidate, case: Case, plugins: Sequence[str], device: torch.device) -> int | None:
    """Return the peak of one full run over what was there before it; None where it can not be told."""
    if device.type == "cuda":
        return _on_cuda(candidate)
    return _in_process(candidate.name, case, plugins) if Path("/proc/self/status").exists() else None


def _on_cuda(candidate: Candidate) -> int:
    gc.collect()
    candidate.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = candidate.runs[FULL](lambda: None)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _in_process(name: str, case: Case, plugins: Sequence[str]) -> int | None:
    """Ask a fresh process, whose peak is nobody else's.

    With a low threshold its allocator hands freed memory back at once, so that what is resident is what is in use.
    """
    command = [sys.executable, "-m", "bench.kernels.memory", json.dumps([name, asdict(case), list(plugins)])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, timeout=LIMIT_SECONDS
        )
    except subprocess.SubprocessError:
        return None
    return int(json.loads(answer.stdout.splitlines()[-1]))


def main(question: str) -> None:
    """Run one candidate once and print by how many bytes this process grew at most."""
    name, case, plugins = json.loads(question)
    load(plugins)

    def candidate(**changes: int) -> Candidate:
        job = build(Case(**{**case, **changes}), torch.device("cpu"))
        return next(each for each in job.candidates if each.name == name)

    few = {"n": 1, "d": 2, "v": 64} if case["operation"] == ADAMW else {"n": 32, "d": 16, "v": 64}
    _run(candidate(**few))  # imports, thread pools and workspaces of libraries are nobody's need
    whole = candidate()
    print(_grown(lambda: _run(whole)))


def _run(candidate: Candidate) -> object:
    candidate.prepare()
    return candidate.runs[FULL](lambda: None)


def _grown(act: Callable[[], object]) -> int:
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is resident now
    except OSError:
        pass  # the peak of making the inputs counts too, then
    before = _status("VmRSS")
    result = act()
    after = _status("VmHWM")
    del result
    return max(0, after - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    main(*sys.argv[1:])
