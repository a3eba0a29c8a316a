"""What a server's answers take, through the official SDK: run in a process of its own, so that several take turns.

``python client.py BASE_URL API_KEY MODEL`` needs ``tinker`` alone, of any generation that the server understands;
``python client.py in-process MODEL [STORE]`` measures the same calls of ``import tickwork as tinker``, with a journal
where there is a store. It prints the names of what it measures as JSON, then one number for each of them that it reads.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from shape import (  # type: ignore[import-not-found]
    LENGTH,
    OPTIM_STEP,
    PIPELINED,
    RANK,
    ROUND_TRIP,
    ROWS,
    SAMPLING,
    SEQUENTIAL,
    VOCAB,
)

# Steps of one block; steps before the first one, and before each that is measured; steps of each tenant.
BLOCK, FIRST, WARM, STEPS = 12, 10, 2, 24
CALLS = 150
SAMPLES = 1000
TENANTS = (1, 2, 4)
WAIT = 300.0


def settled(value: Any) -> Any:
    """Wait for a future; older generations return clients at once."""
    return value.result(WAIT) if hasattr(value, "result") else value


def median_ms(act: Callable[[], object], rounds: int, warm: int = WARM) -> float:
    """Return the median of some rounds, in milliseconds."""
    taken = []
    for _ in range(rounds + warm):
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(taken[warm:])


class Bench:
    """One server, or one engine in process, under calls of the Tinker API.

    Args:
        types: the values of the package that ``service`` comes from.
    """

    def __init__(self, types: Any, service: Any, model: str) -> None:
        self._types, self._service, self._model = types, service, model
        rows = [[(31 * row + 7 * place) % VOCAB for place in range(LENGTH + 1)] for row in range(ROWS)]
        self._data = [self._datum(row) for row in rows]
        self._adam = types.AdamParams(learning_rate=1e-4)
        self.client = self.trainer()

    def _datum(self, row: list[int]) -> Any:
        inputs = {"target_tokens": row[1:], "weights": [1.0] * (len(row) - 1)}
        return self._types.Datum(model_input=self._types.ModelInput.from_ints(row[:-1]), loss_fn_inputs=inputs)

    def trainer(self) -> Any:
        """Make a training client."""
        return settled(self._service.create_lora_training_client(base_model=self._model, rank=RANK))

    def pipelined(self, client: Any = None) -> None:
        """One step, its two requests submitted together."""
        client = client or self.client
        loss, step = client.forward_backward(self._data, "cross_entropy"), client.optim_step(self._adam)
        loss.result(WAIT)
        step.result(WAIT)

    def sequential(self) -> None:
        """One step, each request awaited before the next."""
        self.client.forward_backward(self._data, "cross_entropy").result(WAIT)
        self.client.optim_step(self._adam).result(WAIT)

    def round_trip(self) -> None:
        """The smallest pass: one token, forward only."""
        self.client.forward([self._datum([1, 2])], "cross_entropy").result(WAIT)

    def optim_step(self) -> None:
        """One optimizer step."""
        self.client.optim_step(self._adam).result(WAIT)

    def figures(self) -> dict[str, Callable[[], float]]:
        """Return what is measured, by name."""
        return {
            PIPELINED: partial(median_ms, self.pipelined, BLOCK),
            SEQUENTIAL: partial(median_ms, self.sequential, BLOCK),
            ROUND_TRIP: partial(median_ms, self.round_trip, CALLS),
            OPTIM_STEP: partial(median_ms, self.optim_step, CALLS),
            SAMPLING: self.samples,
            **{f"{count} clients, steps/s": partial(self.tenants, count) for count in TENANTS},
        }

    def tenants(self, count: int) -> float:
        """Return steps a second of all clients of ``count`` together."""
        clients = [self.trainer() for _ in range(count)]

        def work(client: Any, steps: int) -> None:
            for _ in range(steps):
                self.pipelined(client)

        def together(steps: int) -> float:
            threads = [threading.Thread(target=work, args=(client, steps)) for client in clients]
            begun = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return time.perf_counter() - begun

        together(WARM)
        return count * STEPS / together(STEPS)

    def samples(self) -> float:
        """Return the seconds that many samples of one token take, all submitted before the first is awaited."""
        sampler = settled(self.client.save_weights_and_get_sampling_client())
        prompt = self._types.ModelInput.from_ints([1, 2, 3, 4])
        params = self._types.SamplingParams(max_tokens=1, stop=[])

        def draw(count: int) -> None:
            drawn = [sampler.sample(prompt, 1, params) for _ in range(count)]
            for each in drawn:
                each.result(WAIT)

        draw(20)
        begun = time.perf_counter()
        draw(SAMPLES)
        return time.perf_counter() - begun


def main(where: str, *rest: str) -> None:
    """Say what can be measured, and measure what is asked for."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    warnings.simplefilter("ignore")
    if where == "in-process":
        tinker = importlib.import_module("tickwork")
        model, *store = rest
        kept = {"store": store[0], "journal": "process"} if store else {}
        bench = Bench(tinker.types, tinker.ServiceClient(device="cpu", dtype="float32", **kept), model)
    else:
        tinker = importlib.import_module("tinker")
        key, model = rest
        bench = Bench(tinker.types, tinker.ServiceClient(base_url=where, api_key=key), model)
    for _ in range(FIRST):
        bench.pipelined()
    figures = bench.figures()
    print(json.dumps(list(figures)), flush=True)
    for line in sys.stdin:
        print(json.dumps(figures[line.strip()]()), flush=True)
    os._exit(0)  # closing the session is not measured, and some servers have no route for it


if __name__ == "__main__":
    main(*sys.argv[1:])
