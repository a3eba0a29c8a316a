"""``capture`` and ``restore``: the state of a training model, and of samplers taken of it, as arrays and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch

from tickwork.compute.lora import Adapter
from tickwork.compute.model import BaseModel
from tickwork.compute.optimizer import Trainable
from tickwork.compute.weights import TrainingModel, Weights
from tickwork.errors import JournalError
from tickwork.requests import Captured
from tickwork.types import LoraConfig

PARTS = ("exp_avg", "exp_avg_sq", "grad")
SAMPLER, INFLIGHT = "sampler ", "inflight"


def capture(model: TrainingModel, samplers: Mapping[str, Weights]) -> Captured:
    """Copy what later training changes.

    Args:
        samplers: those that were taken of the model, by key; their weights never change, but for those that follow it.

    Room: the device thread.
    """
    state = model.state
    arrays = {name: _copy(tensor) for name, tensor in state.tensors().items()}
    following = [key for key, weights in samplers.items() if weights.inflight]
    for key, weights in samplers.items():
        assert weights.adapter is not None
        if not weights.inflight:
            arrays[SAMPLER + key] = weights.adapter.arena.detach().cpu().numpy()
        elif INFLIGHT not in arrays:
            arrays[INFLIGHT] = _copy(weights.adapter.arena)
    about: dict[str, Any] = {
        "base_model": model.base.name,
        "lora": attrs.asdict(state.adapter.config),
        "seed": state.adapter.seed,
        "steps": state.steps,
        "requests": state.requests,
        "following": following,
    }
    return Captured(model.number, arrays, about)


def restore(
    model_id: str, captured: Captured, base: Callable[[str], BaseModel], device: torch.device
) -> tuple[TrainingModel, dict[str, Weights]]:
    """Make the model and its samplers again.

    Raises:
        JournalError: the base model is not the one that it was.
    """
    about, arrays = captured.metadata, captured.arrays
    body = base(about["base_model"])
    adapter = Adapter(body.shapes, LoraConfig(**about["lora"]), about["seed"], device)
    _fill(adapter, arrays["adapter"])
    state = Trainable(adapter)
    parts = {name: _tensor(array, device) for name, array in arrays.items() if name in PARTS}
    state.resume(parts, about["steps"], about["requests"])
    samplers = {
        name.removeprefix(SAMPLER): Weights(body, _like(adapter, array), model_id)
        for name, array in arrays.items()
        if name.startswith(SAMPLER)
    }
    if INFLIGHT in arrays:
        shared = _like(adapter, arrays[INFLIGHT])
        samplers |= {key: Weights(body, shared, model_id, inflight=True) for key in about["following"]}
    return TrainingModel(body, state, captured.number), samplers


def _copy(tensor: torch.Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().to("cpu", copy=True).numpy()
    return found


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, copy=True)


def _like(adapter: Adapter, array: np.ndarray) -> Adapter:
    again = adapter.snapshot()
    _fill(again, array)
    return again


def _fill(adapter: Adapter, array: np.ndarray) -> None:
    if array.shape != tuple(adapter.arena.shape):
        raise JournalError(
            f"a snapshot of {array.size} parameters does not fit an adapter of {adapter.arena.numel()}: the base model "
            f"is not the one that it was taken of"
        )
    with torch.no_grad():
        adapter.arena.copy_(torch.from_numpy(array))
