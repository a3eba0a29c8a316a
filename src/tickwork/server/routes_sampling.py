"""Sampling sessions, and the drawing of samples."""

from __future__ import annotations

import secrets

import attrs
import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tickwork import build
from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError, RequestFailedError
from tickwork.journal.records import Record
from tickwork.requests import OpenSampler, Sample, Save
from tickwork.server import bodies, bodies_sampling, kinds
from tickwork.server.answers import HttpError, reply
from tickwork.server.completions import CLONE
from tickwork.server.kinds import SAVE_SAMPLER
from tickwork.server.lanes import request_id
from tickwork.server.numbered import in_lane, numbered
from tickwork.server.promises import Promise, plain
from tickwork.server.server import Server, public_name
from tickwork.server.session import Sampler

OPEN = plain("create_sampling_session", lambda _: {})


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
        sampler = Sampler(name, session, number, name, base, ask.model_path)
        if number not in session.samplers:  # the same request may have come again meanwhile
            _open(server, sampler)
            server.sessions.add_sampler(number, sampler, server.settings.max_samplers)
    await server.durable.put(session.samplers[number].record)
    return reply({"type": "create_sampling_session", "sampling_session_id": name})


@in_lane(SAVE_SAMPLER, bodies.SaveWeightsForSampler)
async def save_weights_for_sampler(server: Server, owner: str, ask: bodies.SaveWeightsForSampler) -> Response:
    """Promise a checkpoint for samplers or, without a name, a sampler of the weights as they are at this point."""
    if ask.path is not None:
        return await _named(server, owner, ask, ask.path)
    return await _ephemeral(server, owner, ask)


async def join_sampling_session(server: Server, owner: str, request: HttpRequest) -> Response:
    """Give one more client of a sampler a number of its own."""
    ask = await server.parse(bodies_sampling.JoinSamplingSession, request)
    sampler = server.sessions.sampler(ask.sampling_session_id, owner)
    sampler.clones = number = sampler.clones + 1
    await server.durable.put(sampler.record)
    return reply({"client_counter": number})


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
    name = request_id(sampler.sampling_session_id, ask.seq_id)
    promise = server.promises.find(name, owner)
    if promise is None:
        server.refuse_when_stopping()
        if sampler.session.ended is not None:
            raise HttpError(404, f"session {sampler.session.session_id!r} was closed: {sampler.session.ended}")
        server.refuse_when_full(owner)
        sampler.completions.check(ask.seq_id // CLONE)
        promise = _draw(server, sampler, ask, name)
    await promise.taken()
    return reply({"request_id": name, "sample_sequence_ids": kinds.sequence_ids(name, ask.num_samples)})


def _draw(server: Server, sampler: Sampler, ask: bodies_sampling.Sample, name: str) -> Promise:
    payload = seeded(ask.payload(sampler.sampling_session_id))
    weight, most = weight_of(server, sampler, payload), server.settings.max_tokens_in_flight
    if weight > most:
        raise InvalidRequestError(
            f"{weight} tokens, prompt and samples; {most} are the most at once", field="max_tokens"
        )
    if server.promises.weight(sampler.session.owner) + weight > most:
        raise HttpError(429, "too many tokens are in flight: samples are taken as others end", {"retry-after": "1"})
    place = (sampler.sampling_session_id, ask.seq_id)
    kind = kinds.sample(name, payload.num_samples)
    promise = server.promises.make(name, sampler.session.owner, kind, weight, place)
    server.durable.accept(promise, payload, lambda: draw(server, sampler, payload, promise))
    return promise


def weight_of(server: Server, sampler: Sampler, payload: Sample) -> int:
    """Return the tokens of a prompt and of its samples, which are no longer than the model's context."""
    context = server.contexts.get(sampler.base_model or "", 0)
    asked = payload.params.max_tokens
    longest = context if asked is None else min(asked, context) if context else asked
    return len(payload.prompt) + payload.num_samples * max(0, longest)


def seeded(payload: Sample) -> Sample:
    """Draw the seed of a request that has none, so that the same tokens are drawn again after a crash."""
    if payload.params.seed is not None:
        return payload
    return attrs.evolve(payload, params=attrs.evolve(payload.params, seed=secrets.randbits(63)))


def draw(server: Server, sampler: Sampler, payload: Sample, promise: Promise) -> None:
    """Let an accepted request be drawn, unless it was not accepted after all."""
    if promise.refusal is not None:
        server.promises.drop(promise, promise.refusal)
        return
    sampler.used = trio.current_time()
    announce(sampler, promise)
    lost = _hold(server, sampler)
    request = Request("sample", sampler.lane, payload, tokens=len(payload.prompt))
    model = server.sessions.model_of(sampler)
    if lost is not None:
        promise.fail(lost)
    elif model is not None:
        model.lane.after(request, promise)
    else:
        server.door.post(request, promise)


def announce(sampler: Sampler, promise: Promise) -> None:
    """Tell of a request when it is done, to clients that ask about all of a sampler's at once."""
    assert promise.place is not None
    number = promise.place[1]
    promise.then(lambda done: sampler.completions.add(number, done.request_id, failed=done.error is not None))


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


async def _named(server: Server, owner: str, ask: bodies.SaveWeightsForSampler, name: str) -> Response:
    def make(model_id: str) -> Request:
        if ask.sampling_session_seq_id is not None:
            raise InvalidRequestError("is for a sampler without a name: leave it out", field="sampling_session_seq_id")
        if ask.kind != "snapshot":
            raise InvalidRequestError(f"{ask.kind!r} has no name: leave path out", field="kind")
        wanted = Save(model_id, "sampler_weights", name, ask.ttl_seconds, user_metadata=ask.user_metadata)
        return build.save(attrs.evolve(wanted, request_id=request_id(model_id, ask.seq_id)))

    return await numbered(server, owner, ask.model_id, ask.seq_id, SAVE_SAMPLER, make)


async def _ephemeral(server: Server, owner: str, ask: bodies.SaveWeightsForSampler) -> Response:
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
        sampler = Sampler(name, session, number, model_id)
        know_base(sampler, model.created)
        server.sessions.add_sampler(number, sampler, server.settings.max_samplers)
        return Request("step", model_id, OpenSampler(name, model_id=model_id, inflight=ask.kind == "inflight"))

    def also() -> list[Record]:
        return [session.samplers[number].record] if number in session.samplers else []

    kind = kinds.open_sampler(name)
    return await numbered(server, owner, ask.model_id, ask.seq_id, kind, make, also=also)


def know_base(sampler: Sampler, created: Promise) -> None:
    """Note the base model of a sampler that was taken of a training model, once that is made."""

    def note(created: Promise) -> None:
        if created.error is None:
            sampler.base_model = created.value.model_name

    created.then(note)
