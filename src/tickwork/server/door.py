"""``Door``: the server's way into the engine."""

from __future__ import annotations

from collections import deque

import trio

from tickwork.engine.portal import Portal
from tickwork.engine.request import Request
from tickwork.errors import QueueFullError, TickworkError
from tickwork.futures import Future
from tickwork.server.promises import Promise


class Door:
    """Posts requests to the engine in the order they are given, and holds them back while it is full.

    Room: the engine's thread.
    """

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._waiting: deque[tuple[Request, Promise]] = deque()
        self._changed = trio.Event()

    def post(self, request: Request, promise: Promise) -> None:
        """Post a request; its promise follows it."""
        if not self._waiting and self._posted(request, promise):
            return
        self._waiting.append((request, promise))
        self._changed.set()

    def forget(self, request: Request) -> None:
        """Post a clean-up past all bounds."""
        self._portal.post_here(request)

    async def submit(self, request: Request) -> Future[object]:
        """Post a request that was promised to nobody, waiting for room."""
        return await self._portal.submit_async(request, self._portal.post_here)

    async def run(self) -> None:
        """Post what was held back, as the engine gets room."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while self._waiting:
                request, promise = self._waiting[0]
                try:
                    promise.follow(await self.submit(request))
                except TickworkError as error:
                    promise.fail(error)
                self._waiting.popleft()

    def _posted(self, request: Request, promise: Promise) -> bool:
        try:
            promise.follow(self._portal.submit(request, self._portal.post_here))
        except QueueFullError:
            return False
        except TickworkError as error:
            promise.fail(error)
        return True
