"""Start-up, sessions, and what has no meaning on hardware of one's own."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tickwork.models import context_length
from tickwork.results import GetServerCapabilitiesResponse, SupportedModel
from tickwork.server import bodies
from tickwork.server.answers import HttpError, reply
from tickwork.server.routes_catalogue import page
from tickwork.server.server import Server


async def client_config(server: Server, owner: str, request: HttpRequest) -> Response:
    """Tell the SDK how to talk to this server."""
    await server.parse(bodies.ClientConfig, request)
    return reply(server.settings.client_config())


async def dynamic_config(server: Server, owner: str, request: HttpRequest) -> Response:
    """Tell it what it may change its mind about."""
    await server.parse(bodies.ClientConfig, request)
    return reply(server.settings.dynamic_config())


async def capabilities(server: Server, owner: str, request: HttpRequest) -> Response:
    """List the served base models."""
    models = [SupportedModel(name, context_length(name)) for name in server.settings.models]
    return reply(GetServerCapabilitiesResponse(models))


async def create_session(server: Server, owner: str, request: HttpRequest) -> Response:
    """Open a session."""
    ask = await server.parse(bodies.CreateSession, request)
    server.refuse_when_stopping()
    session = server.sessions.open(
        owner,
        server.settings.max_sessions,
        user_metadata=dict(ask.user_metadata or {}),
        tags=tuple(ask.tags),
        display_name=ask.display_name,
        project_id=ask.project_id,
        sdk_version=ask.sdk_version,
    )
    await server.durable.put(session.record)
    return reply({"type": "create_session", "session_id": session.session_id})


async def heartbeat(server: Server, owner: str, request: HttpRequest) -> Response:
    """Note that a session lives; 410 tells a client that it does not."""
    ask = await server.parse(bodies.Heartbeat, request)
    try:
        server.sessions.living(ask.session_id, owner)
    except HttpError as error:
        raise HttpError(410, error.detail) from None
    return reply({"type": "session_heartbeat"})


async def finish_session(server: Server, owner: str, request: HttpRequest) -> Response:
    """Close a session; what was accepted is finished, and what it holds is let go."""
    ask = await server.parse(bodies.FinishSession, request)
    session = server.sessions.find(request.path_params["session_id"], owner)
    session.finish = {"type": "client_finished", "reason": {"type": ask.reason.type}, "detail": ask.detail}
    server.sessions.end(session, f"its client finished it ({ask.reason.type})")
    await server.durable.put(session.record)
    return reply({})


async def list_sessions(server: Server, owner: str, request: HttpRequest) -> Response:
    """List an owner's sessions, newest first."""
    limit, offset = page(request, 20)
    found = [session.session_id for session in server.sessions.of(owner)]
    return reply({"sessions": found[offset : offset + limit]})


async def get_session(server: Server, owner: str, request: HttpRequest) -> Response:
    """Describe a session."""
    session = server.sessions.find(request.path_params["session_id"], owner)
    return reply(
        {
            "training_run_ids": [model.model_id for model in session.models.values()],
            "sampler_ids": [sampler.sampling_session_id for sampler in session.samplers.values()],
            "user_metadata": session.user_metadata or None,
            "display_name": session.display_name,
        }
    )


async def assign_project(server: Server, owner: str, request: HttpRequest) -> Response:
    """Put a session and its runs into a project."""
    ask = await server.parse(bodies.AssignProject, request)
    session = server.sessions.find(request.path_params["session_id"], owner)
    session.project_id = ask.project_id
    await server.in_thread(server.catalogue.set_project, session.session_id, ask.project_id)
    await server.durable.put(session.record)
    return reply({})


async def trace_export(server: Server, owner: str, request: HttpRequest) -> Response:
    """Say that there is no trace: none is recorded."""
    server.sessions.find(request.path_params["session_id"], owner)
    return reply({"status": "failed", "error": "Tickwork records no traces of sessions"})


async def telemetry(server: Server, owner: str, request: HttpRequest) -> Response:
    """Take telemetry and keep nothing of it."""
    await server.parse(bodies.Telemetry, request, None)
    return reply({"status": "accepted"})


async def healthz(server: Server, request: HttpRequest) -> Response:
    """Say that the server is up, which it is only once its models are loaded."""
    if server.durable.stuck:
        return reply({"status": "stuck", "detail": str(server.durable.failure)}, 503)
    return reply({"status": "stopping" if server.stopping.is_set() else "ok"})


async def who_am_i(server: Server, owner: str, request: HttpRequest) -> Response:
    """Describe the key in use."""
    name = owner or "local"
    details = {"org_details": {"name": "Tickwork"}, "user_details": {"email": name}}
    return reply({"key_id": 0, "name": name, "note": None, "details": details})


async def revoke_key(server: Server, owner: str, request: HttpRequest) -> Response:
    """Refuse to revoke a key: they are managed where the server is started."""
    raise HttpError(403, "keys are managed in the server's key file")


async def no_token(server: Server, owner: str, request: HttpRequest) -> Response:
    """Refuse to exchange a key for a token: the configuration says that there are none."""
    raise HttpError(404, "there are no tokens here: the API key is sent with each request")


async def audit(server: Server, owner: str, request: HttpRequest) -> Response:
    """Answer as for an empty account."""
    return reply({"entries": []})


async def billing(server: Server, owner: str, request: HttpRequest) -> Response:
    """Answer as for an empty account."""
    return reply({"data": [], "sessions": {}, "cost_data_through": datetime.now(UTC)})


async def storage(server: Server, owner: str, request: HttpRequest) -> Response:
    """Add up the owner's checkpoints."""
    found: list[Any] = await server.in_thread(lambda: server.catalogue.checkpoints(owner=owner))
    size = sum(checkpoint.size_bytes or 0 for checkpoint in found)
    item = {"checkpoint_count": len(found), "size_bytes": size, "size_gigabytes": size / 1e9}
    return reply({"data": [item] if found else []})
