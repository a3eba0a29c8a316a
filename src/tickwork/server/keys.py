"""``Keys``: who may come in."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from tickwork.errors import InvalidRequestError

PREFIX, DIGEST = "tml-", "sha256:"
# Characters after the prefix. A digest gives away a key that can be guessed, so one that was thought up is not hashed.
LEAST_SECRET = 16


class Keys:
    """API keys and the owners they stand for; what is kept of a key is its digest.

    Args:
        lines: ``KEY``, ``KEY OWNER`` or ``KEY OWNER SHARE`` each, with a key or its digest (``sha256:HEX``) for KEY;
            two keys may stand for one owner. A key without an owner is one of its own. Each model of an owner gets
            that share of a busy device, 1 unless given. None at all makes the door open: everybody is the one owner
            ``""``, which also owns what was made in process.

    Raises:
        InvalidRequestError: a key that the official SDK would not send, or one given twice; a share that is no finite
            number above 0, or a second one for the same owner.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._owners: dict[bytes, str] = {}
        self._shares: dict[str, float] = {}
        for number, line in enumerate(lines, 1):
            key, owner, share = _words(line, number)
            digest = _digest(key, number)
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


def new_key() -> str:
    """Make a key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(24)


def stored(line: str) -> str:
    """Return a line of a keys file with its key's digest in place of the key; any other line as it is.

    Raises:
        InvalidRequestError: the key is too short to be kept so, or no key.
    """
    entry, mark, comment = line.partition("#")
    key, *rest = entry.split() or [""]
    if not key or key.startswith(DIGEST):
        return line
    if not _is_key(key) or len(key) < len(PREFIX) + LEAST_SECRET:
        raise InvalidRequestError(
            f"a key begins with {PREFIX!r} and has {LEAST_SECRET} characters or more behind that, best random ones: "
            "`tickwork keys new` makes one",
            field="keys",
        )
    words = [DIGEST + hashlib.sha256(key.encode()).hexdigest(), *rest, *([f" #{comment}"] if mark else [])]
    return " ".join(words)


def _is_key(word: str) -> bool:
    return word.startswith(PREFIX) and len(word) >= len(PREFIX) + 4 and word.isascii()


def _digest(word: str, number: int) -> bytes:
    if word.startswith(DIGEST):
        if not re.fullmatch("[0-9a-f]{64}", word.removeprefix(DIGEST)):
            raise InvalidRequestError(f"entry {number} is no digest: {DIGEST} and 64 hexadecimal digits", field="keys")
        return bytes.fromhex(word.removeprefix(DIGEST))
    if not _is_key(word):
        raise InvalidRequestError(f"entry {number} is not a key: those begin with {PREFIX!r}", field="keys")
    return hashlib.sha256(word.encode()).digest()


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
        InvalidRequestError: a malformed entry, a source that holds none, or a file that holds a key itself.
        OSError: the file can not be read.
    """
    lines = [] if file is None else _read(file)
    lines += [line for line in (variable or "").split(",") if line.strip()]
    if not lines and (file is not None or variable):
        raise InvalidRequestError("no key in it: an open server is asked for by giving none", field="keys")
    return Keys(lines)


def _read(file: Path) -> list[str]:
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if entry and not entry.startswith(DIGEST):
            raise InvalidRequestError(
                f"line {number} of {file} does not begin with a digest ({DIGEST}...): a file holds no keys themselves; "
                f"`tickwork keys hash < {file}` turns it into one that does not",
                field="keys",
            )
        if entry:
            found.append(entry)
    return found
