"""What all tests share: the Hypothesis profile, and the ``callers`` fixture that runs a client test three ways."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
import trio
from hypothesis import settings

# No test asks the hub for anything; the official SDK would, for minutes, where a name is no folder.
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("tickwork", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tickwork")

# Triton's interpreter is switched on before the first kernel is imported: its tests have a process of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]

# Seconds after which a wait that should have ended is a failure. Never spent by a test that passes.
GUARD = 60.0


class Ask:
    """What a script is given: one way to call clients, whatever the script runs under.

    ``await ask(client.optim_step, params)`` is the result. In a plain thread it is that of
    ``client.optim_step(params).result()``, under asyncio and Trio of ``await (await client.optim_step_async(params))``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a client's method, or its ``_async`` twin, and wait for the result."""
        return await self.wait(await self.submit(method, *args, **kwargs))

    async def submit(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a client's method, or its ``_async`` twin, and return what that returns: mostly a future."""
        if self.kind == "sync":
            return method(*args, **kwargs)
        twin = getattr(method.__self__, f"{method.__name__}_async")  # type: ignore[attr-defined]
        return await twin(*args, **kwargs)

    async def wait(self, pending: Any, timeout: float = GUARD) -> Any:
        """Wait for a future, or for a client that is getting ready; what is neither is the result already."""
        if not hasattr(pending, "result_async"):
            return pending
        if self.kind == "sync":
            return pending.result(timeout)
        return await pending.result_async(timeout)


class Caller:
    """Runs scripts, each an ``async def script(ask)``, in a plain thread, under asyncio or under Trio."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<Caller {self.kind}>"

    def run(self, script: Callable[[Ask], Coroutine[Any, Any, Any]]) -> Any:
        """Run the script to its end and return what it returns."""
        return {"sync": _run_sync, "asyncio": _run_asyncio, "trio": _run_trio}[self.kind](script(Ask(self.kind)))


@pytest.fixture(params=["sync", "asyncio", "trio"])
def callers(request: pytest.FixtureRequest) -> Caller:
    """The test runs once for each way to call: from a plain thread, from asyncio, from Trio."""
    return Caller(request.param)


def _run_sync(script: Coroutine[Any, Any, Any]) -> Any:
    try:
        script.send(None)
    except StopIteration as end:
        return end.value
    script.close()
    raise AssertionError("a script under 'sync' awaited something else than its ask")


def _run_asyncio(script: Awaitable[Any]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(GUARD):
            return await script

    return asyncio.run(main())


def _run_trio(script: Awaitable[Any]) -> Any:
    async def main() -> Any:
        with trio.fail_after(GUARD):
            return await script

    return trio.run(main)


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the shipped model for as long as the tests run, to whoever comes."""
    from tickwork.server import Settings, serving

    with serving(Settings(models=("tickwork/tiny",), store=tmp_path_factory.mktemp("store"), port=0)) as url:
        yield url
