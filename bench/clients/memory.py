"""What one more client holds: resident memory of a process before and after so many have trained a step."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import trio

import tickwork
from bench.clients.cases import CASES, RANK, Case
from bench.clients.rows import Row
from bench.clients.training import acts, trainers

MORE = 16
# Weights, their gradient, and AdamW's two moments, each in float32.
STATE_BYTES = 4 * 4


def measure(case: Case, model: str) -> list[Row]:
    """Measure in a process of its own, so that nothing else has left holes in its heap; return the row."""
    code = "import sys; from bench.clients.memory import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, case.key, model]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout.splitlines()[-1])
    grown, state = found["grown"] / MORE / 2**20, found["values"] * STATE_BYTES / 2**20
    return [
        {
            "speed": "memory of a client",
            "workload": f"{case.name}, {MORE} more, rank {RANK}",
            "ours": f"{grown:.2f} MiB resident",
            "against": f"weights, gradient, moments {state:.2f} MiB",
            "ratio": round(grown / state, 3),
            "wanted": "<= 1.2",
            **found,
        }
    ]


def main(key: str, model: str) -> None:
    """Print what this process grew by, in bytes, and how many values one adapter has."""
    case = CASES[key]
    with tickwork.ServiceClient(device="cpu") as service:
        first = trainers(service, model, 2)
        trio.run(_train, case, first)
        before = _resident()
        more = trainers(service, model, MORE)
        trio.run(_train, case, more)
        grown = _resident() - before
        print(json.dumps({"grown": grown, "values": _values(service, first[0])}))


async def _train(case: Case, clients: list[tickwork.TrainingClient]) -> None:
    """One step of each, one after the other."""
    for step in acts(case, clients, varied=False):
        await step()


def _resident() -> int:
    """Return this process's resident bytes, after what is free in its heap has gone back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def _values(service: tickwork.ServiceClient, client: tickwork.TrainingClient) -> int:
    """Count an adapter's values in what is saved of it."""
    from safetensors.numpy import load_file  # noqa: PLC0415

    folder = service.host.catalogue.folder(client.save_state("size").result().path)
    return sum(array.size for array in load_file(folder / "adapter_model.safetensors").values())
