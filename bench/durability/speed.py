"""Two servers of one model, with the journal and without: tokens a second, and how long an acceptance takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from bench.durability.client import Poster, Trainer, batch, sdk
from bench.durability.rows import Row, row
from bench.durability.serving import served
from bench.train import in_turns
from bench.workloads import PAUSE

ON, OFF = "process", "off"

# The URLs of both servers.
Pair = Mapping[str, str]


@contextmanager
def pair(model: str, folder: Path) -> Iterator[Pair]:
    """Serve one model twice, with the journal and without."""
    with ExitStack() as stack:
        servers = {way: stack.enter_context(served(model, folder / way, "--journal", way)) for way in (ON, OFF)}
        yield {way: server.url for way, server in servers.items()}


def tokens(urls: Pair, name: str, rows: Sequence[np.ndarray], rounds: int, steps: int) -> list[Row]:
    """Train on both servers in turns.

    Args:
        name: of the workload.
        rows: one batch, see ``client.batch``.
        steps: of one turn, long enough that snapshots are taken in it.
    """
    rank, count = 16, steps * sum(len(each) - 1 for each in rows)
    with ExitStack() as stack:
        services = {way: stack.enter_context(sdk(url)) for way, url in urls.items()}
        trainers = {way: Trainer(service, batch(rows), rank) for way, service in services.items()}
        ways = {way: lambda trainer=trainer: trainer.in_turn(steps) for way, trainer in trainers.items()}
        seconds = in_turns(ways, rounds)
    told = (f"{count / seconds[ON]:,.0f} tokens/s", f"journal off {count / seconds[OFF]:,.0f} tokens/s")
    workload = f"{name}, rank {rank}, through the SDK"
    return [row("train, journal on", workload, told, seconds[OFF] / seconds[ON], ">= 0.95", seconds=seconds)]


def acceptance(urls: Pair, name: str, rows: Sequence[np.ndarray], rounds: int, steps: int) -> list[Row]:
    """Post to both servers in turns.

    Args:
        name: of the workload.
        rows: one batch, see ``client.batch``.
        steps: of one turn, each a pass and an optimizer step just behind it, both timed until they are answered.
    """
    rank = 8
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in urls}
    posters = {way: Poster(url, batch(rows), rank) for way, url in urls.items()}
    for turn in range(rounds + 1):  # the first is not counted
        for way, poster in posters.items():
            time.sleep(PAUSE)
            taken = [poster.step() for _ in range(steps)]
            found[way] += taken if turn else []
    for poster in posters.values():
        poster.close()
    told = []
    for place, kind in enumerate(("forward_backward", "optim_step beside a pass")):
        on, off = (1e3 * statistics.median(each[place] for each in found[way]) for way in (ON, OFF))
        shown = (f"{on:.3f} ms p50", f"journal off {off:.3f} ms p50")
        about = f"{name}, rank {rank}, {kind}"
        told.append(row("added to acceptance, ms", about, shown, on - off, "<= 1", answers=len(found[ON])))
    return told
