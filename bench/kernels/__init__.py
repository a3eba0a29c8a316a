"""``python -m bench kernels``: every registered kernel beside those of others, each checked before it is timed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import record
from bench.kernels import report, tune
from bench.kernels.cases import HEAD, OPERATIONS, PRESETS, Case, Preset
from bench.kernels.jobs import load
from bench.kernels.sweep import Row, Sweep


def main(arguments: Sequence[str]) -> int:
    """Measure what the arguments say; return 1 if a registered kernel failed its checks, else 0."""
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load(options.plugin)
    console = Console(width=200)
    about = record.circumstances() | {"arguments": list(arguments), "threads": torch.get_num_threads()}
    if options.tune:
        return tune.main(console, device, about, options.seconds, options.out)
    sweep = _sweep(options, device)
    rows: list[Row] = []
    path = None
    try:
        for some in sweep.run():
            rows += some
            # After each case: a run that is cut short leaves what it has.
            path = report.save({**about, "ceilings": sweep.ceilings.record()}, rows, options.out)
    finally:
        report.show(console, rows)
    if path is not None:
        drawn = report.plot(path, rows)
        console.print(f"written to {path}, with a CSV and {len(drawn)} charts beside it", soft_wrap=True)
    if sweep.failed:
        console.print(f"failed: {', '.join(dict.fromkeys(sweep.failed))}", style="bold red")
    return 1 if sweep.failed else 0


def _sweep(options: argparse.Namespace, device: torch.device) -> Sweep:
    preset = _preset(options, device)
    rounds, check_seconds = options.rounds or preset.rounds, options.check_seconds or min(60.0, options.seconds / 10)
    return Sweep(device, preset, rounds, options.seconds, options.plugin, options.provider, check_seconds)


def _preset(options: argparse.Namespace, device: torch.device) -> Preset:
    """Return the preset asked for, with another shape or dtype for the head, and only the operations asked for."""
    preset = PRESETS[options.preset or ("gpu" if device.type == "cuda" else "cpu")]
    cases = list(preset.cases)
    if options.shape:
        n, d, v = options.shape
        cases = [Case(HEAD, n, d, v, dtype) for dtype in dict.fromkeys(case.dtype for case in cases)]
    if options.dtype:
        cases = [replace(case, dtype=options.dtype) if case.operation == HEAD else case for case in cases]
    only = options.only or OPERATIONS
    return replace(preset, cases=[case for case in dict.fromkeys(cases) if case.operation in only])


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be three positive numbers: N,D,V")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench kernels", description=__doc__)

    def add(*names: str, **how: Any) -> None:
        parser.add_argument(*names, **how)

    add("--preset", choices=PRESETS, help="cases to measure; gpu with a CUDA device, else cpu")
    add("--shape", type=_shape, metavar="N,D,V", help="tokens, hidden size and vocabulary, instead of the preset's")
    add("--dtype", choices=("float32", "bfloat16"), help="of the head, instead of the preset's")
    add("--only", action="append", choices=OPERATIONS, help="measure this operation; may be repeated")
    add("--provider", action="append", default=[], metavar="NAME", help="measure this one; may be repeated")
    add("--rounds", type=int, help="rounds of interleaved measurements")
    add("--seconds", type=float, default=math.inf, help="begin no further round after this time")
    add("--check-seconds", type=float, help="for the conformance suite of one kernel; 60, or a tenth of --seconds")
    add("--plugin", action="append", default=[], metavar="MODULE", help="import it first: it registers kernels")
    add("--out", type=Path, default=record.RESULTS, help="folder of the results")
    add("--tune", action="store_true", help="measure tile sizes and write them to tiles.json; CUDA only")
    return parser
