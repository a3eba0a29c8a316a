"""``python -m bench [train|clients|kernels|server|durability|load]``: measure, and print and keep the table.

Tables lie in ``bench/results``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["kernels"]:  # before the engine is imported: kernels need torch alone
    from bench.kernels import main as measure_kernels

    sys.exit(measure_kernels(sys.argv[2:]))

if sys.argv[1:2] == ["server"]:
    from bench.server import main as measure_server

    sys.exit(measure_server(sys.argv[2:]))

if sys.argv[1:2] == ["clients"]:
    from bench.clients import main as measure_clients

    sys.exit(measure_clients(sys.argv[2:]))

if sys.argv[1:2] == ["durability"]:
    from bench.durability import main as measure_durability

    sys.exit(measure_durability(sys.argv[2:]))

if sys.argv[1:2] == ["load"]:
    from bench.load import main as measure_load

    sys.exit(measure_load(sys.argv[2:]))

from rich.console import Console
from transformers.utils import logging

from bench import demo, memory, overhead, record, train, train_cuda
from bench.table import table
from bench.workloads import Workload, make_qwen40m, qwen40m, tiny


def main(arguments: Sequence[str]) -> None:
    """Measure one thing after the other, or training alone: nothing here may share the machine."""
    if arguments not in ([], ["train"]):
        raise SystemExit(
            f"{' '.join(arguments)!r} is not known; give train, clients, kernels, server, durability, load or nothing"
        )
    logging.disable_progress_bar()
    about = record.circumstances()
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    if not arguments:
        # The demo first: the greatest child of this process must still be the demo's.
        rows += [*_run("demo", demo.measure, console), *_run("overhead", overhead.measure, console)]
    rows += _training(console, with_memory=not arguments)
    rows += train_cuda.measure(console)
    Console(width=160).print(table(rows))
    console.print(f"written to {record.save(arguments[0] if arguments else 'bench', about, rows)}")


def _training(console: Console, *, with_memory: bool) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for workload in _workloads(Path(folder)):
            rounds = 9 if workload.key.startswith("tiny") else 4
            rows += _run(workload.name, lambda w=workload, n=rounds: train.measure(w, n), console)
            if with_memory and workload.key.endswith("varied"):
                rows += _run(f"{workload.name}, memory", lambda w=workload: memory.measure(w), console)
    return rows


def _run(name: str, measure: Any, console: Console) -> list[dict[str, Any]]:
    begun = time.perf_counter()
    rows: list[dict[str, Any]] = measure()
    console.print(f"{name}: {time.perf_counter() - begun:.0f} s")
    return rows


def _workloads(folder: Path) -> Iterator[Workload]:
    for lengths in ("equal", "varied"):
        yield tiny(lengths)
    model = make_qwen40m(folder)
    for lengths in ("equal", "varied"):
        yield qwen40m(lengths, model)


if __name__ == "__main__":
    main(sys.argv[1:])
