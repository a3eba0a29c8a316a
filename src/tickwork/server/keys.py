"""``Keys``: who may come in."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from tickwork.errors import InvalidRequestError

PREFIX = "tml-"


class Keys:
    """API keys and the owners they stand for.

    Args:
        lines: ``KEY`` or ``KEY OWNER`` each; two keys may stand for one owner. A key without an owner is one of its
            own. None at all makes the door open: everybody is the one owner ``""``, which also owns what was made in
            process.

    Raises:
        InvalidRequestError: a key that the official SDK would not send, or one given twice.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._owners: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            key, _, owner = line.strip().partition(" ")
            if not key.startswith(PREFIX) or len(key) < len(PREFIX) + 4 or not key.isascii():
                raise InvalidRequestError(f"entry {number} is not a key: those begin with {PREFIX!r}", field="keys")
            digest = hashlib.sha256(key.encode()).digest()
            if digest in self._owners:
                raise InvalidRequestError(f"entry {number} is given twice", field="keys")
            self._owners[digest] = owner.strip() or f"key-{digest.hex()[:12]}"

    def __repr__(self) -> str:
        return f"<Keys of {len(set(self._owners.values()))} owners>"

    @property
    def open(self) -> bool:
        """Whether everybody is let in."""
        return not self._owners

    def owner(self, key: str | None) -> str | None:
        """Return whose key this is, or None; takes the same time whichever key it is."""
        if self.open:
            return ""
        digest, found = hashlib.sha256((key or "").encode()).digest(), None
        for known, owner in self._owners.items():
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def read_keys(file: Path | None, variable: str | None) -> Keys:
    """Read keys from a file, one a line with ``#`` for comments, and from a variable, separated by commas.

    Raises:
        InvalidRequestError: a malformed key, or a source that holds none.
        OSError: the file can not be read.
    """
    lines = [] if file is None else [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    lines += (variable or "").split(",")
    lines = [line for line in lines if line.strip()]
    if not lines and (file is not None or variable):
        raise InvalidRequestError("no key in it: an open server is asked for by giving none", field="keys")
    return Keys(lines)
