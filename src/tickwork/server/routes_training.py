"""Passes and optimizer steps, in the order of their numbers."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tickwork import build
from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError
from tickwork.journal.losses import MadeLoss
from tickwork.journal.records import LossRecord
from tickwork.requests import ForwardBackward, LossGraph, MakeLoss
from tickwork.server import bodies, wire
from tickwork.server.answers import PROTOBUF, reply
from tickwork.server.body import TooLargeError, json_of, off_loop, read
from tickwork.server.kinds import OPTIM, PASS
from tickwork.server.numbered import in_lane, made, numbered, weight_of
from tickwork.server.promises import Promise, plain
from tickwork.server.server import Server
from tickwork.server.session import Session, loss_id

# Bytes of a custom loss.
MOST_LOSS = 2**18


async def forward_backward(server: Server, owner: str, request: HttpRequest) -> Response:
    """Promise a pass with a gradient, or without one if a protobuf body says so."""
    return await _pass(server, owner, request, forward_only=False)


async def forward(server: Server, owner: str, request: HttpRequest) -> Response:
    """Promise a pass without a gradient; older SDKs have a route of its own for it."""
    return await _pass(server, owner, request, forward_only=True)


@in_lane(OPTIM, bodies.OptimStep)
async def optim_step(server: Server, owner: str, ask: bodies.OptimStep) -> Response:
    """Promise an optimizer step."""
    return await numbered(
        server, owner, ask.model_id, ask.seq_id, OPTIM, lambda model_id: build.optim_step(model_id, ask.params())
    )


async def create_custom_loss(server: Server, owner: str, request: HttpRequest) -> Response:
    """Promise a loss that was sent as a graph."""
    ask = await server.parse(bodies.CreateCustomLoss, request, MOST_LOSS)
    session = server.sessions.living(ask.session_id, owner)
    number = ask.custom_loss_seq_id
    name, graph = loss_id(session, number), ask.loss_graph()
    if number not in session.made_losses:
        server.refuse_when_stopping()
        server.refuse_when_full(owner)
        server.sessions.check_loss(session)
        make_loss(server, session, number, graph)
    await server.durable.put(LossRecord(name, owner, session.session_id, number, graph))
    return reply({"request_id": name})


def make_loss(server: Server, session: Session, number: int, graph: LossGraph) -> Promise:
    """Promise a loss of a graph, which the session's passes may then name."""
    name = loss_id(session, number)

    def keep(promise: Promise) -> None:
        if promise.error is None and session.ended is None:
            session.losses[name] = MadeLoss(name, promise.value)

    kind = plain("create_custom_loss", lambda _: {"loss_id": name})
    promise = server.promise(name, session.owner, kind, lambda: Request("step", name, MakeLoss(graph)))
    promise.then(keep)
    session.made_losses[number] = promise
    return promise


async def _pass(server: Server, owner: str, request: HttpRequest, *, forward_only: bool) -> Response:
    proto = request.headers.get("content-type", "").startswith(PROTOBUF)
    try:
        raw = await read(request, server.settings)
    except TooLargeError as error:
        await _use_up(server, owner, error)
        raise
    if proto:
        most = wire.Most(server.settings.chunk_datums, server.settings.max_tokens_in_flight)
        found = await off_loop(len(raw), lambda: wire.open_training(raw, most))
    else:
        found = await off_loop(len(raw), lambda: wire.open_training_json(json_of(raw), forward_only=forward_only))
    losses = server.sessions.model(found.model_id, owner).session.losses
    ask = await off_loop(len(raw), lambda: made(lambda _: _pass_request(found, losses), found.model_id))
    return await numbered(server, owner, found.model_id, found.seq_id, PASS, lambda _: ask, weight_of(ask))


def _pass_request(found: wire.TrainingBody, losses: dict[str, Any]) -> Request:
    ask = found.ask()
    loss_fn: Any = ask.loss_fn
    config = ask.config
    if loss_fn == "custom":
        config = dict(config)
        loss_id = config.pop("loss_id", None)
        if loss_id not in losses:
            raise InvalidRequestError(f"{loss_id!r} is no loss of this session", field="loss_fn_config['loss_id']")
        loss_fn = losses[str(loss_id)]
    # The datums were made from the body: nobody else can change them.
    return build.again(
        found.model_id, ForwardBackward(found.model_id, ask.data, loss_fn, config, not ask.forward_only, ask.data)
    )


async def _use_up(server: Server, owner: str, error: TooLargeError) -> None:
    """Fail the number that a refused body carried: its client has used it up, and goes on with the next."""
    where = wire.peek_training(error.head)
    if where is not None:
        too_large = InvalidRequestError(error.detail)
        await numbered(server, owner, *where, PASS, lambda _: too_large)
