"""``open_service``: a service whose engine runs in the caller's own nursery."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tickwork.clients.host import Host
from tickwork.clients.service import DTypeName, Metadata, Path, ServiceClient


@asynccontextmanager
async def open_service(
    user_metadata: Metadata = None,
    *,
    store: Path | None = None,
    device: str | None = None,
    dtype: DTypeName | None = None,
    cycle_period: float = 0.0,
    max_tokens_per_pass: int | None = None,
) -> AsyncIterator[ServiceClient]:
    """Run a service in a nursery of the calling Trio task; arguments as for ``ServiceClient``.

    Leaving normally drains what was accepted. An error in the body, or the engine's death, cancels the other.
    """
    service = ServiceClient(user_metadata, store=store, device=device, dtype=dtype, cycle_period=cycle_period, max_tokens_per_pass=max_tokens_per_pass)  # fmt: skip  # noqa: E501
    async with hosted(service.host):
        yield service


@asynccontextmanager
async def hosted(host: Host) -> AsyncIterator[None]:
    """Run a host's engine in a nursery of the calling Trio task."""
    async with trio.open_nursery() as nursery:
        portal = await nursery.start(host.engine.run)
        host.attach(portal)
        try:
            yield
        except BaseException:
            nursery.cancel_scope.cancel("the body of open_service failed")
            raise
        portal.close()
    host.close()
