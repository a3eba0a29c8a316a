"""``Entry``: a request on its way, and what is written of it."""

from __future__ import annotations

import secrets
from typing import Any

import attrs

from tickwork.engine.request import Request
from tickwork.futures import Future, Inner
from tickwork.journal.records import IN_PROCESS, LaneRecord
from tickwork.requests import CreateModel, ForwardBackward, Load, OptimStep, Save, changes_model

# What a request is called in a journal, and by whoever asks what became of it: the method that made it.
KINDS: dict[type, str] = {
    CreateModel: "create",
    ForwardBackward: "forward_backward",
    OptimStep: "optim_step",
    Load: "load_state",
}
SAVES = {
    "weights": "save_state",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}


@attrs.define(eq=False)
class Entry:
    """A request between its acceptance and the showing of its result.

    Args:
        body: what is written of it; None for what leaves the model and the store as they are, which is not written.
        shown: what its caller has.
        durable: settled once it, and all that was asked before it, is written.
    """

    request: Request
    body: bytes | None = None
    shown: Future[Any] = attrs.Factory(Future)
    durable: Inner[None] = attrs.Factory(Inner)


def kind_of(payload: Any) -> str:
    """Return what a request is called."""
    return SAVES[payload.kind] if isinstance(payload, Save) else KINDS[type(payload)]


def is_written(payload: Any) -> bool:
    """Whether a request leaves the model or the store another than it was."""
    return changes_model(payload) or isinstance(payload, Save)


def repeatable(payload: Any) -> Any:
    """Fix what would come out otherwise if it were asked again."""
    if isinstance(payload, CreateModel) and payload.lora is not None and payload.lora.seed is None:
        return attrs.evolve(payload, lora=attrs.evolve(payload.lora, seed=secrets.randbits(31)))
    if isinstance(payload, Save):
        return attrs.evolve(payload, request_id=f"{payload.model_id}:{secrets.token_hex(8)}")
    return payload


def about(name: str, payload: CreateModel) -> LaneRecord:
    """Return what is written of a training model."""
    session, _, number = name.partition(":train:")
    return LaneRecord(name, IN_PROCESS, session, int(number or 0), payload.base_model, payload.lora)
