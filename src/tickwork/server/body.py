"""Request bodies: read within bounds, decompressed within bounds, decoded off the engine's loop."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import orjson
import trio
import zstandard
from starlette.requests import ClientDisconnect, Request

from tickwork.server.answers import HttpError
from tickwork.server.settings import Settings

T = TypeVar("T")

# Bodies up to this size are decoded where they arrive: handing them to a thread would take longer.
SMALL = 16 * 1024
# Of a body that is too large this much is kept, to tell which request it was.
HEAD = 4096
DRAIN_SECONDS = 20.0


class TooLargeError(HttpError):
    """A body past its bound; ``head`` is how it begins, decompressed."""

    def __init__(self, limit: int, what: str, head: bytes) -> None:
        super().__init__(413, f"the body is larger than {limit} bytes{what}: send less data in one request")
        self.head = head


async def read(request: Request, settings: Settings) -> bytes:
    """Return a request's body, decompressed.

    Raises:
        HttpError: too large, an unknown content encoding, or damaged.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "zstd"):
        raise HttpError(415, f"content-encoding {encoding!r} is not taken; 'zstd' or none is")
    sent = await _read(request, settings.max_body, encoding)
    if encoding == "identity":
        return sent
    return await off_loop(len(sent), lambda: _decompress(sent, settings.max_decompressed))


def json_of(body: bytes) -> object:
    """Parse JSON.

    Raises:
        HttpError: it is none.
    """
    try:
        return orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None


async def off_loop(size: int, act: Callable[[], T]) -> T:
    """Run a decoder or encoder of ``size`` bytes in a worker thread, or at once if they are few."""
    if size <= SMALL:
        return act()
    return await trio.to_thread.run_sync(act)


async def _read(request: Request, limit: int, encoding: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    with trio.move_on_after(float("inf")) as patience:
        try:
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif patience.deadline == float("inf"):
                    # A client that is still sending would see a broken connection instead of the answer.
                    patience.deadline = trio.current_time() + DRAIN_SECONDS
        except ClientDisconnect:
            raise HttpError(400, "the connection ended within the body") from None
    if size > limit:
        head = b"".join(parts)[:HEAD]
        raise TooLargeError(limit, "", _head(head) if encoding == "zstd" else head)
    return b"".join(parts)


def _decompress(body: bytes, limit: int) -> bytes:
    """Decompress one zstd frame, never past the limit, whatever size it announces."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body), read_across_frames=True) as stream:
            plain = bytes(stream.read(limit + 1))
    except zstandard.ZstdError as error:
        raise HttpError(400, f"the body is not zstd: {error}") from None
    if len(plain) > limit:
        raise TooLargeError(limit, " decompressed", plain[:HEAD])
    return plain


def _head(body: bytes) -> bytes:
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body)) as stream:
            return bytes(stream.read(HEAD))
    except zstandard.ZstdError:
        return b""
