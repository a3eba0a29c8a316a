"""Runs and checkpoints: listed, published, copied, downloaded, deleted."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from tickwork.catalogue import Catalogue
from tickwork.errors import CheckpointError, InvalidRequestError
from tickwork.results import Checkpoint, TrainingRun
from tickwork.server import bodies
from tickwork.server.answers import HttpError, reply, unknown
from tickwork.server.server import Server, checkpoint_path
from tickwork.server.strict import MOST_NAME

# How long a download link works, in seconds.
LINK_SECONDS = 3600
# Copies that are remembered, so that a client that asks again gets the same one.
MOST_COPIES = 1024
# Entries that one listing returns at most.
MOST_LISTED = 10_000


async def list_runs(server: Server, owner: str, request: HttpRequest) -> Response:
    """List runs, newest first."""
    limit, offset = page(request, 20)
    project = request.query_params.get("project_id")
    runs: list[TrainingRun] = await server.in_thread(lambda: server.catalogue.runs(owner=owner, project_id=project))
    cursor = {"offset": offset, "limit": limit, "total_count": len(runs)}
    return reply({"training_runs": runs[offset : offset + limit], "cursor": cursor})


async def get_run(server: Server, owner: str, request: HttpRequest) -> Response:
    """Describe a run."""
    run_id = request.path_params["run_id"]
    await server.in_thread(server.own, run_id, owner, f"training run {run_id!r}")
    return reply(await server.in_thread(server.catalogue.run, run_id))


async def list_checkpoints(server: Server, owner: str, request: HttpRequest) -> Response:
    """List the checkpoints of a run, newest first."""
    run_id = request.path_params["run_id"]
    await server.in_thread(server.own, run_id, owner, f"training run {run_id!r}")
    return reply({"checkpoints": await server.in_thread(server.catalogue.checkpoints, run_id), "cursor": None})


async def list_all_checkpoints(server: Server, owner: str, request: HttpRequest) -> Response:
    """List an owner's checkpoints, newest first."""
    limit, offset = page(request, 100)
    found: list[Checkpoint] = await server.in_thread(lambda: server.catalogue.checkpoints(owner=owner))
    cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
    return reply({"checkpoints": found[offset : offset + limit], "cursor": cursor})


async def weights_info(server: Server, owner: str, request: HttpRequest) -> Response:
    """Tell what a checkpoint was trained from."""
    ask = await server.parse(bodies.WeightsInfo, request)
    await server.in_thread(server.readable, ask.tinker_path, owner)
    return reply(await server.in_thread(server.catalogue.info, ask.tinker_path))


async def copy_weights(server: Server, owner: str, request: HttpRequest) -> Response:
    """Copy a checkpoint, one's own or a published one, into a run of its own."""
    ask = await server.parse(bodies.CopyWeights, request)
    if ask.weights_access_token or request.headers.get("x-tinker-weights-access-token"):
        raise InvalidRequestError(
            "there are no access tokens here: publish the checkpoint", field="weights_access_token"
        )
    server.refuse_when_stopping()
    await server.in_thread(server.readable, ask.source_path, owner)
    key = request.headers.get("x-idempotency-key", "")
    if len(key) > MOST_NAME:
        raise InvalidRequestError(f"more than {MOST_NAME} characters", field="x-idempotency-key")
    if (owner, key) in server.copies and key:
        return reply({"tinker_path": server.copies[owner, key]})
    session = "" if ask.session_id is None else server.sessions.living(ask.session_id, owner).session_id
    path = await server.in_thread(
        lambda: server.catalogue.copy(
            ask.source_path,
            owner=owner,
            session_id=session,
            ttl_seconds=ask.ttl_seconds,
            project_id=ask.destination_project_id,
        )
    )
    if key:
        server.copies[owner, key] = path
        while len(server.copies) > MOST_COPIES:
            del server.copies[next(iter(server.copies))]
    return reply({"tinker_path": path})


async def delete_checkpoint(server: Server, owner: str, request: HttpRequest) -> Response:
    """Delete a checkpoint."""
    return await _change(server, owner, request, Catalogue.delete)


async def publish(server: Server, owner: str, request: HttpRequest) -> Response:
    """Let everybody with a key read a checkpoint; twice is no error."""
    return await _change(server, owner, request, lambda catalogue, path: catalogue.set_public(path, True))


async def unpublish(server: Server, owner: str, request: HttpRequest) -> Response:
    """Keep a checkpoint to its owner again."""
    return await _change(server, owner, request, lambda catalogue, path: catalogue.set_public(path, False))


async def set_ttl(server: Server, owner: str, request: HttpRequest) -> Response:
    """Let a checkpoint expire, or live."""
    ask = await server.parse(bodies.SetTtl, request)
    return await _change(server, owner, request, lambda catalogue, path: catalogue.set_ttl(path, ask.ttl_seconds))


async def external_urls(server: Server, owner: str, request: HttpRequest) -> Response:
    """Return links to an external checkpoint's files, which need no key and work for a while."""
    run_id, name = request.path_params["run_id"], request.path_params["name"]
    path = checkpoint_path(run_id, "external_weights", name)
    await server.in_thread(server.own, run_id, owner, f"checkpoint {path}")
    files = await server.in_thread(server.catalogue.files, path)
    until = int(time.time()) + LINK_SECONDS
    base = f"{str(request.base_url).rstrip('/')}/api/v1/downloads"
    where = f"{quote(run_id, safe='')}/{quote(name, safe='')}"
    urls = {
        file: f"{base}/{until}/{_signature(server, path, file, until)}/{where}/{quote(file, safe='')}" for file in files
    }
    return reply({"urls": urls, "expires": datetime.fromtimestamp(until, UTC)})


async def download(server: Server, request: HttpRequest) -> Response:
    """Send a file that its link gives access to."""
    asked = request.path_params
    path, file, until = (
        checkpoint_path(asked["run_id"], "external_weights", asked["name"]),
        asked["file"],
        asked["until"],
    )
    good = hmac.compare_digest(asked["signature"].encode(), _signature(server, path, file, until).encode())
    if not good or until < time.time():
        raise HttpError(403, "this link is not valid, or not any more: ask for a new one")
    files = await server.in_thread(server.catalogue.files, path)
    if file not in files:
        raise unknown("file", file)
    return FileResponse(files[file], media_type="application/octet-stream")


def page(request: HttpRequest, limit: int) -> tuple[int, int]:
    """Read ``limit`` and ``offset`` from a query.

    Raises:
        InvalidRequestError: naming the one that is no number, or out of bounds.
    """
    found = []
    for name, default in (("limit", limit), ("offset", 0)):
        text = request.query_params.get(name, str(default))
        if not text.isascii() or not text.isdigit() or len(text) > 12:
            raise InvalidRequestError(f"{text!r}; a whole number, at least 0", field=name)
        found.append(int(text))
    return min(found[0], MOST_LISTED), found[1]


def _signature(server: Server, path: str, file: str, until: int) -> str:
    return hmac.new(server.secret, f"{path}\0{file}\0{until}".encode(), hashlib.sha256).hexdigest()


async def _change(server: Server, owner: str, request: HttpRequest, act: Callable[[Catalogue, str], Any]) -> Response:
    asked = request.path_params
    path = checkpoint_path(asked["run_id"], asked["kind"], asked["name"])

    def change() -> None:
        try:
            server.own(asked["run_id"], owner, f"checkpoint {path}")
            act(server.catalogue, path)
        except CheckpointError as error:
            raise HttpError(404, str(error)) from None

    await server.in_thread(change)
    return Response(status_code=204)
