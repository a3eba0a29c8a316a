"""``lost_pages``: whether the log of SQLite still holds what was committed to it.

SQLite takes a log that is damaged in its middle for one that ends there, and says nothing. The index of the log, which
outlives a process that is killed, tells where it really ended. Both are only read here, and before SQLite opens them,
which would bring the index into line with the log. Layouts: https://sqlite.org/walformat.html
"""

from __future__ import annotations

import struct
from pathlib import Path

import attrs
import numpy as np

# The header of the index, which is there twice: initialised, last frame, salts. After both: frames copied back.
_INDEX = struct.Struct("=12x B 3x I 12x 8s 8x")
_COPIED = struct.Struct("=I")
_HEADER, _FRAME = 32, 24
_MAGIC, _BIG_ENDIAN = 0x377F0682, 1
_PAGES = [2**bits for bits in range(9, 17)]


@attrs.frozen
class _Index:
    frames: int
    copied: int
    salts: bytes


def lost_pages(database: Path) -> int:
    """Return how many committed pages the log of a database, which nobody has open, has lost.

    Without an index there is nothing to compare with, and the answer is 0.
    """
    index = _index(_read(database, "-shm")[:100])
    if index is None or index.frames <= index.copied:
        return 0
    log = _read(database, "-wal")
    return max(0, index.frames - max(index.copied, committed(log) if log[16:24] == index.salts else 0))


def committed(log: bytes) -> int:
    """Return how many frames of a log SQLite will take: whole, chained by their checksums, up to the last commit."""
    magic, _, page = struct.unpack_from(">3I", log) if len(log) >= _HEADER else (0, 0, 0)
    if magic & ~_BIG_ENDIAN != _MAGIC or page not in _PAGES:
        return 0
    words = ">u4" if magic & _BIG_ENDIAN else "<u4"
    head = np.frombuffer(log, np.uint8, _HEADER).reshape(1, -1)
    start = np.ascontiguousarray(head[:, 24:]).view(">u4").astype(np.uint32)
    if not np.array_equal(_sums(head[:, :24], np.zeros((1, 2), np.uint32), words), start):
        return 0
    count = (len(log) - _HEADER) // (_FRAME + page)
    frames = np.frombuffer(log, np.uint8, count * (_FRAME + page), _HEADER).reshape(count, _FRAME + page)
    stored = np.ascontiguousarray(frames[:, 16:24]).view(">u4").astype(np.uint32)
    before = np.concatenate([start, stored])[:count]
    summed = np.concatenate([frames[:, :8], frames[:, _FRAME:]], axis=1)
    good = (_sums(summed, before, words) == stored).all(axis=1) & (frames[:, 8:16] == head[:, 16:24]).all(axis=1)
    whole = int(np.argmin(good)) if not good.all() else count
    commits = np.flatnonzero(frames[:whole, 4:8].any(axis=1))
    return int(commits[-1]) + 1 if commits.size else 0


def _sums(rows: np.ndarray, before: np.ndarray, words: str) -> np.ndarray:
    """Return SQLite's checksums of rows of bytes, each from the two sums before it; modulo 2**32.

    One pair of words ``a, b`` turns the sums ``s, t`` into ``s + t + a, s + 2 t + a + b``, which is linear in all four.
    """
    values = np.ascontiguousarray(rows).view(words).astype(np.uint32)
    step = np.array([[1, 1], [1, 2]], np.uint32)
    power, first, second = np.eye(2, dtype=np.uint32), [], []
    for _ in range(values.shape[1] // 2):
        first.append(power @ np.array([1, 1], np.uint32))
        second.append(power @ np.array([0, 1], np.uint32))
        power = power @ step
    weights = np.stack([np.stack(first[::-1]), np.stack(second[::-1])], axis=1).reshape(-1, 2)
    found: np.ndarray = values @ weights + before @ power.T
    return found


def _index(raw: bytes) -> _Index | None:
    if len(raw) < 100 or raw[:48] != raw[48:96]:
        return None
    initialised, frames, salts = _INDEX.unpack_from(raw)
    return _Index(frames, _COPIED.unpack_from(raw, 96)[0], salts) if initialised == 1 else None


def _read(database: Path, suffix: str) -> bytes:
    try:
        return database.with_name(database.name + suffix).read_bytes()
    except FileNotFoundError:
        return b""
