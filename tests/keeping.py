"""Services in process with a journal, for tests: small scripts, stores as a crash leaves them, and what is compared."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tickwork as tinker

TINY = "tickwork/tiny"
GUARD = 60.0
ADAM = tinker.AdamParams(learning_rate=3e-3, grad_clip_norm=5.0)


def service(store: Path, **settings: Any) -> tinker.ServiceClient:
    """Open a store with its journal."""
    return tinker.ServiceClient(store=store, journal="process", **settings)


def datum(turn: int, size: int = 12) -> tinker.Datum:
    """Return some datum, always the same for the same turn."""
    ids = np.random.default_rng(turn).integers(0, 60, size).tolist()
    inputs = {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)}
    return tinker.Datum(tinker.ModelInput.from_ints(ids[:-1]), inputs)


def targets(turn: int) -> tinker.Datum:
    """Return some datum for a custom loss."""
    found = datum(turn)
    return tinker.Datum(found.model_input, {"target_tokens": found.loss_fn_inputs["target_tokens"]})


def squares(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that mixes its datums."""
    total = torch.stack([logp.sum() for logp in logprobs]).sum()
    return (total * total).sqrt(), {"datums:sum": float(len(data))}


def held_loss() -> tuple[Callable[..., Any], threading.Event, threading.Event]:
    """Return such a loss that waits, an event set once it is called, and one that lets it go on."""
    entered, go = threading.Event(), threading.Event()

    def slow(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        entered.set()
        assert go.wait(GUARD)
        return squares(data, logprobs)

    return slow, entered, go


def train(client: tinker.TrainingClient, turns: range) -> list[Any]:
    """Train, with a custom loss every third turn, submitting ahead; return all that was told."""
    waiting: list[Any] = []
    for turn in turns:
        if turn % 3 == 2:
            waiting.append(client.forward_backward_custom([targets(turn), targets(turn + 50)], squares))
        else:
            waiting.append(client.forward_backward([datum(turn), datum(turn + 50)], "cross_entropy"))
        waiting.append(client.optim_step(ADAM))
    return [future.result(GUARD) for future in waiting]


def bits(at: tinker.ServiceClient, client: tinker.TrainingClient, name: str = "bits") -> dict[str, str]:
    """Return the checksums of all that a model is, its accumulated gradient included: it makes a step and is saved."""
    client.optim_step(tinker.AdamParams(learning_rate=1e-3))
    path = client.save_state(name, overwrite=True).result(GUARD).path
    return dict(at.host.catalogue.meta(path).checksums)


def crashed(store: Path, to: Path) -> Path:
    """Copy a store as a crash would leave it now; return the copy."""
    shutil.copytree(store, to)
    return to


def only(at: tinker.ServiceClient) -> str:
    """Return the one run that can be resumed."""
    (run,) = at.resumable()
    assert run.broken is None
    return run.run_id


class Gate:
    """A hook of the journal that stops whoever comes to a point, while it is shut."""

    def __init__(self, point: str = "commit") -> None:
        self._point = point
        self._open = threading.Event()
        self._open.set()
        self.reached = threading.Event()

    def __call__(self, point: str) -> None:
        if point == self._point and not self._open.is_set():
            self.reached.set()
            assert self._open.wait(GUARD)

    def shut(self) -> None:
        """Stop the next one."""
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        """Let everybody through."""
        self._open.set()


def until(ready: Callable[[], bool]) -> None:
    """Wait for what nobody tells of."""
    tick = threading.Event()
    for _ in range(int(GUARD / 0.002)):
        if ready():
            return
        tick.wait(0.002)
    raise AssertionError("it never came to be")
