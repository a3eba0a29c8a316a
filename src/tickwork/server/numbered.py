"""Routes of requests that carry a number: each gets its place in its model's lane, whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError, TickworkError
from tickwork.journal.records import Record
from tickwork.server import strict
from tickwork.server.answers import reply
from tickwork.server.body import MOST_PLAIN, json_of, off_loop, read
from tickwork.server.lanes import Ask
from tickwork.server.promises import Kind
from tickwork.server.server import Server

B = TypeVar("B", bound=strict.Body)
Act = Callable[[Server, str, HttpRequest], Awaitable[Response]]


def in_lane(kind: Kind, model: type[B]) -> Callable[[Callable[[Server, str, B], Awaitable[Response]]], Act]:
    """Make a route from what answers a checked body.

    A client has used a number up once it has sent it. So a body that is wrong is answered with a promise of its error
    if its number can be read, and only otherwise with a 4xx.
    """

    def route_of(answer: Callable[[Server, str, B], Awaitable[Response]]) -> Act:
        async def route(server: Server, owner: str, request: HttpRequest) -> Response:
            raw = await read(request, server.settings, MOST_PLAIN)
            value = await off_loop(len(raw), lambda: json_of(raw))
            found = _checked(model, value)
            if not isinstance(found, InvalidRequestError):
                return await answer(server, owner, found)
            where = _number(value)
            if where is None:
                raise found
            return await numbered(server, owner, *where, kind, lambda _: found)

        return route

    return route_of


async def numbered(
    server: Server,
    owner: str,
    model_id: str,
    seq_id: int,
    kind: Kind,
    make: Callable[[str], Ask],
    weight: int = 0,
    also: Callable[[], Sequence[Record]] = tuple,
) -> Response:
    """Put a request into its model's lane, and answer once that is durable; its promise tells what is wrong with it.

    Args:
        also: gives what is written to the journal together with it.
    """
    lane = server.sessions.model(model_id, owner).lane
    lane.check_number(seq_id)
    if not lane.seen(seq_id):
        server.refuse_when_stopping()
        if seq_id > lane.next or not lane.held:  # the next one is let in where others wait for it
            server.refuse_when_full(owner)
        lane.check_room(seq_id, weight, server.settings.max_tokens_in_flight)
    promise = lane.take(seq_id, kind, lambda: made(make, model_id), also)
    if promise is not None:
        await promise.taken()
    return reply({"request_id": lane.request_id(seq_id), "model_id": model_id})


def made(make: Callable[[str], Ask], model_id: str) -> Ask:
    """Make a request, or what is wrong with it."""
    try:
        return make(model_id)
    except TickworkError as error:
        return error


def weight_of(ask: Ask) -> int:
    """Return the tokens of a request."""
    return ask.tokens if isinstance(ask, Request) else 0


def _checked(model: type[B], value: object) -> B | InvalidRequestError:
    try:
        return strict.parse(model, value)
    except InvalidRequestError as error:
        return error


def _number(value: Any) -> tuple[str, int] | None:
    if not isinstance(value, dict):
        return None
    model_id, seq_id = value.get("model_id"), value.get("seq_id")
    if isinstance(model_id, str) and isinstance(seq_id, int) and not isinstance(seq_id, bool):
        return model_id, seq_id
    return None
