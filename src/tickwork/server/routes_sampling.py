"""Sampling sessions, and the drawing of samples."""

from __future__ import annotations

import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tickwork import build
from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError, RequestFailedError
from tickwork.requests import OpenSampler, Sample, Save
from tickwork.results import SampleResponse
from tickwork.server import bodies, bodies_sampling, wire
from tickwork.server.answers import HttpError, reply
from tickwork.server.completions import CLONE
from tickwork.server.numbered import in_lane, numbered
from tickwork.server.promises import Kind, Promise, plain
from tickwork.server.server import Server, public_name
from tickwork.server.sessions import Sampler

OPEN = plain("create_sampling_session", lambda _: {})
SAVE_SAMPLER = plain("save_weights_for_sampler", lambda saved: {"path": saved.path})


async def create_sampling_session(server: Server, owner: str, request: HttpRequest) -> Response:
    """Open a sampler of a checkpoint or of a base model."""
    ask = await server.parse(bodies_sampling.CreateSamplingSession, request)
    session = server.sessions.living(ask.session_id, owner)
    number = ask.sampling_session_seq_id
    name = f"{session.session_id}:sample:{number}"
    if number not in session.samplers:
        server.refuse_when_stopping()
        base = None if ask.base_model is None else server.base_model(ask.base_model)
        if ask.model_path is not None:
            await server.in_thread(server.readable, ask.model_path, owner)
            meta = await server.in_thread(server.catalogue.meta, ask.model_path)
            base = base or server.base_model(meta.base_model)
        sampler = Sampler(name, session, name, base, ask.model_path)
        if number not in session.samplers:  # the same request may have come again meanwhile
            _open(server, sampler)
            server.sessions.add_sampler(number, sampler, server.settings.max_samplers)
    return reply({"type": "create_sampling_session", "sampling_session_id": name})


@in_lane(SAVE_SAMPLER, bodies.SaveWeightsForSampler)
async def save_weights_for_sampler(server: Server, owner: str, ask: bodies.SaveWeightsForSampler) -> Response:
    """Promise a checkpoint for samplers or, without a name, a sampler of the weights as they are at this point."""
    if ask.path is not None:
        return _named(server, owner, ask, ask.path)
    return _ephemeral(server, owner, ask)


async def join_sampling_session(server: Server, owner: str, request: HttpRequest) -> Response:
    """Give one more client of a sampler a number of its own."""
    ask = await server.parse(bodies_sampling.JoinSamplingSession, request)
    return reply({"client_counter": next(server.sessions.sampler(ask.sampling_session_id, owner).clones)})


async def get_sampler(server: Server, owner: str, request: HttpRequest) -> Response:
    """Describe a sampler."""
    sampler = server.sessions.sampler(request.path_params["sampler_id"], owner)
    base = sampler.base_model
    found = {"sampler_id": sampler.sampling_session_id, "base_model": public_name(base) if base else ""}
    return reply({**found, "model_path": sampler.model_path})


async def sample(server: Server, owner: str, request: HttpRequest) -> Response:
    """Promise samples."""
    ask = await server.parse(bodies_sampling.Sample, request, None)
    sampler = server.sessions.sampler(ask.sampling_session_id, owner)
    request_id = f"{sampler.sampling_session_id}:r{ask.seq_id}"
    if server.promises.find(request_id, owner) is None:
        server.refuse_when_stopping()
        if sampler.session.ended is not None:
            raise HttpError(404, f"session {sampler.session.session_id!r} was closed: {sampler.session.ended}")
        server.refuse_when_full(owner)
        sampler.completions.check(ask.seq_id // CLONE)
        _draw(server, sampler, ask, request_id)
    return reply({"request_id": request_id, "sample_sequence_ids": _sequence_ids(request_id, ask.num_samples)})


def _draw(server: Server, sampler: Sampler, ask: bodies_sampling.Sample, request_id: str) -> None:
    payload = ask.payload(sampler.sampling_session_id)
    weight, most = _weight(server, sampler, payload), server.settings.max_tokens_in_flight
    if weight > most:
        raise InvalidRequestError(
            f"{weight} tokens, prompt and samples; {most} are the most at once", field="max_tokens"
        )
    if server.promises.weight(sampler.session.owner) + weight > most:
        raise HttpError(429, "too many tokens are in flight: samples are taken as others end", {"retry-after": "1"})
    sampler.used = trio.current_time()
    promise = server.promises.make(request_id, sampler.session.owner, _kind(request_id, payload), weight)
    promise.then(lambda done: sampler.completions.add(ask.seq_id, request_id, failed=done.error is not None))
    lost = _hold(server, sampler)
    if lost is not None:
        promise.fail(lost)
    else:
        server.door.post(Request("sample", sampler.lane, payload, tokens=len(payload.prompt)), promise)


def _weight(server: Server, sampler: Sampler, payload: Sample) -> int:
    """Return the tokens of a prompt and of its samples, which are no longer than the model's context."""
    context = server.contexts.get(sampler.base_model or "", 0)
    asked = payload.params.max_tokens
    longest = context if asked is None else min(asked, context) if context else asked
    return len(payload.prompt) + payload.num_samples * max(0, longest)


def _kind(request_id: str, payload: Sample) -> Kind:
    names = _sequence_ids(request_id, payload.num_samples)

    def json(answer: SampleResponse) -> bytes:
        return wire.sample_json(answer, names)

    return Kind("sample", json, lambda answer: wire.sample_proto(answer, names))


def _sequence_ids(request_id: str, count: int) -> list[str]:
    return [f"{request_id}:{index}" for index in range(count)]


def _hold(server: Server, sampler: Sampler) -> RequestFailedError | None:
    """Make sure that a sampler's weights are with the engine; an error if they can not be had again."""
    if sampler.held:
        return None
    if sampler.lane != sampler.sampling_session_id:
        return InvalidRequestError(
            f"this key holds {server.settings.max_samplers} newer samplers, and this one was let go: make a new one"
        )
    _open(server, sampler)
    server.sessions.make_room(sampler.session.owner, server.settings.max_samplers)
    return None


def _open(server: Server, sampler: Sampler) -> None:
    name = sampler.sampling_session_id

    def make() -> Request:
        return build.open_sampler(name, sampler.model_path, sampler.base_model)

    sampler.held = True
    sampler.opened = server.promise(f"{name}:open", sampler.session.owner, OPEN, make)
    server.promises.fetched(sampler.opened)  # no client knows of it


def _named(server: Server, owner: str, ask: bodies.SaveWeightsForSampler, name: str) -> Response:
    def make(model_id: str) -> Request:
        if ask.sampling_session_seq_id is not None:
            raise InvalidRequestError("is for a sampler without a name: leave it out", field="sampling_session_seq_id")
        if ask.kind != "snapshot":
            raise InvalidRequestError(f"{ask.kind!r} has no name: leave path out", field="kind")
        return build.save(Save(model_id, "sampler_weights", name, ask.ttl_seconds, user_metadata=ask.user_metadata))

    return numbered(server, owner, ask.model_id, ask.seq_id, SAVE_SAMPLER, make)


def _ephemeral(server: Server, owner: str, ask: bodies.SaveWeightsForSampler) -> Response:
    model = server.sessions.model(ask.model_id, owner)
    session, number = model.session, ask.sampling_session_seq_id
    name = f"{session.session_id}:sample:{number}"

    def make(model_id: str) -> Request:
        for field in ("ttl_seconds", "user_metadata"):
            if getattr(ask, field):
                raise InvalidRequestError("a sampler without a name is not listed and takes none", field=field)
        if number is None:
            raise InvalidRequestError("path or sampling_session_seq_id is needed", field="path")
        if number in session.samplers:
            raise InvalidRequestError(f"{number} is taken", field="sampling_session_seq_id")
        sampler = Sampler(name, session, model_id)
        model.created.then(lambda created: _know_base(sampler, created))
        server.sessions.add_sampler(number, sampler, server.settings.max_samplers)
        return Request("step", model_id, OpenSampler(name, model_id=model_id, inflight=ask.kind == "inflight"))

    kind = plain("save_weights_for_sampler", lambda _: {"path": None, "sampling_session_id": name})
    return numbered(server, owner, ask.model_id, ask.seq_id, kind, make)


def _know_base(sampler: Sampler, created: Promise) -> None:
    if created.error is None:
        sampler.base_model = created.value.model_name
