"""``InFlight``: what each owner has been promised and has not fetched, and what is kept of the rest for a while."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from tickwork.server.promises import Promise


@attrs.define(eq=False)
class _Owner:
    tokens: int = 0
    waiting: set[Promise] = attrs.Factory(set)
    fetched: dict[Promise, None] = attrs.Factory(dict)  # oldest first


class InFlight:
    """Counts promises by owner, from their making until they are fetched, or forgotten because nobody fetched them.

    Args:
        most: results that are kept of one owner once they were fetched.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._owners: dict[str, _Owner] = {}

    def __len__(self) -> int:
        """Owners of whom anything is known."""
        return len(self._owners)

    def tokens(self, owner: str) -> int:
        """Return the tokens of what an owner has not fetched."""
        return self._owners[owner].tokens if owner in self._owners else 0

    def count(self, owner: str) -> int:
        """Return how much an owner has not fetched."""
        return len(self._owners[owner].waiting) if owner in self._owners else 0

    def made(self, promise: Promise) -> None:
        """Count a new promise."""
        mine = self._owners.setdefault(promise.owner, _Owner())
        mine.waiting.add(promise)
        mine.tokens += promise.weight

    def fetched(self, promise: Promise) -> list[Promise]:
        """Note that a result was handed over, for the first time or again; return those that are now too many."""
        mine = self._owners.get(promise.owner)
        if mine is None or promise not in mine.waiting:
            return []
        mine.waiting.discard(promise)
        mine.tokens -= promise.weight
        mine.fetched[promise] = None
        return list(islice(mine.fetched, max(0, len(mine.fetched) - self._most)))

    def gone(self, promise: Promise) -> None:
        """Note that a promise was forgotten; one that was not fetched gives its tokens back."""
        mine = self._owners.get(promise.owner)
        if mine is None:
            return
        if promise in mine.waiting:
            mine.waiting.discard(promise)
            mine.tokens -= promise.weight
        mine.fetched.pop(promise, None)
        if not mine.waiting and not mine.fetched:
            del self._owners[promise.owner]
