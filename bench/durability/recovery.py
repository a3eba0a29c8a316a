"""A lane with many journalled requests and no snapshot: to run them again, against running them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.durability.client import Trainer, batch, open_sdk
from bench.durability.rows import Row, row
from bench.durability.serving import BACK, LISTENING, WAIT, free_port, served
from bench.workloads import PAUSE

REQUESTS, RANK = 100, 16


def measure(
    model: str, name: str, rows: Sequence[np.ndarray], folder: Path, rounds: int, requests: int = REQUESTS
) -> list[Row]:
    """Run requests, kill the server, start another, some rounds; each with a store of its own.

    Args:
        name: of the workload.
        rows: of each pass, see ``client.batch``; every second request is an optimizer step.
    """
    found = [_once(model, batch(rows), folder / str(turn), requests) for turn in range(rounds)]
    run, back = (statistics.median(each[place] for each in found) for place in (0, 1))
    told = (f"{back:.2f} s to bring it back", f"{run:.2f} s to run them")
    workload = f"{name}, rank {RANK}, {requests} journalled requests"
    return [row("recovery", workload, told, back / run, "<= 1.2", rounds=found)]


def _once(model: str, data: list[object], store: Path, requests: int) -> tuple[float, float]:
    """Return the seconds in which requests were run, and in which they were run again after a kill.

    A start has to load the model, whatever is in the journal: the start of the empty server is taken off the other's.
    """
    how = ("--journal", "process", "--snapshot-seconds", "1e9", "--port", str(free_port()))
    time.sleep(PAUSE)
    with served(model, store, *how) as first:
        started, url = first.wait_for(LISTENING)
        service, begun = open_sdk(url), time.perf_counter()
        trainer = Trainer(service, data, RANK)
        trainer.ahead(requests // 2)
        run = time.perf_counter() - begun
        known = trainer.logprobs()
    time.sleep(PAUSE)
    with served(model, store, *how) as second:
        back, last = second.wait_for(BACK)
        second.wait_for(LISTENING)
        if int(last) < requests or trainer.logprobs() != known:
            raise SystemExit(f"the server came back at request {last} of {requests}, or with other numbers")
        service.close("success").result(WAIT)
    return run, back - started
