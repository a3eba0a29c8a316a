"""``create``: a training model, fresh or from a checkpoint, and the record of its run."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import attrs
import torch

from tickwork.compute.lora import Adapter
from tickwork.compute.model import BaseModel
from tickwork.compute.optimizer import Trainable
from tickwork.compute.weights import TrainingModel
from tickwork.errors import InvalidRequestError
from tickwork.records import Run
from tickwork.requests import CreateModel
from tickwork.store import Store
from tickwork.types import LoraConfig


def create(ask: CreateModel, base_of: Callable[[str], BaseModel], store: Store, device: torch.device) -> TrainingModel:
    """Make a training model.

    Args:
        base_of: gives a base model by name.

    Room: the device thread.

    Raises:
        InvalidRequestError: naming the field.
        CheckpointError: unknown, expired, foreign or damaged, or it does not fit.
        ModelLoadError: the base model can not be loaded.
    """
    saved = None if ask.path is None else store.read(ask.path)
    lora = ask.lora or (saved.meta.lora if saved else LoraConfig())
    seed = lora.seed if lora.seed is not None else secrets.randbits(31)
    name = ask.base_model or (saved.meta.base_model if saved else "")
    if saved is not None and name != saved.meta.base_model:
        raise InvalidRequestError(
            f"{name!r} is not {saved.meta.base_model!r}, which {ask.path} was trained on", field="base_model"
        )
    if isinstance(lora.rank, bool) or not isinstance(lora.rank, int) or lora.rank < 1:
        raise InvalidRequestError(f"{lora.rank!r}; an integer >= 1 is needed", field="rank")
    base = base_of(name)
    adapter = Adapter(base.shapes, lora, seed, device)
    if not adapter.shapes:
        raise InvalidRequestError("nothing to train: all of train_attn, train_mlp, train_unembed are off")
    state = Trainable(adapter)
    if saved is not None:
        saved.restore(state, with_optimizer=ask.with_optimizer)
    run = Run(ask.model_id, name, lora, dict(ask.user_metadata or {}))
    run = attrs.evolve(run, owner=ask.owner, session_id=ask.session_id, project_id=ask.project_id)
    store.tell()
    store.catalogue.begin_run(run)
    return TrainingModel(base, state)
