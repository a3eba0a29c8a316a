"""``python -m bench durability``: what the journal costs, and what it is worth after a ``kill -9``.

Each figure is a ratio or a difference measured in one run. Both sides are ``tickwork serve`` in processes of their own,
asked in turns; the idle one sets no timer but for a sweep a second.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from bench import record
from bench.durability import recovery, speed, stall
from bench.durability.client import random_rows
from bench.durability.rows import Row
from bench.table import table
from bench.workloads import make_qwen40m, make_qwen205k, qwen40m

Part = Callable[[Path, int], list[Row]]


def _tokens(folder: Path, rounds: int) -> list[Row]:
    workload = qwen40m("varied", make_qwen40m(folder / "41m"))
    with speed.pair(workload.model, folder / "tokens") as urls:
        return speed.tokens(urls, workload.name, workload.rows, rounds, steps=4)


def _acceptance(folder: Path, rounds: int) -> list[Row]:
    model, rows = make_qwen205k(folder / "205k"), random_rows(8, 64, 1024)
    with speed.pair(str(model), folder / "acceptance") as urls:
        return speed.acceptance(urls, "random 205k, 8 x 64 tokens", rows, rounds, steps=40)


def _recovery(folder: Path, rounds: int) -> list[Row]:
    model, rows = make_qwen40m(folder / "41m"), random_rows(4, 64, 32000)
    return recovery.measure(str(model), "random 41M, 4 x 64 tokens", rows, folder / "recovery", rounds)


def _stall(folder: Path, rounds: int) -> list[Row]:
    model, rows = make_qwen40m(folder / "41m"), random_rows(2, 32, 32000)
    return stall.measure(str(model), "random 41M, 2 x 32 tokens", rows, folder / "stall", rounds, steps=24)


PARTS: dict[str, Part] = {
    "tokens": _tokens,
    "acceptance": _acceptance,
    "recovery": _recovery,
    "stall": _stall,
}


def main(arguments: Sequence[str]) -> int:
    """Measure what the arguments say, print the table and write it."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser("python -m bench durability", description="The journal, and without it.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side; medians are told")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    options = parser.parse_args(arguments)
    about = record.circumstances() | {"arguments": list(arguments)}
    console, rows = Console(stderr=True), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in PARTS.items():
            if options.only in (None, name):
                (Path(folder) / name).mkdir()
                begun = time.perf_counter()
                rows += measure(Path(folder), options.rounds)
                console.print(f"{name}: {time.perf_counter() - begun:.0f} s", highlight=False)
    Console(width=160).print(table(rows))
    console.print(f"written to {record.save('durability', about, rows)}", highlight=False)
    return 0
