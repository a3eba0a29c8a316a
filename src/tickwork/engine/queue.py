"""``Queue``: what was accepted and has not been planned yet."""

from __future__ import annotations

from collections.abc import Callable

import trio

from tickwork.engine.request import Request
from tickwork.errors import ClosedError


class Queue:
    """Requests in order of arrival.

    Args:
        take: asked about each request first; True if it has taken care of it. Must not raise.

    Room: the engine's thread; ``post`` and ``close`` are called there by ``TrioToken.run_sync_soon``, whose
    callbacks must never raise.
    """

    def __init__(self, take: Callable[[Request], bool] = lambda _: False) -> None:
        self._take = take
        self.pending: list[Request] = []
        self.tokens = 0
        self.closed = False
        self._refusal: Exception = ClosedError("the engine is closing and takes no new requests")
        self._changed = trio.Event()

    def __repr__(self) -> str:
        return f"<Queue {len(self.pending)} requests, {self.tokens} tokens{', closed' if self.closed else ''}>"

    def post(self, request: Request) -> None:
        """Take a request in; a closed queue fails its future instead. Never raises."""
        if self.closed:
            request.future.set_error(self._refusal)
            return
        if self._take(request):
            return
        request.received = trio.current_time()
        self.pending.append(request)
        self.tokens += request.tokens
        self._wake()

    def close(self, error: Exception | None = None) -> None:
        """Take nothing more, and tell later requests ``error``; what is pending stays to be drained. Never raises."""
        self.closed = True
        self._refusal = error or self._refusal
        self._wake()

    def drain(self) -> list[Request]:
        """Hand over everything pending, in order of arrival."""
        taken, self.pending, self.tokens = self.pending, [], 0
        return taken

    async def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()`` is true, asking again after each change. Cancel: safe at any time."""
        while not ready():
            await self.change()

    async def change(self) -> None:
        """Wait for the next arrival, or the end. Cancel: safe at any time."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
