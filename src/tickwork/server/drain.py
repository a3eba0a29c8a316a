"""Requests are read to their end before they are answered: a client that is still sending might not see the answer."""

from __future__ import annotations

from typing import Any

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Of a body that nobody wanted to read this much is read; a client that sends more sees its connection close.
MOST = 2**20
SECONDS = 5.0


def drained(app: ASGIApp) -> ASGIApp:
    """Return the application, with what it leaves unread of a request taken in before its answer goes out."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        body = _Body(receive)

        async def send_after(message: Message) -> None:
            if message["type"] == "http.response.start":
                await body.finish()
            await send(message)

        await app(scope, body.receive, send_after)

    return wrapped


class _Body:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._open = True

    async def receive(self) -> Any:
        message = await self._receive()
        self._open = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def finish(self) -> None:
        if not self._open:
            return
        size = 0
        with trio.move_on_after(SECONDS):
            while self._open and size <= MOST:
                size += len((await self.receive()).get("body", b""))
