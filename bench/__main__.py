"""``python -m bench [kernels|server]``: measure, print the table, write it to ``bench/results``."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["kernels"]:  # before the engine is imported: kernels need torch alone
    from bench.kernels import main as measure_kernels

    sys.exit(measure_kernels(sys.argv[2:]))

if sys.argv[1:2] == ["server"]:
    from bench.server import main as measure_server

    sys.exit(measure_server(sys.argv[2:]))

from rich.console import Console
from transformers.utils import logging

from bench import demo, memory, overhead, record, train
from bench.table import table
from bench.workloads import Workload, make_qwen40m, qwen40m, tiny


def main() -> None:
    """Measure one thing after the other: nothing here may share the machine."""
    logging.disable_progress_bar()
    about = record.circumstances()
    console = Console(stderr=True)
    # The demo first: the greatest child of this process must still be the demo's.
    rows = [*_run("demo", demo.measure, console), *_run("overhead", overhead.measure, console)]
    with tempfile.TemporaryDirectory() as folder:
        for workload in _workloads(Path(folder)):
            rounds = 9 if workload.key.startswith("tiny") else 4
            rows += _run(workload.name, lambda w=workload, n=rounds: train.measure(w, n), console)
            if workload.key.endswith("varied"):
                rows += _run(f"{workload.name}, memory", lambda w=workload: memory.measure(w), console)
    Console(width=160).print(table(rows))
    console.print(f"written to {record.save('bench', about, rows)}")


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
    main()
