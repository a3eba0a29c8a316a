"""Every kind of result that a journal may hold, by the text that it is recorded under."""

from __future__ import annotations

from typing import Any

from tickwork.results import SampleResponse
from tickwork.server import wire
from tickwork.server.promises import Kind, plain

PASS = Kind("forward_backward", wire.training_json, wire.training_proto)
OPTIM = plain("optim_step")
CREATE = plain("create_model", lambda info: {"model_id": info.model_id})
CREATE_BY_LOAD = plain("load_weights", lambda info: {"model_id": info.model_id}, "create_model_by_load")
SAVE = plain("save_weights")
SAVE_EXTERNAL = plain("save_weights_external")
SAVE_SAMPLER = plain("save_weights_for_sampler", lambda saved: {"path": saved.path})
LOAD = plain("load_weights")
UNLOAD = plain("unload_model", lambda model_id: {"model_id": model_id})

_BY_TEXT = {
    kind.text: kind for kind in (PASS, OPTIM, CREATE, CREATE_BY_LOAD, SAVE, SAVE_EXTERNAL, SAVE_SAMPLER, LOAD, UNLOAD)
}


def open_sampler(name: str) -> Kind:
    """Make the kind of a sampler without a checkpoint."""
    shape = {"path": None, "sampling_session_id": name}
    return plain("save_weights_for_sampler", lambda _: shape, f"open_sampler {name}")


def sample(request_id: str, count: int) -> Kind:
    """Make the kind of so many samples."""
    names = sequence_ids(request_id, count)

    def json(answer: SampleResponse) -> bytes:
        return wire.sample_json(answer, names)

    return Kind("sample", json, lambda answer: wire.sample_proto(answer, names), f"sample {count}")


def sequence_ids(request_id: str, count: int) -> list[str]:
    """Name the sequences of a request."""
    return [f"{request_id}:{index}" for index in range(count)]


def kind_of(text: str, request_id: str) -> Kind:
    """Return the kind that was recorded under a text; an unknown one's results are shown as they are."""
    name, _, more = text.partition(" ")
    if name == "open_sampler":
        return open_sampler(more)
    if name == "sample":
        return sample(request_id, int(more))
    return _BY_TEXT.get(text) or plain(text, _as_is)


def _as_is(value: Any) -> Any:
    return {"value": str(value)}
