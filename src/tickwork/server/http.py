"""HTTP/1.1 for one ASGI application: llhttp parses, and one Trio task serves a connection from first byte to last."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import httptools
import trio
from starlette.types import ASGIApp, Message

from tickwork.server.http_answer import WRITE_SECONDS, Answer, head_of
from tickwork.server.http_parser import Incoming, Parser
from tickwork.server.http_stream import Stream

log = logging.getLogger("tickwork.server")

# Bytes of a request's line and headers; bytes read at once; unread bytes taken in before the end.
MOST_HEAD, MOST_READ, MOST_LEFT = 64 * 1024, 64 * 1024, 2**20
# Seconds between two requests of a connection; for the next bytes to come; for the last bytes of all.
IDLE_SECONDS, READ_SECONDS, LINGER_SECONDS = 600.0, 60.0, 1.0
# Connections at once, unless told otherwise.
MOST_CONNECTIONS = 4096


class Connection:
    """One connection: its requests are answered one after the other.

    Args:
        app: the application.
        stream: the connection; closed at the end.
    """

    def __init__(self, app: ASGIApp, stream: Stream) -> None:
        self._app, self._stream = app, stream
        self._parser = Parser()
        self._ending = False
        self.idle_since: float | None = None  # while nothing is asked
        self._addresses = [_address(getattr(stream.socket, f"get{end}name")) for end in ("peer", "sock")]

    async def run(self) -> None:
        """Serve until either side ends it. Cancel: the connection is closed as it is."""
        async with self._stream:
            try:
                await self._run()
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                pass  # the client has gone, or sends too slowly to be served
            except Exception:  # one connection's error is its own
                log.exception("a connection failed")

    async def _run(self) -> None:
        try:
            while (incoming := await self._next()) is not None and await self._answer(incoming):
                pass
        except httptools.HttpParserError as error:
            await self._refuse(400, f"this is no HTTP/1.1: {error}")
        await self._linger()

    def end(self) -> None:
        """Close once the request under way, if any, is answered."""
        self._ending = True
        if self.idle_since is not None:
            self.idle_since = None
            self._stream.interrupt()

    async def turn_away(self) -> None:
        """Answer that there is no room, whatever is asked, and close."""
        async with self._stream:
            with trio.move_on_after(LINGER_SECONDS):
                try:
                    await self._refuse(503, "too many connections are open: try again", (b"retry-after", b"1"))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
            await self._linger()

    async def _next(self) -> Incoming | None:
        """Return the next request once its head is there; None at the end."""
        ready = self._parser.ready
        if not ready and not self._ending:
            self.idle_since = trio.current_time()
            with suppress(trio.ClosedResourceError):  # interrupted
                await self._read()
        self.idle_since = None
        if not ready and not await self._read_head():
            return None
        return ready.popleft()

    async def _read_head(self) -> bool:
        """Read the rest of a head that has begun; False if there is none to be had."""
        with trio.fail_after(READ_SECONDS):
            while not self._parser.ready and self._parser.unread_head:
                if self._parser.unread_head > MOST_HEAD:
                    await self._refuse(431, f"the headers are larger than {MOST_HEAD} bytes")
                    return False
                if not await self._read():
                    return False
        return bool(self._parser.ready)

    async def _read(self) -> bool:
        data = await self._stream.receive_some(MOST_READ)
        if data:
            self._parser.feed(data)
        return bool(data)

    async def _answer(self, incoming: Incoming) -> bool:
        """Answer a request; return whether the connection may be used again."""
        answer = Answer(self._stream, incoming, lambda: incoming.keep_alive and not self._ending)
        try:
            await self._app(self._scope(incoming), lambda: self._receive(incoming, answer), answer.send)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, httptools.HttpParserError):
            raise
        except Exception:
            log.exception("a request failed")
            return False
        return answer.end.is_set() and answer.reusable and incoming.complete

    def _scope(self, incoming: Incoming) -> dict[str, Any]:
        path, _, query = incoming.target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": incoming.version,
            "method": incoming.method,
            "scheme": "http",
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": incoming.headers,
            "client": self._addresses[0],
            "server": self._addresses[1],
        }

    async def _receive(self, incoming: Incoming, answer: Answer) -> Message:
        """Give the application the next part of the body, reading on only when it asks."""
        if incoming.given:
            await answer.end.wait()
            return {"type": "http.disconnect"}
        if incoming.awaited and not incoming.complete and not incoming.parts and not answer.begun:
            incoming.awaited = False
            await self._stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n", WRITE_SECONDS)
        while not incoming.parts and not incoming.complete:
            if not await self._read_on():
                return {"type": "http.disconnect"}
        body = incoming.parts.popleft() if incoming.parts else b""
        incoming.given = incoming.complete and not incoming.parts
        return {"type": "http.request", "body": body, "more_body": not incoming.given}

    async def _read_on(self) -> bool:
        """Read more of a body; False if there will be none: the client is gone, too slow, or sends no HTTP."""
        try:
            with trio.move_on_after(READ_SECONDS):
                return await self._read()
        except httptools.HttpParserError:
            pass
        return False

    async def _refuse(self, status: int, detail: str, *more: tuple[bytes, bytes]) -> None:
        body = b'{"detail":"%b"}' % detail.replace('"', "'").encode("ascii", "replace")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *more]
        await self._stream.send_all(head_of(status, headers, keep=False) + body, WRITE_SECONDS)

    async def _linger(self) -> None:
        """Say that this was all and take in what still comes: a client that is sending would not see its answer."""
        left = MOST_LEFT
        with trio.move_on_after(LINGER_SECONDS):
            self._stream.send_eof()
            while left > 0 and (data := await self._stream.receive_some(MOST_READ)):
                left -= len(data)


def _address(name: Any) -> tuple[str, int] | None:
    try:
        host, port = name()[:2]
    except OSError:
        return None
    return str(host), int(port)


async def serve_http(
    app: ASGIApp,
    listener: trio.SocketListener,
    done: trio.Event,
    seconds: float,
    most: int = MOST_CONNECTIONS,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an application until ``done``: then idle connections close at once, busy ones after their answer.

    Args:
        seconds: how long busy connections have at the end.
        most: connections at once; for one more the one that was idle for longest is closed, or, where none is idle, the
            new one is turned away.
        task_status: told once connections are taken.

    Room: any Trio task. Cancel: every connection is closed as it is.
    """
    living: set[Connection] = set()

    async def connected(stream: trio.SocketStream) -> None:
        connection = Connection(app, Stream(stream))
        if len(living) >= most and not _made_room(living):
            await connection.turn_away()
            return
        living.add(connection)
        try:
            await connection.run()
        finally:
            living.discard(connection)

    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as door:
            serve = trio.serve_listeners
            await door.start(lambda task_status: serve(connected, [listener], handler_nursery=connections, task_status=task_status))  # fmt: skip  # noqa: E501
            door.start_soon(_end_idle, living)
            task_status.started()
            await done.wait()
            door.cancel_scope.cancel("the server ends")
        for connection in list(living):
            connection.end()
        connections.cancel_scope.deadline = trio.current_time() + seconds


async def _end_idle(living: set[Connection]) -> None:
    """Close connections that have been idle for long: a clock for all costs less than a deadline for each request."""
    while True:
        await trio.sleep(IDLE_SECONDS / 10)
        now = trio.current_time()
        for connection in list(living):
            if connection.idle_since is not None and now - connection.idle_since >= IDLE_SECONDS:
                connection.end()


def _made_room(living: set[Connection]) -> bool:
    """Close the connection that was idle for longest; False if none is idle."""
    idle = [
        (connection.idle_since, id(connection), connection)
        for connection in living
        if connection.idle_since is not None
    ]
    if not idle:
        return False
    oldest = min(idle)[-1]
    living.discard(oldest)
    oldest.end()
    return True
