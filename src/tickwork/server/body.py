"""Request bodies: read within bounds, decompressed within bounds, decoded off the engine's loop."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import orjson
import trio
import zstandard
from starlette.requests import Request

from tickwork.server.answers import HttpError
from tickwork.server.settings import Settings

T = TypeVar("T")

# Bodies up to this size are decoded where they arrive: handing them to a thread would take longer.
SMALL = 16 * 1024
# Of a body that is too large this much is kept, to tell which request it was.
HEAD = 4096
DRAIN_SECONDS = 20.0
# Bytes that are decompressed at once.
STEP = 2**20
# Bytes of a body that holds no data. Of any JSON body: its values, its lists and objects, its fields. Each becomes an
# object of up to a hundred times its bytes, so they are counted before it is parsed.
MOST_PLAIN = 2**20
MOST_VALUES, MOST_CONTAINERS, MOST_FIELDS = 2**21, 2**17, 2**16


class Bodies:
    """Bytes of all bodies that are being read and answered.

    Args:
        limit: past it, further ones are refused for a while; a single one always has room.

    Room: any thread.
    """

    def __init__(self, limit: int) -> None:
        self.held = 0
        self._limit = limit
        self._lock = threading.Lock()

    @contextmanager
    def of(self, request: Request) -> Iterator[None]:
        """Let a request hold bytes, until it is answered."""
        taken = request.state.taken = Taken(self)
        try:
            yield
        finally:
            self.change(-taken.size)

    def change(self, size: int, *, alone: bool = True) -> bool:
        """Hold more or less; False if there is no room for more."""
        with self._lock:
            if not alone and size > 0 and self.held + size > self._limit:
                return False
            self.held += size
            return True


class Taken:
    """What one request holds of them."""

    def __init__(self, bodies: Bodies) -> None:
        self.size = 0
        self._bodies = bodies

    def take(self, size: int) -> None:
        """Hold more.

        Raises:
            HttpError: 429.
        """
        if not self._bodies.change(size, alone=self._bodies.held == self.size):
            raise HttpError(429, "too much is being sent to this server at once", {"retry-after": "1"})
        self.size += size


class TooLargeError(HttpError):
    """A body past its bound; ``head`` is how it begins, decompressed."""

    def __init__(self, limit: int, what: str, head: bytes) -> None:
        super().__init__(413, f"the body is larger than {limit} bytes{what}: send less data in one request")
        self.head = head


async def read(request: Request, settings: Settings, most: int | None = None) -> bytes:
    """Return a request's body, decompressed.

    Args:
        most: bytes of one that holds no data; None for one that does.

    Raises:
        HttpError: too large, an unknown content encoding, or damaged.
    """
    taken: Taken = request.state.taken
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "zstd"):
        raise HttpError(415, f"content-encoding {encoding!r} is not taken; 'zstd' or none is")
    sent = await _read(request, _least(settings.max_body, most), encoding, taken)
    if encoding == "identity":
        return sent
    return await off_loop(len(sent), lambda: _decompress(sent, _least(settings.max_decompressed, most), taken))


def _least(limit: int, most: int | None) -> int:
    return limit if most is None else min(limit, most)


def json_of(body: bytes) -> object:
    """Parse JSON.

    Raises:
        HttpError: it is none, or holds too many values.
    """
    for marks, most, what in (
        (b",", MOST_VALUES, "values"),
        (b"[{", MOST_CONTAINERS, "lists and objects"),
        (b":", MOST_FIELDS, "fields"),
    ):
        if sum(body.count(mark) for mark in marks) > most:
            raise HttpError(413, f"the body holds more than {most} {what}: send less data in one request")
    try:
        return orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None


async def off_loop(size: int, act: Callable[[], T]) -> T:
    """Run a decoder or encoder of ``size`` bytes in a worker thread, or at once if they are few."""
    if size <= SMALL:
        return act()
    return await trio.to_thread.run_sync(act)


async def _read(request: Request, limit: int, encoding: str, taken: Taken) -> bytes:
    # Not by Starlette's stream: a generator costs as much as the rest of a small request's reading.
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= limit:
        part, more = await _part(request)
        size += len(part)
        if size <= limit:
            taken.take(len(part))
            parts.append(part)
    if size <= limit:
        return b"".join(parts)
    # A client that is still sending would see a broken connection instead of the answer.
    with trio.move_on_after(DRAIN_SECONDS):
        while more:
            _, more = await _part(request)
    head = b"".join(parts)[:HEAD]
    raise TooLargeError(limit, "", _head(head) if encoding == "zstd" else head)


async def _part(request: Request) -> tuple[bytes, bool]:
    """Return the next part of a body, and whether there is more of it."""
    message = await request.receive()
    if message["type"] != "http.request":
        raise HttpError(400, "the connection ended within the body")
    return message.get("body", b""), message.get("more_body", False)


def _decompress(body: bytes, limit: int, taken: Taken) -> bytes:
    """Decompress zstd frames, never past the limit, whatever size they announce."""
    plain = bytearray()
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body), read_across_frames=True) as stream:
            while part := stream.read(STEP):
                taken.take(len(part))
                plain += part
                if len(plain) > limit:
                    raise TooLargeError(limit, " decompressed", bytes(plain[:HEAD]))
    except zstandard.ZstdError as error:
        raise HttpError(400, f"the body is not zstd: {error}") from None
    return bytes(plain)


def _head(body: bytes) -> bytes:
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body)) as stream:
            return bytes(stream.read(HEAD))
    except zstandard.ZstdError:
        return b""
