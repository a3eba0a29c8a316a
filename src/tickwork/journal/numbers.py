"""Runs of numbers as raw little-endian arrays, kept beside the tree that they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tickwork.errors import JournalError

DTYPES = ("<i4", "<i8", "<f4", "<f8")
# Below it, text is as short.
SHORTEST_RUN = 8


def as_run(values: Sequence[Any]) -> np.ndarray | None:
    """Return a list of ints alone, or of floats alone, as the narrowest array that holds it bit by bit, or None."""
    if len(values) < SHORTEST_RUN:
        return None
    kinds = set(map(type, values))
    if kinds == {float}:
        return _floats(np.array(values, "<f8"))
    if kinds != {int}:
        return None
    try:
        wide = np.array(values, "<i8")
    except OverflowError:
        return None
    narrow = wide.astype("<i4")
    return narrow if np.array_equal(narrow, wide) else wide


def _floats(wide: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        narrow = wide.astype("<f4")
        again = narrow.astype("<f8")
    return narrow if np.array_equal(again.view("<u8"), wide.view("<u8")) else wide


class Numbers:
    """The arrays of one body, written and read in one order.

    Args:
        raw: what is to be read; left out for writing.
    """

    def __init__(self, raw: memoryview | None = None) -> None:
        self._raw = raw if raw is not None else memoryview(b"")
        self._at = 0
        self.parts: list[bytes] = []

    def put(self, array: np.ndarray) -> list[Any]:
        """Add an array and return what describes it.

        Raises:
            JournalError: a dtype that is not stored.
        """
        code = array.dtype.newbyteorder("<").str
        if code not in DTYPES:
            raise JournalError(f"an array of {array.dtype} can not be stored; {', '.join(DTYPES)} can")
        self.parts.append(array.astype(code, copy=False).tobytes())
        return [code, list(array.shape)]

    def take(self, about: Any) -> np.ndarray:
        """Return the next array, a copy.

        Raises:
            JournalError: it is not described as one, or there is less left than it needs.
        """
        code, shape = about if isinstance(about, list) and len(about) == 2 else ("", None)
        if code not in DTYPES or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise JournalError(f"{about!r:.100} describes no array")
        end = self._at + math.prod(shape) * np.dtype(code).itemsize
        if end > len(self._raw):
            raise JournalError(f"an array of {shape} is cut short")
        array = np.frombuffer(self._raw[self._at : end], code).reshape(shape)
        self._at = end
        return array.copy()

    def check_end(self) -> None:
        """Refuse numbers that belong to nothing.

        Raises:
            JournalError: some are left.
        """
        if self._at != len(self._raw):
            raise JournalError(f"{len(self._raw) - self._at} bytes belong to nothing")
