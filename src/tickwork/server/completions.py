"""``Completions``: which of a sampler's requests are done, for clients that ask about all of them at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import attrs
import trio

from tickwork.server.answers import HttpError

# One client among those that share a sampler: the SDK offsets the numbers of each by this.
CLONE = 1_000_000_000
# Clients that share one sampler.
MOST_CLIENTS = 4096
# More than one run of the server ever tells.
RUN = 2**32


@attrs.define(eq=False)
class _Line:
    """The completions of one client: ``(cursor, request id, failed)``, oldest first."""

    last: int = 0
    events: deque[tuple[int, str, bool]] = attrs.Factory(deque)
    changed: trio.Event = attrs.Factory(trio.Event)


class Completions:
    """Numbered completions of each client of one sampler, kept until the client says that it knows them."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._first = 0

    def check(self, clone: int) -> None:
        """Make sure that there is room for a client.

        Raises:
            HttpError: 403.
        """
        self._line(clone)

    def add(self, seq_id: int, request_id: str, *, failed: bool) -> None:
        """Note that a request is done."""
        line = self._line(seq_id // CLONE)
        line.last += 1
        line.events.append((line.last, request_id, failed))
        line.changed.set()
        line.changed = trio.Event()

    def begin(self, boots: int) -> None:
        """Number what is told from here on past all that an earlier run of the server has told.

        Args:
            boots: how many runs there were, with this one.
        """
        self._lines, self._first = {}, boots * RUN

    async def since(self, clone: int, cursor: int, seconds: float) -> tuple[list[tuple[str, bool]], int]:
        """Return completions after ``cursor``, waiting for the first at most ``seconds``; and the new cursor.

        Those up to ``cursor`` are forgotten.

        Raises:
            HttpError: too many clients.
        """
        line = self._line(clone)
        while line.events and line.events[0][0] <= cursor:
            line.events.popleft()
        if not line.events:
            with trio.move_on_after(seconds):
                await line.changed.wait()
        return [(name, failed) for _, name, failed in line.events], max(cursor, line.last)

    def sweep(self, kept: Callable[[str], bool]) -> None:
        """Forget completions whose results are not kept any more: their client fetches without asking here."""
        for line in self._lines.values():
            while line.events and not kept(line.events[0][1]):
                line.events.popleft()

    def _line(self, clone: int) -> _Line:
        if clone not in self._lines and len(self._lines) >= MOST_CLIENTS:
            raise HttpError(403, f"{MOST_CLIENTS} clients share this sampler: make another one")
        return self._lines.setdefault(clone, _Line(self._first))
