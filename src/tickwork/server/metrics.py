"""``GET /metrics``: what a server counts, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

if TYPE_CHECKING:
    from tickwork.server.server import Server


class Metrics:
    """Counts answers as they are given, and asks a server for the rest when it is asked itself.

    No label holds what a client chose: routes are their templates, and there is none for owners, sessions or models.
    """

    def __init__(self, server: Server) -> None:
        self._registry = CollectorRegistry()
        what = "Answers given, by method, route and status."
        answers = Counter("tickwork_http_requests", what, ["method", "route", "status"], registry=self._registry)
        self._answers = cache(answers.labels)  # finding one takes longer than counting
        self._registry.register(_State(server))
        ProcessCollector(registry=self._registry)

    def answered(self, method: str, route: str, status: int) -> None:
        """Count an answer."""
        self._answers(method, route, str(status)).inc()

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self._registry)


class _State(Collector):
    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        yield from self._engine()
        yield from self._held()

    def _engine(self) -> Iterator[Metric]:
        found = self._server.engine.statistics()
        for name, value, what in (
            ("cycles", found.cycles, "Windows closed."),
            ("passes", found.passes, "Passes run."),
            ("tokens", found.tokens, "Tokens of those passes."),
            ("requests", found.requests, "Requests settled."),
            ("busy_seconds", found.busy, "Seconds that the device was at work."),
        ):
            yield CounterMetricFamily(f"tickwork_engine_{name}", what, value)
        for name, value, what in (
            ("uptime_seconds", found.uptime, "Seconds since the engine started."),
            ("queued", found.queued, "Requests accepted of which not all was run."),
            ("credits", found.credits, "Weight of what is inside the engine."),
            ("credit_limit", found.credit_limit, "The most of it."),
            ("waiting", found.waiting, "Requests in front of the engine's door."),
            ("lanes", len(found.lanes), "Training models that ran a pass and are held."),
        ):
            yield GaugeMetricFamily(f"tickwork_engine_{name}", what, value)

    def _held(self) -> Iterator[Metric]:
        server = self._server
        for name, value, what in (
            ("promises", len(server.promises), "Requests whose result is awaited or kept."),
            ("promises_pending", server.promises.pending, "Of these, the ones that are not done."),
            ("promises_unfetched", len(server.promises.unfetched), "Of these, the ones that nobody has fetched."),
            ("sessions_kept", len(server.sessions), "Sessions, ended ones included."),
            ("body_bytes", server.bodies.held, "Bytes of bodies that are being read and answered."),
            ("requests_under_way", sum(server.under_way.values()), "HTTP requests that are not answered yet."),
        ):
            yield GaugeMetricFamily(f"tickwork_{name}", what, value)
        for name, value in server.sessions.held().items():
            yield GaugeMetricFamily(f"tickwork_{name}", f"Open {name}.", value)


async def metrics(server: Server, owner: str, request: HttpRequest) -> Response:
    """Answer with all of it."""
    return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)
