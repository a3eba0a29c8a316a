"""Training scripts for tests that kill them: a process that has everything loaded forks one for each line it is told.

A line is JSON: the store, whether the script is ``sync`` or ``trio``, and where it is to end, see ``server_nurse``. A
script goes on where the last one was killed. It prints ``NUMBER DIGEST`` for each result that it is told, and in the
end the checksums of every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from keeping import ADAM, TINY, datum, squares, targets
from nursing import fork_for_each_line, fuse

TURNS = 16


def plan() -> list[tuple[str, Any]]:
    """Return what is asked, in order; a custom loss is waited for before anything is asked after it."""
    asked: list[tuple[str, Any]] = []
    for turn in range(TURNS):
        if turn % 4 == 3:
            asked.append(("forward_backward_custom", ([targets(turn), targets(turn + 50)], squares)))
        else:
            asked.append(("forward_backward", ([datum(turn), datum(turn + 50)], "cross_entropy")))
        asked.append(("optim_step", (ADAM,)))
        if turn % 4 == 1:
            asked.append(("save_state", (f"turn-{turn}",)))
        if turn == 6:
            asked.append(("load_state_with_optimizer", ("turn-5",)))
    return [*asked, ("save_state", ("final",))]


def left(client: Any, results: dict[int, Any]) -> Iterator[tuple[int, str, Any]]:
    """Tell what an earlier process has done; return what is left. A custom loss that was not done is asked again."""
    done = [results[number] for number in range(1, client.requests_applied + 1) if results[number].error is None]
    for place, result in enumerate(done):
        tell(place, result.value)
    for place, (name, args) in enumerate(plan()):
        if place >= len(done):
            read = (f"tinker://{client.model_id}/weights/{args[0]}",)
            yield place, name, read if name.startswith("load") else args


def tell(place: int, value: Any) -> None:
    """Print what a result is, but for the number of its cycle and the run's id."""
    metrics = {**getattr(value, "metrics", {}), "clock_cycle:unique": 0}
    outputs = [each["logprobs"].to_numpy().tobytes() for each in getattr(value, "loss_fn_outputs", [])]
    path = getattr(value, "path", "").rpartition("/")[2]
    digest = hashlib.sha256(repr((type(value).__name__, metrics, outputs, path)).encode()).hexdigest()
    os.write(1, f"{place} {digest}\n".encode())


def end(store: Path) -> None:
    """Print what was saved."""
    from tickwork.catalogue import Catalogue

    catalogue = Catalogue(store)
    saved = {c.checkpoint_id: catalogue.meta(c.tinker_path).checksums for c in catalogue.checkpoints()}
    os.write(1, f"saved {json.dumps(saved, sort_keys=True)}\n".encode())


def sync(store: Path) -> None:
    """Train by plain calls, submitting ahead."""
    import tickwork as tinker

    with tinker.ServiceClient(store=store, journal="process") as service:
        runs = service.resumable()
        if runs:
            client = service.resume_training_client(runs[0].run_id)
        else:
            client = service.create_lora_training_client(TINY, rank=4, seed=7)
        waiting = []
        for place, name, args in left(client, client.past_results()):
            waiting.append((place, getattr(client, name)(*args)))
            while waiting and (len(waiting) > 4 or name.endswith("custom")):
                number, future = waiting.pop(0)
                tell(number, future.result())
        for number, future in waiting:
            tell(number, future.result())


def under_trio(store: Path) -> None:
    """Train under Trio, with the engine in this run."""
    import trio

    import tickwork as tinker

    async def main() -> None:
        async with tinker.open_service(store=store, journal="process") as service:
            runs = service.resumable()
            if runs:
                client = await service.resume_training_client_async(runs[0].run_id)
            else:
                client = await service.create_lora_training_client_async(TINY, rank=4, seed=7)
            waiting = []
            for place, name, args in left(client, await client.past_results_async()):
                waiting.append((place, await getattr(client, f"{name}_async")(*args)))
                while waiting and (len(waiting) > 4 or name.endswith("custom")):
                    number, future = waiting.pop(0)
                    tell(number, await future)
            for number, future in waiting:
                tell(number, await future)

    trio.run(main)


def run(about: dict[str, Any]) -> None:
    """Run a script, with a snapshot every few requests."""
    import torch

    from tickwork.journal import cost
    from tickwork.kept import keeper, snapshots

    torch.set_num_threads(1)
    snapshots.LEAST_SECONDS, cost.COST = 0.03, 0
    if "at" in about:
        keeper.Journal = partial(keeper.Journal, at=fuse(about["at"], about["after"]))  # type: ignore[misc,assignment]
    store = Path(about["store"])
    {"sync": sync, "trio": under_trio}[about["script"]](store)
    end(store)


def main() -> None:
    """Fork a script for each line, one at a time, and say how it ended."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tickwork.compute.stage
    import tickwork.kept.catch_up  # noqa: F401

    fork_for_each_line(run)


if __name__ == "__main__":
    main()
