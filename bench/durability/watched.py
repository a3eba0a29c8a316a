"""``tickwork serve``, whose device thread is watched: when stages, copies of states and writes of snapshots were.

``python -m bench.durability.watched FILE [OPTIONS OF TICKWORK SERVE]`` writes those spans when it is told to end. As
soon as a snapshot is written, the next one may be taken, whatever it cost: to have one under way most of the time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tickwork.compute.stage
import tickwork.executor
import tickwork.journal.cost
import tickwork.journal.snapshots
from tickwork import cli

WATCHED: dict[str, tuple[Any, str]] = {
    "stages": (tickwork.executor.LocalExecutor, "_run"),
    "copies": (tickwork.compute.stage, "capture"),
    "writes": (tickwork.journal.snapshots.Snapshots, "write"),
}


def main(file: str, *options: str) -> None:
    """Serve, and write the spans."""
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in WATCHED}
    for name, (owner, act) in WATCHED.items():
        setattr(owner, act, _timed(getattr(owner, act), spans[name]))
    tickwork.journal.cost.COST = 0
    try:
        cli.main(["serve", *options], standalone_mode=False)
    finally:
        Path(file).write_text(json.dumps(spans))


def _timed(act: Callable[..., Any], kept: list[tuple[float, float]]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return act(*args, **options)
        finally:
            kept.append((begun, time.perf_counter()))

    return timed


if __name__ == "__main__":
    main(*sys.argv[1:])
