"""K sampling clients, each of an adapter of its own: all at once, against one after the other."""

from __future__ import annotations

from contextlib import ExitStack

import trio

import tickwork
from bench.clients.cases import MANY, Case
from bench.clients.drive import Act, Pace, Side, compare
from bench.clients.rows import IN_LINE, INVARIANT, MERGED, Row, invariance, latencies, speeds
from bench.clients.training import acts as steps
from bench.clients.training import trainers

PART = "sampling"
SEQUENCES, TOKENS, PROMPT = 4, 32, 16
WHAT = f"{SEQUENCES} sequences of {TOKENS}"


def measure(case: Case, model: str, pace: Pace, invariant: bool) -> list[Row]:
    """Return the rows of one model, for each number of clients."""
    rows: list[Row] = []
    with ExitStack() as stack:
        service = stack.enter_context(tickwork.ServiceClient(device=case.device))
        asks = {MERGED: _acts(case, service, model)}
        services = {MERGED: service, IN_LINE: service}
        if invariant:
            services[INVARIANT] = stack.enter_context(tickwork.ServiceClient(device=case.device, invariant=True))
            asks[INVARIANT] = _acts(case, services[INVARIANT], model)
        for count in case.sampled:
            sides = {
                name: Side(each, asks.get(name, asks[MERGED])[:count], in_line=name == IN_LINE)
                for name, each in services.items()
                if name != INVARIANT or count == MANY
            }
            found = compare(sides, pace)
            rows += [speeds(PART, case, count, WHAT, found, None), latencies(PART, case, count, WHAT, found)]
            rows += [invariance(PART, case, count, WHAT, found)] if INVARIANT in found else []
    return rows


def _acts(case: Case, service: tickwork.ServiceClient, model: str) -> list[Act]:
    """Train each client a step, so that adapters differ, and return the drawing of its samples."""
    clients = trainers(service, model, max(case.sampled))

    async def train() -> None:
        for step in steps(case, clients, varied=False):
            await step()

    trio.run(train)
    samplers = [client.save_weights_and_get_sampling_client().result() for client in clients]
    return [_act(sampler, seed) for seed, sampler in enumerate(samplers)]


def _act(sampler: tickwork.SamplingClient, seed: int) -> Act:
    prompt = tickwork.ModelInput.from_ints([(31 * seed + 7 * place) % 256 for place in range(PROMPT)])
    params = tickwork.SamplingParams(max_tokens=TOKENS, seed=seed, stop=[])

    async def draw() -> int:
        drawn = await sampler.sample(prompt, SEQUENCES, params)
        return sum(len(sequence.tokens) for sequence in drawn.sequences)

    return draw
