"""Requests of HTTP/1.1 out of the bytes of a connection, by llhttp."""

from __future__ import annotations

from collections import deque

import attrs
import httptools

# Bytes after a request's head that bring neither a part of its body nor its end: sizes of chunks, trailers.
MOST_BETWEEN = 64 * 1024


@attrs.define(eq=False)
class Incoming:
    """One request, as far as it has been read; called back by the parser."""

    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = attrs.Factory(list)
    parts: deque[bytes] = attrs.Factory(deque)
    method: str = ""
    version: str = "1.1"
    keep_alive: bool = True
    complete: bool = False
    given: bool = False  # all of the body is with the application
    awaited: bool = False  # the client waits for "100 Continue" before it sends the body


class Parser:
    """Turns bytes into requests, in order; a client may have sent several. Its ``on_`` methods are called by llhttp."""

    def __init__(self) -> None:
        self.ready: deque[Incoming] = deque()
        self._now = Incoming()
        self._llhttp = httptools.HttpRequestParser(self)
        self._in_head = False
        self.unread_head = 0  # bytes of a head that is not whole yet
        self._between = 0

    def feed(self, data: bytes) -> None:
        """Take bytes in.

        Raises:
            httptools.HttpParserError: they are no HTTP.
        """
        self._between += len(data)
        try:
            self._llhttp.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._now.keep_alive = False  # answered as what it is, a request of HTTP/1.1
        self.unread_head = self.unread_head + len(data) if self._in_head else 0
        if not self._in_head and self._between > MOST_BETWEEN:
            raise httptools.HttpParserError("too much between the parts of a body")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._now, self._in_head = Incoming(), True

    def on_url(self, url: bytes) -> None:
        """A part of its target."""
        self._now.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers, whole; what comes after the body is not one."""
        if self._in_head:
            self._now.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Its head is whole: it can be answered."""
        now, self._in_head, self._between = self._now, False, 0
        now.method, now.version = self._llhttp.get_method().decode("ascii"), self._llhttp.get_http_version()
        now.keep_alive = self._llhttp.should_keep_alive()
        now.awaited = b"100-continue" in [value.lower() for name, value in now.headers if name == b"expect"]
        self.ready.append(now)

    def on_body(self, body: bytes) -> None:
        """A part of its body, chunks already undone."""
        self._between = 0
        self._now.parts.append(body)

    def on_message_complete(self) -> None:
        """It has ended."""
        self._between = 0
        self._now.complete = True
