"""``encode`` and ``decode``: a request, a result or an error as bytes, and back, bit by bit.

::

    b"TKWJ"  u16 format  u32 length of the tree  the tree: JSON, in ASCII  the numbers: raw arrays, in the tree's order

The tree is JSON's null, booleans, strings, whole and finite numbers and lists for themselves, and for all else an
object of one key, which says what it is: ``tuple``, ``map``, ``float``, ``time``, ``array``, ``run`` (a list of
numbers), ``error``, or a class of ``values.BY_NAME``. Nothing is ever evaluated. Checksums belong to the rows that
bodies lie in.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import numpy as np

from tickwork.errors import JournalError, TickworkError
from tickwork.journal.numbers import Numbers, as_run
from tickwork.journal.values import BY_CLASS, BY_NAME, ERROR_NAMES, ERRORS

MAGIC, FORMAT = b"TKWJ", 1
_HEAD = struct.Struct("<4sHI")
_as_text = json.JSONEncoder(separators=(",", ":")).encode
_BAD = (ValueError, TypeError, KeyError, OverflowError, AttributeError, RecursionError, struct.error)


def encode(value: object) -> bytes:
    """Return a value's bytes.

    Args:
        value: None, a bool, number, string, datetime or float/int array; a request's payload, a result, an error of
            ``tickwork.errors`` or a record; lists, tuples and dictionaries of them. A callable loss is stored as
            ``PastLoss``. The causes of an error are not kept.

    Raises:
        JournalError: anything else.
    """
    numbers = Numbers()
    try:
        tree = _as_text(_pack(value, numbers)).encode("ascii")
    except _BAD as error:
        raise JournalError(f"{type(value).__name__} can not be stored: {error!r:.200}") from error
    return b"".join([_HEAD.pack(MAGIC, FORMAT, len(tree)), tree, *numbers.parts])


def is_error(body: bytes) -> bool:
    """Whether a body is that of an error."""
    return body[_HEAD.size :].startswith(b'{"error":')


def decode(body: bytes) -> Any:
    """Return the value that ``encode`` was given.

    Raises:
        JournalError: these bytes are not of this format and version, or not one whole value.
    """
    if len(body) < _HEAD.size or body[:4] != MAGIC:
        raise JournalError("is no body of a journal")
    _, version, length = _HEAD.unpack_from(body)
    if version != FORMAT:
        raise JournalError(f"is of format {version}; this version of Tickwork reads {FORMAT}")
    start = _HEAD.size + length
    if start > len(body):
        raise JournalError("is cut short")
    numbers = Numbers(memoryview(body)[start:])
    try:
        value = _unpack(_parse(body[_HEAD.size : start]), numbers)
    except (*_BAD, TickworkError) as error:
        raise error if isinstance(error, JournalError) else JournalError(f"holds no value: {error!r:.200}") from error
    numbers.check_end()
    return value


def _pack(value: Any, numbers: Numbers) -> Any:
    kind = BY_CLASS.get(type(value))
    if kind is not None:
        return {kind.name: {name: _pack(item, numbers) for name, item in kind.take_apart(value).items()}}
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": struct.pack("<d", value).hex()}
    if isinstance(value, list | tuple):
        run = as_run(value)
        packed = [_pack(item, numbers) for item in value] if run is None else {"run": numbers.put(run)}
        return packed if isinstance(value, list) else {"tuple": packed}
    return _pack_rare(value, numbers)


def _pack_rare(value: Any, numbers: Numbers) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise JournalError("a dictionary whose keys are no strings can not be stored")
        return {"map": {key: _pack(item, numbers) for key, item in value.items()}}
    if isinstance(value, np.generic):
        return _pack(value.item(), numbers)
    if isinstance(value, np.ndarray):
        return {"array": numbers.put(value)}
    if isinstance(value, datetime):
        return {"time": value.isoformat()}
    if isinstance(value, TickworkError):
        cls = next(cls for cls in type(value).__mro__ if cls in ERRORS)
        about = {name: _pack(getattr(value, name, None), numbers) for name in ERRORS[cls]}
        return {"error": [cls.__name__, str(value), about]}
    raise JournalError(f"{type(value).__name__} is nothing that can be stored")


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _refuse("a key that comes twice")


def _parse(tree: bytes) -> Any:
    text = tree.decode("ascii")
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)


def _unpack(node: Any, numbers: Numbers) -> Any:
    if isinstance(node, list):
        return [_unpack(item, numbers) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1:
        raise JournalError(f"an object of {len(node)} keys says not what it is")
    [(name, inner)] = node.items()
    if name in BY_NAME:
        return BY_NAME[name].put_together({key: _unpack(item, numbers) for key, item in inner.items()})
    if name not in _TAGS:
        raise JournalError(f"{name!r:.100} is no kind that this version of Tickwork knows")
    return _TAGS[name](inner, numbers)


def _tuple(inner: Any, numbers: Numbers) -> tuple[Any, ...]:
    found = _unpack(inner, numbers)
    return tuple(found) if isinstance(found, list) else _refuse(f"a tuple of {type(found).__name__}")


def _float(inner: Any, numbers: Numbers) -> float:
    (number,) = struct.unpack("<d", bytes.fromhex(inner))
    return float(number)


def _time(inner: Any, numbers: Numbers) -> datetime:
    return datetime.fromisoformat(inner)


def _run(inner: Any, numbers: Numbers) -> list[Any]:
    found = numbers.take(inner)
    return list(found.tolist()) if found.ndim == 1 else _refuse(f"a run of {found.ndim} dimensions")


def _error(inner: Any, numbers: Numbers) -> TickworkError:
    name, message, about = inner
    if name not in ERROR_NAMES or not isinstance(message, str) or about.keys() != set(ERRORS[ERROR_NAMES[name]]):
        raise JournalError(f"{name!r:.100} is no error that this version of Tickwork knows")
    if not all(item is None or isinstance(item, str | int) for item in about.values()):
        raise JournalError(f"{name} holds fields that are neither text nor a number")
    cls = ERROR_NAMES[name]
    error = cls.__new__(cls, message)
    # Past __init__, which may put a field in front of the message once more.
    error.args = (message,)
    error.__dict__.update(about)
    return error


_TAGS: dict[str, Callable[[Any, Numbers], Any]] = {
    "tuple": _tuple,
    "map": lambda inner, numbers: {key: _unpack(item, numbers) for key, item in inner.items()},
    "float": _float,
    "time": _time,
    "array": lambda inner, numbers: numbers.take(inner),
    "run": _run,
    "error": _error,
}
