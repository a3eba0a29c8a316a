"""The ASGI application: every route, who may use it, and what an error looks like."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tickwork.server import routes_catalogue as catalogue
from tickwork.server import routes_futures as futures
from tickwork.server import routes_models as models
from tickwork.server import routes_sampling as sampling
from tickwork.server import routes_search as search
from tickwork.server import routes_session as session
from tickwork.server import routes_training as training
from tickwork.server.answers import HttpError, refusal
from tickwork.server.drain import drained
from tickwork.server.metrics import metrics
from tickwork.server.numbered import Act
from tickwork.server.server import Server

log = logging.getLogger("tickwork.server")

# What a client on this machine calls a server that listens on loopback.
THIS_MACHINE = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)

Endpoint = Callable[[HttpRequest], Awaitable[Response]]
Open = Callable[[Server, HttpRequest], Awaitable[Response]]

CHECKPOINT = "training_runs/{run_id}/checkpoints/{kind}/{name}"

ROUTES: tuple[tuple[str, str, Act], ...] = (
    ("POST", "retrieve_future", futures.retrieve_future),
    ("POST", "retrieve_futures", futures.retrieve_futures),
    ("POST", "session_heartbeat", session.heartbeat),
    ("POST", "asample", sampling.sample),
    ("POST", "forward_backward", training.forward_backward),
    ("POST", "optim_step", training.optim_step),
    ("POST", "client/config", session.client_config),
    ("POST", "client/dynamic_config", session.dynamic_config),
    ("POST", "auth/token", session.no_token),
    ("GET", "auth/apikey/me", session.who_am_i),
    ("DELETE", "auth/apikey/me", session.revoke_key),
    ("GET", "get_server_capabilities", session.capabilities),
    ("POST", "create_session", session.create_session),
    ("POST", "sessions/search", search.search_sessions),
    ("POST", "sessions/{session_id}/finish", session.finish_session),
    ("GET", "sessions", session.list_sessions),
    ("GET", "sessions/{session_id}", session.get_session),
    ("PUT", "sessions/{session_id}/project", session.assign_project),
    ("GET", "sessions/{session_id}/trace_export", session.trace_export),
    ("POST", "telemetry", session.telemetry),
    ("GET", "audit", session.audit),
    ("GET", "billing/usage/events", session.billing),
    ("GET", "billing/usage/checkpoints/current", session.storage),
    ("POST", "create_model", models.create_model),
    ("POST", "unload_model", models.unload_model),
    ("POST", "get_info", models.get_info),
    ("POST", "forward", training.forward),
    ("POST", "save_weights", models.save_weights),
    ("POST", "save_weights_external", models.save_weights_external),
    ("POST", "save_weights_for_sampler", sampling.save_weights_for_sampler),
    ("POST", "load_weights", models.load_weights),
    ("POST", "create_custom_loss", training.create_custom_loss),
    ("POST", "create_sampling_session", sampling.create_sampling_session),
    ("POST", "join_sampling_session", sampling.join_sampling_session),
    ("GET", "samplers/{sampler_id}", sampling.get_sampler),
    ("POST", "cancel_future", futures.cancel_future),
    ("POST", "weights_info", catalogue.weights_info),
    ("POST", "copy_weights", catalogue.copy_weights),
    ("GET", "training_runs", catalogue.list_runs),
    ("GET", "training_runs/{run_id}", catalogue.get_run),
    ("GET", "training_runs/{run_id}/checkpoints", catalogue.list_checkpoints),
    (
        "GET",
        "training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls",
        catalogue.external_urls,
    ),
    ("GET", "checkpoints", catalogue.list_all_checkpoints),
    ("DELETE", CHECKPOINT, catalogue.delete_checkpoint),
    ("POST", f"{CHECKPOINT}/publish", catalogue.publish),
    ("DELETE", f"{CHECKPOINT}/publish", catalogue.unpublish),
    ("PUT", f"{CHECKPOINT}/ttl", catalogue.set_ttl),
)

# These need no key; a download's link is one.
OPEN_ROUTES: tuple[tuple[str, Open], ...] = (
    ("api/v1/healthz", session.healthz),
    ("api/v1/downloads/{until:int}/{signature}/{run_id}/{name}/{file}", catalogue.download),
)


def make_app(server: Server) -> ASGIApp:
    """Return the application of a server."""
    found = {(method, f"/api/v1/{path}"): _endpoint(server, path, act) for method, path, act in ROUTES}
    routes = [Route(path, endpoint, methods=[method]) for (method, path), endpoint in found.items()]
    routes += [Route(f"/{path}", _open(server, path, act)) for path, act in OPEN_ROUTES]
    routes.append(Route("/metrics", _endpoint(server, "metrics", metrics, bearer=True)))
    rest = Starlette(routes=routes, exception_handlers={HTTPException: _not_found(server)})
    return drained(_direct({key: endpoint for key, endpoint in found.items() if "{" not in key[1]}, rest))


def _direct(endpoints: Mapping[tuple[str, str], Endpoint], rest: ASGIApp) -> ASGIApp:
    """Return an application that finds an endpoint by its whole path, and leaves all other requests to ``rest``.

    An endpoint answers its errors itself, so that of Starlette's layers none is needed around it: they take as long as
    the reading of a small request.
    """

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await rest(scope, receive, send)
            return
        response = await endpoint(HttpRequest(scope, receive, send))
        await response(scope, receive, send)

    return wrapped


def _endpoint(server: Server, route: str, act: Act, *, bearer: bool = False) -> Endpoint:
    async def endpoint(request: HttpRequest) -> Response:
        return await _answered(server, route, request, _let_in(server, act, request, bearer=bearer))

    return endpoint


def _open(server: Server, route: str, act: Open) -> Endpoint:
    async def endpoint(request: HttpRequest) -> Response:
        return await _answered(server, route, request, act(server, request))

    return endpoint


async def _let_in(server: Server, act: Act, request: HttpRequest, *, bearer: bool) -> Response:
    key = request.headers.get("x-api-key")
    if key is None and bearer:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
    owner = server.settings.keys.owner(key)
    if owner is None:
        raise HttpError(401, "the API key is unknown: send one of this server's in X-API-Key")
    if server.settings.keys.open:
        _check_local(request)
    with server.counted(owner), server.bodies.of(request):
        return await act(server, owner, request)


def _check_local(request: HttpRequest) -> None:
    """Refuse what a page in a browser of this machine may send to a server that asks for no key.

    Raises:
        HttpError: 403.
    """
    host = request.headers.get("host", "localhost")
    if "origin" in request.headers or not THIS_MACHINE.fullmatch(host):
        raise HttpError(
            403, f"without API keys only programs on this machine are served, not web pages, nor as {host!r}"
        )


async def _answered(server: Server, route: str, request: HttpRequest, answer: Awaitable[Response]) -> Response:
    try:
        response = await answer
    except Exception as error:
        response = refusal(error)
        if response.status_code == 500:
            error_id = secrets.token_hex(8)
            response = refusal(error, error_id)
            told = {"error_id": error_id, "route": route}
            log.exception("a request failed: %s %s, error %s", request.method, route, error_id, extra=told)
    server.metrics.answered(request.method, route, response.status_code)
    return response


def _not_found(server: Server) -> Callable[[HttpRequest, Exception], Awaitable[Response]]:
    async def answer(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: f"there is no {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
        server.metrics.answered("other", "other", error.status_code)
        return refusal(HttpError(error.status_code, what.get(error.status_code, error.detail), error.headers))

    return answer
