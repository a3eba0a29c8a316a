"""``seal``: the checksum of a row, over its keys and its body, so that no row passes for another."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from tickwork.errors import JournalError

Cell = str | int | float | bytes | None

_HEAD = struct.Struct("<cQ")


def seal(table: str, *cells: Cell) -> bytes:
    """Return the BLAKE2b checksum, 16 bytes, of a row's cells in their order."""
    parts: list[bytes] = []
    for kind, raw in map(_bytes, (table, *cells)):
        parts += (_HEAD.pack(kind, len(raw)), raw)
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def check(table: str, row: Sequence[Cell], *, lane: str | None = None, number: int | None = None) -> None:
    """Refuse a row that is not what was written; its last cell is the checksum.

    Raises:
        JournalError: naming the lane and the number.
    """
    try:
        good = seal(table, *row[:-1]) == row[-1]
    except (TypeError, OverflowError, UnicodeEncodeError):
        good = False
    if not good:
        where = f"lane {lane!r}" if number is None else f"request {number} of lane {lane!r}"
        raise JournalError(f"the row of {where} is damaged: it is not what was written", lane=lane, number=number)


def _bytes(cell: Cell) -> tuple[bytes, bytes]:
    if cell is None:
        return b"0", b""
    if isinstance(cell, str):
        return b"s", cell.encode()
    if isinstance(cell, bytes):
        return b"b", cell
    if isinstance(cell, float):
        return b"f", struct.pack("<d", cell)
    return b"i", str(cell).encode()
