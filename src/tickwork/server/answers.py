"""What goes back: JSON, protobuf, and errors that say what to do and leak nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from tickwork.errors import (
    CheckpointError,
    ClosedError,
    InvalidRequestError,
    JournalError,
    ModelLoadError,
    TickworkError,
)
from tickwork.results import as_json

PROTOBUF = "application/x-protobuf"


class HttpError(Exception):
    """An answer other than 200.

    Args:
        status: the HTTP status.
        detail: what is wrong and what to do.
        headers: further headers, ``retry-after`` for example.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer in JSON."""
    return Response(orjson.dumps(as_json(value)), status, headers, "application/json")


def refusal(error: Exception, error_id: str = "") -> Response:
    """Answer for an error: its own status where it has one, 500 without a word about the inside otherwise.

    Args:
        error_id: what the log calls it, told with a 500.
    """
    if isinstance(error, HttpError):
        return reply({"detail": error.detail}, error.status, error.headers)
    if isinstance(error, CheckpointError):
        return reply({"detail": str(error), "category": error.category}, 404)
    if isinstance(error, InvalidRequestError | ModelLoadError):
        return reply({"detail": str(error), "category": error.category}, 422)
    if isinstance(error, JournalError):
        return reply({"detail": str(error), "category": error.category}, 503, {"retry-after": "5"})
    if isinstance(error, ClosedError):
        return stopping()
    what = str(error) if isinstance(error, TickworkError) else "an error inside the server; its log says more"
    return reply({"detail": what, "category": "server", "error_id": error_id}, 500)


def stopping() -> Response:
    """Answer to new work while the server ends."""
    return reply({"detail": "the server is stopping"}, 503, {"retry-after": "5"})


def unknown(what: str, name: object) -> HttpError:
    """Make the error for an id that is not there, or not this key's: the two are not told apart."""
    return HttpError(404, f"there is no {what} {name!r}")
