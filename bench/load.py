"""``python -m bench load``: many SDK clients at once, some of whose requests are wrong: nothing lost, nothing twice.

Each client is a training run of its own, in a thread and an SDK client of its own, that keeps some requests submitted
ahead. What it got is held to what the same client gets alone, in process, from its right requests only: to the bit, so
the server is invariant. Merged passes would add in another order, which a few dozen steps make visible.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
from rich.console import Console

from bench import record
from bench.server import KEY, MODEL, _serving
from bench.table import table
from bench.workloads import make_qwen205k

VOCAB, LENGTH, ROWS, RANK = 1024, 24, 2, 4
# Requests that a client has submitted and not fetched; seconds that a result may take.
AHEAD, WAIT = 6, 600.0
WRONG = 0.05

Kind = Literal["loss", "step", "a target out of range", "an unknown loss", "a negative learning rate"]
RIGHT: tuple[Kind, Kind] = ("loss", "step")
MISTAKES: tuple[Kind, ...] = ("a target out of range", "an unknown loss", "a negative learning rate")


@attrs.frozen
class Told:
    """What a client was told of one request: the loss, or the number of the step, or None where it was refused."""

    kind: Kind
    value: float | None
    seconds: float = 0.0


def script(seed: int, count: int, wrong: float = WRONG) -> list[Kind]:
    """Return what a client asks: passes and steps in turns, and in place of some a request that is wrong."""
    chance = random.Random(seed)
    return [chance.choice(MISTAKES) if chance.random() < wrong else RIGHT[place % 2] for place in range(count)]


def play(types: Any, service: Any, model: str, seed: int, asks: Sequence[Kind]) -> list[Told]:
    """Be one client.

    Args:
        types: the values of the package that ``service`` comes from.
    """
    client = service.create_lora_training_client(base_model=model, rank=RANK, seed=seed)
    client = client.result(WAIT) if hasattr(client, "result") else client
    told: list[Told] = []
    ahead: deque[tuple[Kind, float, Any]] = deque()
    for place, kind in enumerate(asks):
        ahead.append((kind, time.perf_counter(), _submit(types, client, kind, seed + place)))
        if len(ahead) > AHEAD:
            told.append(_fetch(*ahead.popleft()))
    return told + [_fetch(*each) for each in ahead]


def _submit(types: Any, client: Any, kind: Kind, seed: int) -> Any:
    if kind in ("step", "a negative learning rate"):
        return client.optim_step(types.AdamParams(learning_rate=1e-2 if kind == "step" else -1.0))
    rows = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, LENGTH + 1)).tolist()
    far = [VOCAB * 10] if kind == "a target out of range" else []
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": [*far, *row[1 + len(far) :]], "weights": [1.0] * LENGTH},
        )
        for row in rows
    ]
    return client.forward_backward(data, "cross_entropy" if kind != "an unknown loss" else "no_such_loss")


def _fetch(kind: Kind, begun: float, future: Any) -> Told:
    try:
        metrics = future.result(WAIT).metrics
    except Exception as error:
        if kind in RIGHT or str(getattr(error, "category", "")) not in ("user", "RequestErrorCategory.User"):
            raise
        return Told(kind, None, time.perf_counter() - begun)
    return Told(kind, metrics["loss:sum" if kind == "loss" else "optim/step"], time.perf_counter() - begun)


def together(url: str, key: str, model: str, clients: int, requests: int) -> tuple[list[list[Told]], float]:
    """Be all clients at once, through the official SDK; return what each was told, and the seconds it took."""
    import tinker  # noqa: PLC0415  an extra
    from tinker import types  # noqa: PLC0415

    found: dict[int, list[Told] | Exception] = {}

    def work(number: int) -> None:
        service = tinker.ServiceClient(base_url=url, api_key=key)
        try:
            found[number] = play(types, service, model, 1000 * number, script(number, requests))
        except Exception as error:
            found[number] = error
        finally:
            service.close("success").result(WAIT)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if failed := [each for each in found.values() if isinstance(each, Exception)]:
        raise failed[0]
    return [each for _, each in sorted(found.items()) if not isinstance(each, Exception)], seconds


def alone(model: str, clients: int, requests: int) -> list[list[Told]]:
    """Be each client alone, in process, with its right requests only."""
    import tickwork  # noqa: PLC0415

    found = []
    for number in range(clients):
        asks = script(number, requests)
        with tickwork.ServiceClient(device="cpu", dtype="float32", invariant=True) as service:
            client = service.create_lora_training_client(model, rank=RANK, seed=1000 * number)
            told = []
            for place, kind in enumerate(asks):
                if kind in RIGHT:
                    told.append(_fetch(kind, 0.0, _submit(tickwork, client, kind, 1000 * number + place)))
            found.append(told)
    return found


def differences(told: Sequence[Told], expected: Sequence[Told]) -> list[str]:
    """Return where one client was told something else than it is told alone."""
    right = [each for each in told if each.kind in RIGHT]
    found = [f"{each.kind} was taken" for each in told if each.kind not in RIGHT and each.value is not None]
    if len(right) != len(expected):
        return [*found, f"{len(right)} of {len(expected)} results"]
    for place, (got, want) in enumerate(zip(right, expected, strict=True)):
        if (got.kind, got.value) != (want.kind, want.value):
            found.append(f"result {place}: {got.kind} {got.value} in place of {want.kind} {want.value}")
    return found


def rows_of(told: Sequence[Sequence[Told]], expected: Sequence[Sequence[Told]], seconds: float) -> list[dict[str, Any]]:
    """Lay out what was measured, and whether it was right."""
    every = [each for client in told for each in client]
    refused = sum(each.value is None for each in every)
    wrong = sum(len(differences(got, want)) for got, want in zip(told, expected, strict=True))
    p50, p95 = (1e3 * float(value) for value in np.quantile([each.seconds for each in every], (0.5, 0.95)))
    workload = f"random 205k, {len(told)} SDK clients x {len(told[0])} requests, {refused} of {len(every)} wrong"
    shared = {"workload": workload, "against": "", "ratio": "", "wanted": ""}
    return [
        {**shared, "speed": "requests a second", "ours": f"{len(every) / seconds:,.0f}"},
        {**shared, "speed": f"result, ms, {AHEAD} ahead", "ours": f"{p50:.0f} p50, {p95:.0f} p95"},
        {
            **shared,
            "speed": "lost, twice or other than alone",
            "ours": f"{wrong} of {len(every)}",
            "ratio": float(wrong),
            "wanted": "<= 0",
        },
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table and write it; 1 if any client was told something else than alone."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser("python -m bench load", description="Many SDK clients, some requests wrong.")
    parser.add_argument("--clients", type=int, default=64, help="SDK clients at once")
    parser.add_argument("--requests", type=int, default=200, help="requests of each")
    options = parser.parse_args(arguments)
    about = record.circumstances() | {"arguments": list(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_qwen205k(Path(folder) / "model"))
        with _serving(model, f"{folder}/store", "process", "--invariant") as (_, url):
            told, seconds = together(url, KEY, MODEL, options.clients, options.requests)
        expected = alone(model, options.clients, options.requests)
    rows = rows_of(told, expected, seconds)
    Console(width=160).print(table(rows))
    Console(stderr=True).print(f"written to {record.save('load', about, rows)}")
    return int(rows[-1]["ratio"] > 0)
