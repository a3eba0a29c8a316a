"""A whole server in virtual time: the real routes and maps over an engine whose device is a clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio

from served import KEY, TINY
from tickwork.catalogue import Catalogue
from tickwork.engine.plan import Stage
from tickwork.engine.request import Outcome, Request
from tickwork.requests import OptimStep
from tickwork.results import ForwardBackwardOutput, OptimStepResponse, SampleResponse
from tickwork.server import Settings
from tickwork.server.app import make_app
from tickwork.server.durable import Durable
from tickwork.server.lanes import Door
from tickwork.server.server import Server
from tickwork.testing import FakeExecutor, open_engine


class Device(FakeExecutor):
    """Answers each request with an empty result of its kind, and remembers nothing."""

    async def run(self, stage: Stage, cycle: int) -> list[Outcome]:
        outcomes = await super().run(stage, cycle)
        self.ran.clear()
        return outcomes

    def _outcome(self, request: Request) -> Outcome:
        outcome = super()._outcome(request)
        empty = {"pass": ForwardBackwardOutput("ArrayRecord", [], {}), "sample": SampleResponse([])}
        if isinstance(request.payload, OptimStep):
            return Outcome(request, value=OptimStepResponse({}))
        return Outcome(request, value=empty[request.kind]) if request.kind in empty else outcome


class Client(httpx.AsyncClient):
    """Plain requests to a server of this process."""

    def __init__(self, server: Server, key: str | None = KEY) -> None:
        headers = {} if key is None else {"X-API-Key": key}
        transport = httpx.ASGITransport(make_app(server))
        super().__init__(transport=transport, base_url="http://localhost:8000/api/v1/", headers=headers)

    async def ok(self, path: str, body: object) -> dict[str, Any]:
        """Post JSON that must be taken."""
        answer = await self.post(path, json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def session(self) -> str:
        """Open a session."""
        return str((await self.ok("create_session", {"tags": []}))["session_id"])

    async def model(self, session: str, number: int = 0) -> str:
        """Ask for a training model."""
        ask = {"session_id": session, "model_seq_id": number, "base_model": TINY}
        return str((await self.ok("create_model", ask))["model_id"])

    async def optim(self, model_id: str, seq_id: int) -> httpx.Response:
        """Ask for a step."""
        return await self.post("optim_step", json={"model_id": model_id, "seq_id": seq_id, "adam_params": {}})


@asynccontextmanager
async def fake_server(executor: FakeExecutor | None = None, **given: Any) -> AsyncIterator[Server]:
    """Run a server without a socket; nothing it is asked for is computed."""
    settings = Settings(models=(TINY,), **given)
    catalogue = Catalogue(settings.store)
    try:
        async with open_engine(executor or Device()) as (engine, portal), trio.open_nursery() as nursery:
            server = Server(settings, Door(portal), catalogue, engine, Durable(None))
            nursery.start_soon(server.door.run)
            nursery.start_soon(server.sweep)
            yield server
            nursery.cancel_scope.cancel("the test is over")
    finally:
        catalogue.close()
