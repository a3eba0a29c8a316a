"""``check_fields``: whether the fields of a value are what its class says, so that nothing else is stored or read."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
import numpy as np

from tickwork.errors import JournalError

Check = Callable[[Any], bool]

_NUMBERS: dict[object, tuple[type, ...]] = {int: (int, np.integer), float: (int, float, np.integer, np.floating)}


@functools.cache
def fields(cls: type) -> dict[str, Any]:
    """Return the fields of an attrs class and their types, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in attrs.fields(cls)}


def check_fields(cls: type, values: Mapping[str, Any]) -> None:
    """Refuse values that are not of their field's type.

    Raises:
        JournalError: naming the class and the field.
    """
    for name, (hint, check) in _checks(cls).items():
        if not check(values[name]):
            what = f"{cls.__name__}.{name} holds {values[name]!r:.100}, which is no {getattr(hint, '__name__', hint)}"
            raise JournalError(f"{what}: it can be neither stored nor read")


@functools.cache
def _checks(cls: type) -> dict[str, tuple[Any, Check]]:
    return {name: (hint, _checker(hint)) for name, hint in fields(cls).items()}


@functools.cache
def _checker(hint: Any) -> Check:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _anything
    if origin in (Union, types.UnionType):
        checks = [_checker(arg) for arg in args]
        return lambda value: any(check(value) for check in checks)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in args
    if origin is tuple and args[-1] is not ...:
        parts = [_checker(arg) for arg in args]
        return lambda value: _is_pair(value, parts)
    if origin in (tuple, list, Sequence):
        wanted = (list, tuple) if origin is Sequence else origin
        every = _every(args[0])
        return lambda value: isinstance(value, wanted) and every(value)
    if origin in (dict, Mapping):
        keys, items = _every(args[0]), _every(args[1])
        return lambda value: isinstance(value, Mapping) and keys(value) and items(value.values())
    return _plain(hint)


def _anything(value: Any) -> bool:
    return True


def _plain(hint: Any) -> Check:
    accepts = _class_check(hint)
    return lambda value: accepts(type(value))


def _class_check(hint: Any) -> Callable[[type], bool]:
    kinds = _NUMBERS.get(hint, (hint,))
    if hint in _NUMBERS:
        return lambda cls: issubclass(cls, kinds) and cls is not bool
    return lambda cls: issubclass(cls, kinds)


def _is_pair(value: Any, parts: Sequence[Check]) -> bool:
    if not isinstance(value, tuple) or len(value) != len(parts):
        return False
    return all(check(item) for check, item in zip(parts, value, strict=True))


def _every(hint: Any) -> Callable[[Iterable[Any]], bool]:
    if hint is not Any and isinstance(hint, type) and get_origin(hint) is None:
        # Once for each type, not for each value: prompts have many thousand tokens.
        accepts = _class_check(hint)
        return lambda values: all(map(accepts, set(map(type, values))))
    check = _checker(hint)
    return lambda values: all(map(check, values))
