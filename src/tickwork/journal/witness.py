"""``Witness``: how many commits the log of SQLite held when its process ended.

SQLite takes a log that is damaged in its middle for one that ends there, and says nothing. The index of the log, which
outlives a process that is killed, tells where it really ended. Layout: https://sqlite.org/walformat.html
"""

from __future__ import annotations

import struct
from pathlib import Path

import attrs

# The header of the index, which is there twice: initialised, last frame, salts; after both, the frames copied back.
_HEADER = struct.Struct("=12x B 3x I 12x 8s 8x")
_COPIED = struct.Struct("=I")
_SALTS = slice(16, 24)


@attrs.frozen
class Witness:
    """What the index says.

    Args:
        frames: frames of the log that were committed.
        copied: how many of them the database itself has.
        same: whether the log is the one that the index describes.
    """

    frames: int = 0
    copied: int = 0
    same: bool = False

    def lost(self, frames: int) -> int:
        """Return how many committed frames are gone, where SQLite found that many."""
        return max(0, self.frames - max(self.copied, frames if self.same else 0))


def question(database: Path) -> Witness:
    """Read the index of a database that nobody has open."""
    index, log = _read(database, "-shm", 100), _read(database, "-wal", 32)
    if len(index) < 100 or index[:48] != index[48:96]:
        return Witness()
    initialised, frames, salts = _HEADER.unpack_from(index)
    (copied,) = _COPIED.unpack_from(index, 96)
    return Witness(frames, copied, log[_SALTS] == salts) if initialised == 1 else Witness()


def _read(database: Path, suffix: str, count: int) -> bytes:
    try:
        with database.with_name(database.name + suffix).open("rb") as stream:
            return stream.read(count)
    except FileNotFoundError:
        return b""
