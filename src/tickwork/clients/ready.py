"""``Ready``: a client that can be used at once and also awaited until it is really there."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Self

from tickwork.clients.host import Door
from tickwork.futures import Future


class Ready:
    """Base of the clients that ``create_*`` returns, so that scripts of all SDK generations work.

    They write ``client = create()``, ``client = create().result()`` or ``client = await create()``.
    """

    def __init__(self, door: Door, ready: Future[Any]) -> None:
        self._door = door
        self._ready = ready

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.result_async().__await__()

    def result(self, timeout: float | None = None) -> Self:
        """Block until it is there; errors as for ``Future.result``, among them what creating it failed of."""
        self._ready.result(timeout)
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        """Wait until it is there, under Trio or asyncio."""
        await self._ready.result_async(timeout)
        return self
