"""K training clients with small batches: forward_backward and optim_step, submitted together and awaited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

import tickwork
from bench.clients.cases import MANY, RANK, ROWS, Case
from bench.clients.drive import Act, Pace, Side, compare
from bench.clients.rows import IN_LINE, INVARIANT, MERGED, Row, invariance, latencies, passes, speeds
from bench.workloads import ADAM

PART = "training"


def measure(case: Case, model: str, pace: Pace, invariant: bool) -> list[Row]:
    """Return the rows of one model, for each number of clients."""
    rows: list[Row] = []
    with ExitStack() as stack:
        services = {name: stack.enter_context(service) for name, service in _services(case, invariant).items()}
        clients = {name: trainers(service, model, max(case.clients)) for name, service in services.items()}
        for varied, counts in ((False, case.clients), (True, case.varied)):
            for count in counts:
                sides = {
                    name: Side(services[name], acts(case, clients[name][:count], varied))
                    for name in services
                    if name != INVARIANT or (count == MANY and not varied)
                }
                rows += _rows(case, count, varied, sides, pace)
    return rows


def _rows(case: Case, count: int, varied: bool, sides: dict[str, Side], pace: Pace) -> list[Row]:
    # One client alone is held to a hundredth, which takes more turns.
    found = compare(sides, Pace(pace.seconds, pace.rounds * (4 if count == 1 else 1)))
    lengths = case.lengths(varied)
    what = f"{ROWS} rows of {min(lengths)} to {max(lengths)}" if varied else f"{ROWS} rows of {case.length}"
    wanted = None if varied else case.wanted.get(count)
    rows = [
        speeds(PART, case, count, what, found, wanted),
        latencies(PART, case, count, what, found, "<= 1.02" if count == 1 else ""),
        passes(PART, case, count, what, found),
    ]
    return rows + ([invariance(PART, case, count, what, found)] if INVARIANT in found else [])


def _services(case: Case, invariant: bool) -> dict[str, tickwork.ServiceClient]:
    services = {
        MERGED: tickwork.ServiceClient(device=case.device),
        IN_LINE: tickwork.ServiceClient(device=case.device, merge=False),
    }
    return services | ({INVARIANT: tickwork.ServiceClient(device=case.device, invariant=True)} if invariant else {})


def trainers(service: tickwork.ServiceClient, model: str, count: int) -> list[tickwork.TrainingClient]:
    """Make training clients of one service."""
    return [service.create_lora_training_client(model, rank=RANK, seed=seed).result() for seed in range(count)]


def acts(case: Case, clients: Sequence[tickwork.TrainingClient], varied: bool) -> list[Act]:
    """Return one step of each client, on rows of its own."""
    return [_act(client, data(case, case.lengths(varied), seed)) for seed, client in enumerate(clients)]


def _act(client: tickwork.TrainingClient, batch: list[tickwork.Datum]) -> Act:
    tokens = sum(datum.model_input.length for datum in batch)

    async def step() -> int:
        loss, applied = client.forward_backward(batch, "cross_entropy"), client.optim_step(ADAM)
        await loss
        await applied
        return tokens

    return step


def data(case: Case, lengths: Sequence[int], seed: int) -> list[tickwork.Datum]:
    """Return random rows for cross_entropy."""
    chance = np.random.default_rng(seed)
    rows = [chance.integers(0, case.vocab, length + 1) for length in lengths]
    return [
        tickwork.Datum(
            tickwork.ModelInput.from_ints(row[:-1].tolist()),
            {"target_tokens": row[1:], "weights": np.ones(len(row) - 1, np.float32)},
        )
        for row in rows
    ]
