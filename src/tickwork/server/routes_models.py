"""Training models: made, described, saved, loaded, let go."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import attrs
import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tickwork import build
from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError, TickworkError
from tickwork.journal.records import LaneRecord
from tickwork.requests import CreateModel, Save
from tickwork.results import GetInfoResponse
from tickwork.server import bodies
from tickwork.server.answers import HttpError, reply
from tickwork.server.kinds import CREATE, CREATE_BY_LOAD, LOAD, SAVE, SAVE_EXTERNAL, UNLOAD
from tickwork.server.lanes import Ask, request_id
from tickwork.server.numbered import in_lane, made, numbered
from tickwork.server.promises import Kind
from tickwork.server.server import Server, public_name
from tickwork.server.session import Model, Session
from tickwork.types import LoraConfig


async def create_model(server: Server, owner: str, request: HttpRequest) -> Response:
    """Promise a fresh training model."""
    ask = await server.parse(bodies.CreateModel, request)
    session = server.sessions.living(ask.session_id, owner)
    lora = ask.lora_config

    def make(model_id: str) -> Request:
        # Drawn here, so that the same model is made again after a crash.
        seed = secrets.randbits(31) if lora.seed is None else lora.seed
        shape = LoraConfig(lora.rank, seed, lora.train_unembed, lora.train_mlp, lora.train_attn)
        wanted = CreateModel(
            model_id,
            server.base_model(ask.base_model),
            shape,
            user_metadata={**session.user_metadata, **(ask.user_metadata or {})},
            owner=owner,
            session_id=session.session_id,
            project_id=session.project_id,
        )
        return build.create_model(wanted, ask.optimizer_config)

    return await _created(server, session, ask.model_seq_id, CREATE, make)


@in_lane(LOAD, bodies.LoadWeights)
async def load_weights(server: Server, owner: str, ask: bodies.LoadWeights) -> Response:
    """Promise a checkpoint's weights in a living training model, or in a new one."""
    denied = await _denied(server, ask, owner)
    if ask.model_id is None:
        return await _created_by_load(server, owner, ask, denied)
    if ask.seq_id is None:
        raise InvalidRequestError("is needed with model_id", field="seq_id")

    def make(model_id: str) -> Ask:
        for name in ("session_id", "model_seq_id", "base_model", "user_metadata", "optimizer_config"):
            if getattr(ask, name) is not None:
                raise InvalidRequestError("is for a new model: leave it out beside model_id", field=name)
        return denied or build.load(model_id, ask.path, ask.optimizer)

    return await numbered(server, owner, ask.model_id, ask.seq_id, LOAD, make)


async def get_info(server: Server, owner: str, request: HttpRequest) -> Response:
    """Describe a training model."""
    ask = await server.parse(bodies.GetInfo, request)
    created = server.sessions.model(ask.model_id, owner).created
    with trio.move_on_after(server.settings.poll_seconds):
        await created.settled.wait()
    if not created.settled.is_set():
        raise HttpError(408, f"training model {ask.model_id!r} is still being made: ask again")
    if created.error is not None:
        raise created.error
    info: GetInfoResponse = created.value
    data = {"arch": info.model_data.arch, "model_name": info.model_name, "tokenizer_id": public_name(info.model_name)}
    return reply(
        {
            "type": "get_info",
            "model_data": data,
            "model_id": info.model_id,
            "is_lora": True,
            "lora_rank": info.lora_rank,
            "model_name": info.model_name,
            "optimizer_config": {"type": "adamw"},
            "hint": server.engine.hint(info.model_id),
        }
    )


@in_lane(SAVE, bodies.SaveWeights)
async def save_weights(server: Server, owner: str, ask: bodies.SaveWeights) -> Response:
    """Promise a checkpoint with its optimizer's state."""

    def make(model_id: str) -> Request:
        mine = request_id(model_id, ask.seq_id)
        wanted = Save(model_id, "weights", ask.path, ask.ttl_seconds, ask.overwrite, ask.user_metadata, request_id=mine)
        return build.save(wanted)

    return await numbered(server, owner, ask.model_id, ask.seq_id, SAVE, make)


@in_lane(SAVE_EXTERNAL, bodies.SaveWeightsExternal)
async def save_weights_external(server: Server, owner: str, ask: bodies.SaveWeightsExternal) -> Response:
    """Promise a checkpoint for download."""
    recipients = tuple(ask.age_encryption_recipients or ())

    def make(model_id: str) -> Request:
        wanted = Save(model_id, "external_weights", ask.path, ask.ttl_seconds, recipients=recipients)
        return build.save(attrs.evolve(wanted, request_id=request_id(model_id, ask.seq_id)))

    return await numbered(server, owner, ask.model_id, ask.seq_id, SAVE_EXTERNAL, make)


async def unload_model(server: Server, owner: str, request: HttpRequest) -> Response:
    """Let go of a training model after all that was asked of it."""
    ask = await server.parse(bodies.UnloadModel, request)
    model = server.sessions.model(ask.model_id, owner)
    server.sessions.release(model)
    await server.durable.put(model.record)
    promise = server.promises.make(f"{ask.model_id}:unload", owner, UNLOAD)
    promise.fulfil(ask.model_id)
    return reply({"request_id": promise.request_id, "model_id": ask.model_id})


async def _created_by_load(
    server: Server, owner: str, ask: bodies.LoadWeights, denied: TickworkError | None
) -> Response:
    if ask.session_id is None or ask.model_seq_id is None or ask.seq_id is not None:
        raise InvalidRequestError("model_id and seq_id, or session_id and model_seq_id, are needed", field="model_id")
    session = server.sessions.living(ask.session_id, owner)

    def make(model_id: str) -> Request:
        if denied is not None:
            raise denied
        wanted = CreateModel(
            model_id,
            None if ask.base_model is None else server.base_model(ask.base_model),
            None,
            ask.path,
            ask.optimizer,
            {**session.user_metadata, **(ask.user_metadata or {})},
            owner=owner,
            session_id=session.session_id,
            project_id=session.project_id,
        )
        return build.create_model(wanted, ask.optimizer_config)

    return await _created(server, session, ask.model_seq_id, CREATE_BY_LOAD, make)


async def _created(
    server: Server, session: Session, number: int, kind: Kind, make: Callable[[str], Request]
) -> Response:
    model_id = f"{session.session_id}:train:{number}"
    if number not in session.models:
        server.refuse_when_stopping()
        server.refuse_when_full(session.owner)
        server.sessions.check_model(session, server.settings.max_models)
        lane = server.lane(model_id, session.owner)
        ask = made(make, model_id)
        about = LaneRecord(model_id, session.owner, session.session_id, number)
        if isinstance(ask, Request):
            about = attrs.evolve(about, base_model=ask.payload.base_model, lora=ask.payload.lora)
        created = lane.take(0, kind, lambda: ask, lambda: [about])
        assert created is not None
        server.sessions.add_model(number, Model(model_id, session, number, lane, created, about))
    model = session.models[number]
    await model.created.taken()
    return reply({"request_id": model.lane.request_id(0), "model_id": model_id})


async def _denied(server: Server, ask: bodies.LoadWeights, owner: str) -> TickworkError | None:
    """Return why an owner may not read a checkpoint."""
    if ask.weights_access_token is not None:
        return InvalidRequestError(
            "there are no access tokens here: publish the checkpoint", field="weights_access_token"
        )
    try:
        await server.in_thread(server.readable, ask.path, owner)
    except TickworkError as error:
        return error
    return None
