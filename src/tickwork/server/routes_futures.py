"""Results: fetched one by one, or announced for a whole sampler."""

from __future__ import annotations

import trio
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tickwork.server import bodies_sampling as bodies
from tickwork.server.answers import PROTOBUF, HttpError, reply, unknown
from tickwork.server.body import off_loop
from tickwork.server.promises import Promise
from tickwork.server.server import Server

# A result above this is announced with its size first, if the client wishes, so that it can budget its memory.
INLINE_BYTES = 256 * 1024


async def retrieve_future(server: Server, owner: str, request: HttpRequest) -> Response:
    """Hand over a result; hold the poll until there is one, or until it is time to ask again."""
    ask = await server.parse(bodies.RetrieveFuture, request)
    promise = server.promises.find(ask.request_id, owner)
    if promise is None:
        raise _gone(ask.request_id)
    if not await _settled(server, promise):
        server.refuse_when_stuck()
        waiting = {"type": "try_again", "request_id": promise.request_id, "queue_state": "active"}
        return reply(waiting, 408)
    if promise.error is not None:
        server.fetched(promise)
        return reply(promise.failure())
    proto = PROTOBUF in request.headers.get("accept", "")
    payload = await off_loop(promise.bulk, lambda: promise.encoded(proto=proto))
    if ask.allow_metadata_only and len(payload) > INLINE_BYTES:
        return reply({"status": "complete_metadata", "response_payload_size": len(payload)})
    server.fetched(promise)
    media = PROTOBUF if proto and promise.kind.proto is not None else "application/json"
    return Response(payload, media_type=media)


async def retrieve_futures(server: Server, owner: str, request: HttpRequest) -> Response:
    """Announce what is done of one client of a sampler."""
    ask = await server.parse(bodies.RetrieveFutures, request)
    sampler = server.sessions.sampler(ask.target.sampling_session_id, owner)
    for request_id in ask.retrieved_request_ids:
        promise = server.promises.find(request_id, owner)
        # What is not done yet can not have been retrieved: its tokens would be given back while it runs.
        if promise is None or not promise.settled.is_set():
            continue
        if request_id.startswith(f"{sampler.sampling_session_id}:"):
            server.fetched(promise)
    seconds = server.settings.poll_seconds if ask.timeout is None else min(ask.timeout, server.settings.poll_seconds)
    found, cursor = await sampler.completions.since(ask.target.cloned_sampler_id, ask.prev_cursor, seconds)
    done = [{"state": "failed" if failed else "finished", "request_id": name} for name, failed in found]
    return reply({"completions": done, "cursor": cursor})


async def cancel_future(server: Server, owner: str, request: HttpRequest) -> Response:
    """Stop the drawing of a sample; other requests run to their end, as their order demands."""
    ask = await server.parse(bodies.CancelFuture, request)
    promise = server.promises.find(ask.request_id, owner)
    if promise is None:
        raise _gone(ask.request_id)
    cancelled = promise.future.cancel() if promise.future is not None else False
    if cancelled:
        promise.then(server.promises.fetched)  # nobody waits for it any more
    return reply({"cancelled": cancelled})


async def _settled(server: Server, promise: Promise) -> bool:
    if not promise.settled.is_set():
        with trio.move_on_after(server.settings.poll_seconds):
            await promise.settled.wait()
    return promise.settled.is_set()


def _gone(request_id: str) -> HttpError:
    """The SDK draws a sample again when it is told 410; for anything else that would hide a loss."""
    if ":sample:" in request_id:
        return HttpError(410, f"there is no request {request_id!r} any more")
    return unknown("request", request_id)
