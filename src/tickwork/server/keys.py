"""``Keys``: who may come in."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable
from pathlib import Path

from tickwork.errors import InvalidRequestError

PREFIX = "tml-"


class Keys:
    """API keys and the owners they stand for.

    Args:
        lines: ``KEY``, ``KEY OWNER`` or ``KEY OWNER SHARE`` each; two keys may stand for one owner. A key without an
            owner is one of its own. Each model of an owner gets that share of a busy device, 1 unless given. None at
            all makes the door open: everybody is the one owner ``""``, which also owns what was made in process.

    Raises:
        InvalidRequestError: a key that the official SDK would not send, or one given twice; a share that is no finite
            number above 0, or a second one for the same owner.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._owners: dict[bytes, str] = {}
        self._shares: dict[str, float] = {}
        for number, line in enumerate(lines, 1):
            key, owner, share = _words(line, number)
            if not key.startswith(PREFIX) or len(key) < len(PREFIX) + 4 or not key.isascii():
                raise InvalidRequestError(f"entry {number} is not a key: those begin with {PREFIX!r}", field="keys")
            digest = hashlib.sha256(key.encode()).digest()
            if digest in self._owners:
                raise InvalidRequestError(f"entry {number} is given twice", field="keys")
            self._owners[digest] = owner or f"key-{digest.hex()[:12]}"
            if share and self._shares.setdefault(owner, _share(share, number)) != _share(share, number):
                raise InvalidRequestError(f"entry {number} gives {owner!r} a second, different share", field="keys")

    def __repr__(self) -> str:
        return f"<Keys of {len(set(self._owners.values()))} owners>"

    @property
    def open(self) -> bool:
        """Whether everybody is let in."""
        return not self._owners

    def share(self, owner: str) -> float:
        """Return what part of a busy device each model of an owner gets, in proportion to those of others."""
        return self._shares.get(owner, 1.0)

    def owner(self, key: str | None) -> str | None:
        """Return whose key this is, or None; takes the same time whichever key it is."""
        if self.open:
            return ""
        digest, found = hashlib.sha256((key or "").encode()).digest(), None
        for known, owner in self._owners.items():
            if hmac.compare_digest(known, digest):
                found = owner
        return found


def _words(line: str, number: int) -> tuple[str, str, str]:
    words = line.split()
    if not 1 <= len(words) <= 3:
        raise InvalidRequestError(f"entry {number} is not KEY, KEY OWNER or KEY OWNER SHARE", field="keys")
    key, owner, share = [*words, "", ""][:3]
    return key, owner, share


def _share(word: str, number: int) -> float:
    try:
        share = float(word)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise InvalidRequestError(f"entry {number}: the share {word!r} is not a finite number above 0", field="keys")
    return share


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
