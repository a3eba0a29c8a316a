"""``Answer``: what the application sends, as bytes of HTTP/1.1."""

from __future__ import annotations

from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import trio
from starlette.types import Message

from tickwork.server.http_parser import Incoming
from tickwork.server.http_stream import Stream

# Bytes written at once, and seconds for the client to take them.
MOST_WRITTEN, WRITE_SECONDS = 2**20, 60.0
NO_BODY = (204, 304)


class Answer:
    """What the application sends, written as HTTP: head and body in one write wherever both are there."""

    def __init__(self, stream: Stream, incoming: Incoming, may_keep: Any) -> None:
        self._stream, self._incoming, self._may_keep = stream, incoming, may_keep
        self._start: Message = {}
        self._chunked = False
        self.end = trio.Event()
        self.begun, self.reusable = False, True

    async def send(self, message: Message) -> None:
        """Take a message of the application."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        head = b"" if self.begun else self._head(len(body), more)
        self.begun = True
        if self._incoming.method == "HEAD" or self._start["status"] in NO_BODY:
            body = b""
        elif self._chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        await _write(self._stream, head + body)
        if not more:
            self.end.set()

    def _head(self, size: int, more: bool) -> bytes:
        headers = list(self._start.get("headers", ()))
        self.reusable = self._may_keep()
        if not any(name == b"content-length" for name, _ in headers) and self._start["status"] not in NO_BODY:
            if not more:
                headers.append((b"content-length", b"%d" % size))
            elif self._incoming.version == "1.1":
                self._chunked = True
                headers.append((b"transfer-encoding", b"chunked"))
            else:
                self.reusable = False
        return head_of(self._start["status"], headers, keep=self.reusable)


def head_of(status: int, headers: Iterable[tuple[bytes, bytes]], *, keep: bool) -> bytes:
    """Return status line and headers.

    Args:
        keep: whether the connection may be used again.

    Raises:
        ValueError: a header holds a line break.
    """
    lines = [b"HTTP/1.1 %d %b" % (status, _phrase(status)), *(b"%b: %b" % header for header in headers)]
    lines += [b"date: %b" % _date(int(trio.current_time())), b"connection: %b" % (b"keep-alive" if keep else b"close")]
    head = b"\r\n".join([*lines, b"", b""])
    if not head.count(b"\r") == head.count(b"\n") == len(lines) + 1:
        raise ValueError("a header holds a line break")
    return head


async def _write(stream: Stream, data: bytes) -> None:
    """Write in parts, each of which the client must take in time."""
    for start in range(0, len(data), MOST_WRITTEN):
        await stream.send_all(memoryview(data)[start : start + MOST_WRITTEN], WRITE_SECONDS)


@lru_cache
def _phrase(status: int) -> bytes:
    return HTTPStatus(status).phrase.encode()


@lru_cache(maxsize=2)
def _date(second: int) -> bytes:
    """The date, computed once a second."""
    return formatdate(usegmt=True).encode()
