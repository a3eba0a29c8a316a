"""Requests from their arguments, checked as far as that needs no model: for the clients and for the server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from tickwork.convert import as_adam_params, as_config, as_data, as_integer, as_metadata
from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError
from tickwork.records import check_name, expiry
from tickwork.requests import CreateModel, ForwardBackward, Load, OpenSampler, OptimStep, Release, Save
from tickwork.results import ParsedCheckpointTinkerPath
from tickwork.seal import check_recipients
from tickwork.types import LoraConfig


def forward_backward(model_id: str, data: Any, loss_fn: Any, config: Any, backward: bool) -> Request:
    """Build a pass over datums.

    Raises:
        InvalidRequestError: naming the datum and the field.
    """
    given = tuple(data) if isinstance(data, Iterable) and not isinstance(data, str | bytes | dict) else data
    datums = as_data(given)
    payload = ForwardBackward(model_id, datums, loss_fn, as_config(config), backward, given)
    return again(model_id, payload)


def create_model(ask: CreateModel, optimizer: Any = None) -> Request:
    """Build the making of a training model.

    Args:
        optimizer: the configuration of the SDK, ``adamw`` or None.

    Raises:
        InvalidRequestError: naming the field.
    """
    kind = getattr(optimizer, "type", "adamw")
    if kind != "adamw":
        raise InvalidRequestError(f"{kind!r} is not offered: only 'adamw' is", field="optimizer.type")
    if ask.path is not None:
        ParsedCheckpointTinkerPath.from_tinker_path(ask.path)
    metadata = as_metadata(ask.user_metadata)
    shape = None if ask.lora is None else _checked(ask.lora)
    return Request("step", ask.model_id, attrs.evolve(ask, lora=shape, user_metadata=metadata))


def optim_step(model_id: str, params: Any) -> Request:
    """Build an optimizer step.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    return Request("step", model_id, OptimStep(model_id, as_adam_params(params)))


def save(ask: Save) -> Request:
    """Build the saving of a checkpoint.

    Raises:
        InvalidRequestError: a name, time to live, metadata or recipient that is not allowed.
    """
    expiry(ask.ttl_seconds)
    check_name(ask.name)
    check_recipients(ask.recipients)
    metadata = as_metadata(ask.user_metadata)
    return Request("step", ask.model_id, attrs.evolve(ask, overwrite=bool(ask.overwrite), user_metadata=metadata))


def load(model_id: str, path: str, with_optimizer: bool) -> Request:
    """Build the loading of a checkpoint into a living model.

    Raises:
        InvalidRequestError: not a checkpoint path.
    """
    ParsedCheckpointTinkerPath.from_tinker_path(path)
    return Request("step", model_id, Load(model_id, path, with_optimizer))


def open_sampler(key: str, path: str | None, base_model: str | None) -> Request:
    """Build what makes a checkpoint's or a base model's weights ready for sampling.

    Raises:
        InvalidRequestError: neither is given, or not a checkpoint path.
    """
    if path is None and base_model is None:
        raise InvalidRequestError("model_path or base_model is needed", field="model_path")
    if path is not None:
        ParsedCheckpointTinkerPath.from_tinker_path(path)
    return Request("step", key, OpenSampler(key, base_model, path))


def again(lane: str, payload: Any) -> Request:
    """Build a request of a training model from what was recorded of it."""
    if not isinstance(payload, ForwardBackward):
        return Request("step", lane, payload)
    rows = tuple(datum.model_input.length for datum in payload.data)
    return Request("pass", lane, payload, rows, whole=callable(payload.loss_fn), tokens=sum(rows))


def release(key: str, lane: str) -> Request:
    """Build what lets go of a training model or a sampler; a lane that bears its name ends with it."""
    return Request("step", lane, Release(key), ends_lane=key == lane)


def _checked(lora: LoraConfig) -> LoraConfig:
    seed = None if lora.seed is None else as_integer(lora.seed, "seed")
    return attrs.evolve(lora, rank=as_integer(lora.rank, "rank"), seed=seed)
