"""One training step of random-weight Qwen3 models on a GPU, in bfloat16: Tickwork against the PEFT loop.

Each way runs in a process of its own, one after the other, since a large model does not fit twice; what does not fit at
all is a row that says so. The adapters are float32 on every side; the loop runs under autocast, as trainers do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.peft_loop import PeftLoop
from bench.train import Ours
from bench.workloads import Workload, make_qwen06b, make_qwen8b, qwen3_8k

MODELS = {"0.6B": make_qwen06b, "8B": make_qwen8b}
RANKS = (8, 64)
STEPS, WARM = 7, 3


def measure(console: Any) -> list[dict[str, Any]]:
    """Return a row for each model, rank and rival; none without a CUDA device, and it says so."""
    if not torch.cuda.is_available():
        console.print("Qwen3 0.6B and 8B: not measured, there is no CUDA device", highlight=False)
        return []
    rows: list[dict[str, Any]] = []
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = str(make(Path(folder) / "model"))
            for rank in RANKS:
                found = {way: _in_a_process(way, name, model, rank) for way in WAYS}
                rows += rows_of(name, rank, found)
    return rows


def rows_of(name: str, rank: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each rival; a ratio is there only where both sides were measured."""
    ours = found["ours"]
    rows = []
    for way, against in list(found.items())[1:]:
        both = "error" not in ours and "error" not in against
        rows.append(
            {
                "speed": "train, bfloat16",
                "workload": f"random Qwen3-{name}, 8 x 1024 tokens, rank {rank}",
                "ours": _told(ours),
                "against": f"{way} {_told(against)}",
                "ratio": round(ours["tokens_per_second"] / against["tokens_per_second"], 3) if both else "-",
                "wanted": ">= 1.3" if both and way == "peft" else "",
                "figures": {"ours": ours, way: against},
            }
        )
    return rows


def _told(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])
    return f"{found['tokens_per_second']:,.0f} tokens/s, {found['peak_bytes'] / 2**30:.1f} GiB"


def _in_a_process(way: str, name: str, model: str, rank: int) -> dict[str, Any]:
    if way == "liger" and find_spec("liger_kernel") is None:
        return {"error": "liger_kernel is not installed"}
    command = [sys.executable, "-m", "bench.train_cuda", way, name, model, str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    memory = "OutOfMemoryError" in done.stderr or "CapacityError" in done.stderr
    return {"error": "out of memory" if memory else done.stderr.strip().splitlines()[-1][:200]}


def run(way: str, workload: Workload, rank: int, device: str) -> dict[str, Any]:
    """Return tokens a second, by the median step, and the greatest memory of one way."""
    step = WAYS[way](workload, rank, device)
    seconds = []
    for _ in range(WARM + STEPS):
        begun = time.perf_counter()
        step()  # ends with figures on the host, so the device has finished
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"tokens_per_second": workload.tokens / statistics.median(seconds[WARM:]), "peak_bytes": peak}


def _ours(workload: Workload, rank: int, device: str) -> Callable[[], object]:
    return Ours(workload, device=device, dtype="bfloat16", rank=rank, max_tokens_per_pass=workload.tokens).built_in


def _peft(workload: Workload, rank: int, device: str) -> Callable[[], object]:
    return PeftLoop(workload, device, torch.bfloat16, rank).step


def _liger(workload: Workload, rank: int, device: str) -> Callable[[], object]:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3  # noqa: PLC0415

    # Its fused head knows no adapter on the head, so the loss stays the loop's own.
    apply_liger_kernel_to_qwen3(cross_entropy=False, fused_linear_cross_entropy=False)
    return PeftLoop(workload, device, torch.bfloat16, rank).step


WAYS: dict[str, Callable[[Workload, int, str], Callable[[], object]]] = {"ours": _ours, "peft": _peft, "liger": _liger}


if __name__ == "__main__":
    asked, size, at, given = sys.argv[1:]
    print(json.dumps(run(asked, qwen3_8k(size, at), int(given), "cuda")))
