"""Every error Tickwork raises.

::

    TickworkError
    ├── ClosedError             the service was closed before the call
    ├── QueueFullError          the queue is full and the caller must not block
    ├── WrongThreadError        .result() on a thread that has to keep running for it
    └── RequestFailedError      a request that completed as failed: see .category
        ├── InvalidRequestError     an argument is wrong: see .field and .datum  (also a ValueError)
        ├── LossError               a custom loss raised, or returned what is not a loss
        ├── CheckpointError         a checkpoint is unknown, expired, foreign, damaged or in the way
        ├── ModelLoadError          a base model is unknown, unreadable or of a kind that does not pack
        ├── CapacityError           one request alone does not fit on the device
        ├── DivergedError           a sampler's logits are not finite
        ├── RequestCancelledError   a sampling request that its owner cancelled
        ├── JournalError            the journal is locked, damaged, of another version, or its disk is full: see .lane
        └── EngineStoppedError      the engine died or was aborted before the request ran
"""

from __future__ import annotations

import copy
from enum import StrEnum


class RequestErrorCategory(StrEnum):
    """Who can mend a failed request: the caller (``user``) or the host (``server``)."""

    UNKNOWN = "unknown"
    SERVER = "server"
    USER = "user"


class TickworkError(Exception):
    """The root of the tree."""


class ClosedError(TickworkError):
    """The service was closed before the call. Not raised for requests accepted earlier: those run."""


class QueueFullError(TickworkError):
    """The queue has no credit left and the caller runs inside an event loop, which must not block."""


class WrongThreadError(TickworkError):
    """``.result()`` was called on the engine's or the device's own thread and could never return."""


class RequestFailedError(TickworkError):
    """A request completed as failed; its gradient was not accumulated and its model is unchanged."""

    category = RequestErrorCategory.UNKNOWN


class InvalidRequestError(RequestFailedError, ValueError):
    """An argument is wrong.

    Args:
        message: what is wrong and what is allowed.
        field: the argument, for example ``loss_fn_inputs['weights']``.
        datum: index of the offending datum in ``data``, or None.
    """

    category = RequestErrorCategory.USER

    def __init__(self, message: str, *, field: str | None = None, datum: int | None = None) -> None:
        where = f"data[{datum}]" if datum is not None else ""
        place = ".".join(part for part in (where, field or "") if part)
        super().__init__(f"{place}: {message}" if place else message)
        self.field = field
        self.datum = datum

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


class LossError(RequestFailedError):
    """A custom loss raised, or returned something that is not ``(scalar tensor, metrics)``."""

    category = RequestErrorCategory.USER


class CheckpointError(RequestFailedError):
    """A checkpoint is unknown, expired, foreign, damaged, or its name is taken."""

    category = RequestErrorCategory.USER


class ModelLoadError(RequestFailedError):
    """A base model is unknown, unreadable, or of an architecture that does not pack."""

    category = RequestErrorCategory.USER


class CapacityError(RequestFailedError):
    """One request alone does not fit on the device; the message says what would."""

    category = RequestErrorCategory.USER


class DivergedError(RequestFailedError):
    """A sampler's logits are not finite: what it would draw means nothing."""

    category = RequestErrorCategory.USER


class RequestCancelledError(RequestFailedError):
    """A sampling request was cancelled by ``Future.cancel()``."""

    category = RequestErrorCategory.USER


class JournalError(RequestFailedError):
    """The journal can not be opened, read or written; what it had not acknowledged was not accepted.

    Args:
        message: what is wrong and what to do.
        lane: whose row it is, or None where it is no row of a lane.
        number: the request's number in its lane.
    """

    category = RequestErrorCategory.SERVER

    def __init__(self, message: str, *, lane: str | None = None, number: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane
        self.number = number


class EngineStoppedError(RequestFailedError):
    """The engine died or was aborted before the request ran; the chain of ``__cause__`` says why."""

    category = RequestErrorCategory.SERVER


def lasting(error: BaseException | None) -> bool:
    """Whether a request ended, well or not; otherwise it was the engine that ended, and it may be run again."""
    return error is None or (isinstance(error, RequestFailedError) and not isinstance(error, EngineStoppedError))


def _rebuild(cls: type[BaseException], args: tuple[object, ...], state: dict[str, object]) -> BaseException:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def fresh(error: BaseException) -> BaseException:
    """Return a copy of ``error`` caused by it, so that each wait raises with a traceback of its own."""
    again = copy.copy(error)
    again.__cause__ = error
    return again
