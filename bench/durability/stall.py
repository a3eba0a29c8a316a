"""What a snapshot does to the device loop: the longest gap between two stages, and the copy that one of them takes."""

from __future__ import annotations

import itertools
import json
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
import numpy as np

from bench.durability.client import Trainer, batch, open_sdk
from bench.durability.rows import Row, row
from bench.durability.serving import WAIT, Served
from bench.workloads import PAUSE

RANK = 32
ON, OFF = "0.05", "1e9"
# Stages at the beginning of a turn, while requests still arrive.
ARRIVING = 4

Span = tuple[float, float]


@attrs.frozen
class Seen:
    """What one server's device thread did in one turn, in milliseconds.

    Args:
        gap: the longest time between two of its stages, while requests were waiting.
        writing: stages beside which a snapshot was being written.
        plain: the other ones, without those that copied a state.
        copies: copies of the state, within a stage.
    """

    gap: float
    writing: list[float]
    plain: list[float]
    copies: list[float]


def measure(model: str, name: str, rows: Sequence[np.ndarray], folder: Path, rounds: int, steps: int) -> list[Row]:
    """Train on two servers in turns: one writes a snapshot after the other, one none.

    Args:
        name: of the workload.
        rows: of each pass, see ``client.batch``.
        steps: of one turn, all submitted ahead.
    """
    turns: dict[str, list[Span]] = {ON: [], OFF: []}
    with ExitStack() as stack:
        servers = {way: watched(model, folder, way) for way in turns}
        for server in servers.values():
            stack.callback(server.end)
        services = {way: open_sdk(server.url) for way, server in servers.items()}
        trainers = {way: Trainer(service, batch(rows), RANK) for way, service in services.items()}
        for _ in range(rounds + 1):
            for way, trainer in trainers.items():
                time.sleep(PAUSE)
                begun = time.perf_counter()
                trainer.ahead(steps)
                turns[way].append((begun, time.perf_counter()))
        for way, service in services.items():
            service.close("success").result(WAIT)
            servers[way].end(signal.SIGTERM)
    found = {}
    for way in turns:
        spans = json.loads((folder / f"{way}.json").read_text())
        found[way] = [seen(spans, turn) for turn in turns[way][1:]]  # the first is not counted
    return rows_of(found[ON], found[OFF], f"{name}, rank {RANK}, snapshots back to back")


def seen(spans: Mapping[str, Sequence[Span]], turn: Span) -> Seen:
    """Lay out what happened in one turn."""
    begun, ended = turn
    stages = [span for span in spans["stages"] if begun <= span[0] and span[1] <= ended][ARRIVING:]
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(stages)]
    copies = [span for span in spans["copies"] if stages and _meet(span, (stages[0][0], stages[-1][1]))]
    passes = [span for span in stages if not any(_meet(span, copy) for copy in copies)]
    beside = [span for span in passes if any(_meet(span, write) for write in spans["writes"])]
    plain = [span for span in passes if span not in beside]
    return Seen(1e3 * max(gaps, default=0.0), _lengths(beside), _lengths(plain), _lengths(copies))


def watched(model: str, folder: Path, way: str) -> Served:
    """Start a server that takes a snapshot every ``way`` seconds of the device, and writes its spans when it ends."""
    program = ("-m", "bench.durability.watched", str(folder / f"{way}.json"))
    return Served(model, folder / way, "--snapshot-seconds", way, program=program)


def rows_of(on: Sequence[Seen], off: Sequence[Seen], workload: str) -> list[Row]:
    """Lay out the turns of the server that took snapshots and of the one that took none."""
    gap, calm = (statistics.median(each.gap for each in several) for several in (on, off))
    copies = [copy for each in on for copy in each.copies]
    writing = [length for each in on for length in each.writing]
    alone = statistics.median(length for each in off for length in each.plain)
    if not copies or not writing:
        raise SystemExit("no snapshot was taken while requests waited: take more --rounds")
    copied, beside = statistics.median(copies), statistics.median(writing)
    gaps = {"on": [each.gap for each in on], "off": [each.gap for each in off]}
    told = (f"{gap:.3f} ms longest gap", f"none taken {calm:.3f} ms")
    share = (f"{copied:.2f} ms", f"a stage {alone:.2f} ms")
    slower = (f"{beside:.2f} ms beside a write", f"none taken {alone:.2f} ms")
    return [
        row("device idle for a snapshot, ms", workload, told, gap - calm, "<= 1", gaps=gaps),
        row("copy of the state, on the device", workload, share, copied / alone, copies=copies),
        row("stage", workload, slower, beside / alone, stages=len(writing)),
    ]


def _meet(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _lengths(spans: Sequence[Span]) -> list[float]:
    return [1e3 * (ended - begun) for begun, ended in spans]
