"""Tests of ``invariant=True``: in no bit do a client's results depend on who else is served, or on what befalls it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

import tickwork
from models import data_of, folder
from tickwork.compute.model import BaseModel
from tickwork.compute.rows import Packed

ADAM = tickwork.AdamParams(learning_rate=1e-2)
STEPS = 3
# Rows of this many tokens run out of memory where a test says so.
TOO_MANY = 30
Sick = Callable[[tickwork.TrainingClient, int], "str | None"]


def raises(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A custom loss with an error in it."""
    raise ZeroDivisionError("nothing to divide by")


def diverges(client: tickwork.TrainingClient, turn: int) -> str | None:
    """Weights that are not finite after the first step."""
    loss = client.forward_backward(data_of((5, 3), turn), "cross_entropy")
    step = client.optim_step(tickwork.AdamParams(learning_rate=1e36))
    with suppress(tickwork.LossError):
        loss.result()
    metrics = step.result().metrics
    return None if turn == 0 else f"applied {metrics['optim/applied']}"


def fails(client: tickwork.TrainingClient, turn: int) -> str | None:
    """A callable that raises."""
    future = client.forward_backward_custom(data_of((5, 3), turn), raises)
    with pytest.raises(tickwork.LossError) as caught:
        future.result()
    return str(caught.value)


def does_not_fit(client: tickwork.TrainingClient, turn: int) -> str | None:
    """A datum for which there is no memory."""
    future = client.forward_backward(data_of((2, TOO_MANY), turn), "cross_entropy")
    with pytest.raises(tickwork.CapacityError) as caught:
        future.result()
    return str(caught.value)


def gives_up(client: tickwork.TrainingClient, turn: int) -> str | None:
    """A wait that is given up at once."""
    future = client.forward_backward(data_of((5, 3), turn), "cross_entropy")
    with suppress(TimeoutError):
        future.result(timeout=0)
    return None if math.isfinite(future.result().metrics["loss:sum"]) else "lost"


def healthy(client: tickwork.TrainingClient, turn: int) -> str | None:
    """Just another client."""
    client.forward_backward(data_of((7, 2), 50 + turn), "cross_entropy")
    client.optim_step(ADAM).result()
    return None


SICK: dict[str, tuple[Sick, str]] = {
    "diverges": (diverges, "applied 0.0"),
    "fails": (fails, "ZeroDivisionError: nothing to divide by"),
    "does not fit": (does_not_fit, f"data[1] of {TOO_MANY} tokens does not fit"),
    "gives up": (gives_up, ""),
    "healthy": (healthy, ""),
}


def results(lengths: dict[str, tuple[int, ...]], sick: Sick | None, told: list[str | None]) -> dict[str, list[Any]]:
    """Train and sample some clients at once, beside a sick one; return all that each was told, to the bit."""
    with tickwork.ServiceClient(device="cpu", dtype="float32", invariant=True, max_tokens_per_pass=32) as service:
        clients = {
            name: service.create_lora_training_client(folder("llama"), rank=4, seed=seed).result()
            for seed, name in enumerate(lengths)
        }
        other = service.create_lora_training_client(folder("llama"), rank=4, seed=99).result() if sick else None
        futures: dict[str, list[Any]] = {name: [] for name in lengths}
        for turn in range(STEPS):
            for seed, (name, client) in enumerate(clients.items()):
                data = data_of(lengths[name], 10 * turn + seed)
                futures[name] += [client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)]
            if sick is not None and other is not None:
                told.append(sick(other, turn))
        found = {name: [_bits(future.result()) for future in futures[name]] for name in lengths}
        params = tickwork.SamplingParams(max_tokens=6, seed=3, stop=[])
        prompt = tickwork.ModelInput.from_ints(range(1, 9))
        samplers = {name: client.save_weights_and_get_sampling_client() for name, client in clients.items()}
        drawn = {name: sampler.sample(prompt, 2, params) for name, sampler in samplers.items()}
        for name, future in drawn.items():
            found[name].append([(each.tokens, each.logprobs) for each in future.result().sequences])
    return found


def _bits(result: Any) -> Any:
    if isinstance(result, tickwork.OptimStepResponse):
        return dict(result.metrics or {})
    logprobs = [out["logprobs"].to_numpy().tobytes() for out in result.loss_fn_outputs]
    return [result.metrics["loss:sum"], *logprobs]


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without the memory for a row of ``TOO_MANY`` tokens."""
    hidden = BaseModel.hidden

    def limited(self: BaseModel, packed: Packed) -> torch.Tensor:
        if max(stop - start for start, stop in packed.spans) >= TOO_MANY:
            raise torch.OutOfMemoryError("a row too many")
        return hidden(self, packed)

    monkeypatch.setattr(BaseModel, "hidden", limited)


@pytest.mark.usefixtures("scarce")
@pytest.mark.parametrize("how", SICK)
def test_nobody_elses_results_change_in_any_bit(how: str) -> None:
    """Losses, logprobs, steps and samples are those without the sick client, whose future says what happened."""
    lengths = {"small": (4, 3), "large": (9, 20, 11, 25, 8)}  # more than a pass
    told: list[str | None] = []
    act, says = SICK[how]

    beside = results(lengths, act, told)

    assert beside == results(lengths, None, [])
    assert says in (told[-1] or "")


def test_alone_and_in_company_are_bit_equal() -> None:
    """A client has the same bits alone as beside others of any size."""
    random = np.random.default_rng(0)
    for _ in range(3):
        lengths = {name: tuple(random.integers(1, 26, random.integers(1, 6)).tolist()) for name in "abc"}
        alone = results({"a": lengths["a"]}, None, [])
        assert results(lengths, None, [])["a"] == alone["a"]
