"""``python -m bench clients``: many clients of one engine, their requests merged, against one after the other.

All clients of a measurement are tasks of one Trio run in the main thread, and the engines have threads of their own:
so both sides pay the same for their callers, however many there are, and a caller never waits for another's Python
as threads of their own would let it. Both services live in one process and an idle one sets no timer; the sides take
turns, with a pause in which the other's OpenMP threads come to rest. Each client waits for its step, or its sample,
before it asks for the next.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from bench import record
from bench.clients import memory, sampling, training
from bench.clients.cases import CASES, Case
from bench.clients.drive import Pace
from bench.clients.plot import plot
from bench.clients.rows import Row
from bench.table import table

PARTS = ("training", "sampling", "memory")


def main(arguments: Sequence[str]) -> int:
    """Measure what the arguments say, print the table, write it and draw it."""
    logging.disable_progress_bar()
    options = _parser().parse_args(arguments)
    about = record.circumstances() | {"arguments": list(arguments)}
    console = Console(stderr=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES.values():
            if options.model not in (None, case.key):
                continue
            if case.device == "cuda" and not torch.cuda.is_available():
                console.print(f"{case.name}: not measured, there is no CUDA device", highlight=False)
                continue
            rows += _measure(case, Path(folder), options, console)
    Console(width=160).print(table(rows))
    path = record.save("clients", about, rows)
    console.print(f"written to {path}", *(f"and {drawn}" for drawn in plot(path, rows)), highlight=False)
    return 0


def _measure(case: Case, folder: Path, options: argparse.Namespace, console: Console) -> list[Row]:
    pace = Pace(options.seconds, min(options.rounds, case.rounds))
    ways: dict[str, Callable[[str], list[Row]]] = {
        "training": lambda model: training.measure(case, model, pace, options.invariant),
        "sampling": lambda model: sampling.measure(case, model, pace, options.invariant),
        "memory": lambda model: memory.measure(case, model),
    }
    model, rows = case.make(folder), list[Row]()
    for part, measure in ways.items():
        if options.only in (None, part) and part in case.parts:
            begun = time.perf_counter()
            rows += measure(model)
            console.print(f"{case.name}, {part}: {time.perf_counter() - begun:.0f} s", highlight=False)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench clients", description="Many clients merged, against one by one.")
    parser.add_argument("--seconds", type=float, default=0.8, help="of one side's turn; at least a step of each client")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side; medians are told")
    parser.add_argument("--model", choices=CASES, help="this model alone")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--invariant", action="store_true", help="also what ServiceClient(invariant=True) costs")
    return parser
