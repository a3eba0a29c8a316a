"""``Shelf``: the weights that samplers draw from: snapshots of training models, checkpoints, bare bases."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import attrs
import torch

from tickwork.compute.lora import Adapter
from tickwork.compute.model import BaseModel
from tickwork.compute.optimizer import Trainable
from tickwork.errors import InvalidRequestError
from tickwork.requests import OpenSampler
from tickwork.store import Store


@attrs.define(eq=False)
class TrainingModel:
    """A training client's model; ``number`` is that of its lane's last request, where those have numbers."""

    base: BaseModel
    state: Trainable
    number: int = -1


@attrs.define(eq=False)
class Weights:
    """What a sampling client samples from: a snapshot, or the bare base. Samplers that follow a model share theirs.

    Args:
        model_id: the training model that it was taken of.
        inflight: whether it follows that model.
    """

    base: BaseModel
    adapter: Adapter | None
    model_id: str | None = None
    inflight: bool = False


class Shelf:
    """Makes the weights of samplers.

    Args:
        base: gives a base model by name.
        model: gives a training model by its id.

    Room: the device thread.
    """

    def __init__(
        self,
        base: Callable[[str], BaseModel],
        model: Callable[[str], TrainingModel],
        store: Store,
        device: torch.device,
    ) -> None:
        self._base, self._model, self._store, self._device = base, model, store, device
        # The snapshots that follow a training model, for as long as a sampler has them.
        self._inflight: weakref.WeakValueDictionary[str, Adapter] = weakref.WeakValueDictionary()

    def open(self, ask: OpenSampler) -> Weights:
        """Return what is asked for.

        Raises:
            InvalidRequestError: no such model, or a checkpoint of another base.
            CheckpointError: unknown, expired, foreign or damaged.
        """
        if ask.model_id is not None:
            model = self._model(ask.model_id)
            adapter = self._published(ask.model_id, model) if ask.inflight else model.state.adapter.snapshot()
            return Weights(model.base, adapter, ask.model_id, ask.inflight)
        if ask.path is None:
            return Weights(self._base(ask.base_model or ""), None)
        saved = self._store.read(ask.path)
        if ask.base_model not in (None, saved.meta.base_model):
            raise InvalidRequestError(f"{ask.path} was trained on {saved.meta.base_model!r}", field="base_model")
        base = self._base(saved.meta.base_model)
        adapter = Adapter(base.shapes, saved.meta.lora, saved.meta.lora.seed or 0, self._device)
        saved.restore(Trainable(adapter), with_optimizer=False)
        return Weights(base, adapter)

    def follow(self, model_id: str, adapter: Adapter) -> None:
        """Let a snapshot be the one that follows a model."""
        self._inflight[model_id] = adapter

    def _published(self, model_id: str, model: TrainingModel) -> Adapter:
        """Bring the snapshot that follows a model up to date; whoever samples from it goes on with the new weights."""
        shared = self._inflight.get(model_id)
        if shared is None:
            shared = self._inflight[model_id] = model.state.adapter.snapshot()
        else:
            shared.arena.copy_(model.state.adapter.arena)
        return shared
