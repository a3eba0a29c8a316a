"""``open_service``: a service whose engine runs in the caller's own nursery."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from tickwork.clients.host import Host
from tickwork.clients.resuming import Durability
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
    merge: bool = True,
    invariant: bool = False,
    checkpoint_activations: bool = False,
    adapter_memory: int | None = None,
    journal: Durability | None = None,
) -> AsyncIterator[ServiceClient]:
    """Run a service in a nursery of the calling Trio task; arguments as for ``ServiceClient``.

    Leaving normally drains what was accepted. An error in the body cancels the engine, and the engine's death the
    body; either leaves as it is, not in an ExceptionGroup.
    """
    make = partial(
        ServiceClient,
        user_metadata,
        store=store,
        device=device,
        dtype=dtype,
        cycle_period=cycle_period,
        max_tokens_per_pass=max_tokens_per_pass,
        merge=merge,
        invariant=invariant,
        checkpoint_activations=checkpoint_activations,
        adapter_memory=adapter_memory,
        journal=journal,
    )
    service = await trio.to_thread.run_sync(make)  # it reads the store
    async with hosted(service.host):
        yield service


@asynccontextmanager
async def hosted(host: Host) -> AsyncIterator[None]:
    """Run a host's engine in a nursery of the calling Trio task."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            host.attach(await nursery.start(host.engine.run))
            try:
                yield
            except trio.Cancelled:
                raise
            except BaseException as error:
                failure = error  # to leave as it is, without an ExceptionGroup around it
                nursery.cancel_scope.cancel("the body of open_service failed")
            else:
                await host.drain()
                host.portal.close()
    except BaseExceptionGroup as group:
        raise (group.exceptions[0] if len(group.exceptions) == 1 else group) from None
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(partial(host.close, abort=True))
    if failure is not None:
        raise failure
