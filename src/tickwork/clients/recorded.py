"""``Recorded``: what a training client tells of the requests that an earlier process made."""

from __future__ import annotations

from typing import Any

from tickwork.clients.host import Door
from tickwork.clients.ready import Ready
from tickwork.futures import Future
from tickwork.kept.results import Past, RecordedResult


class Recorded(Ready):
    """Base of a client whose run may have begun in another process."""

    def __init__(self, door: Door, ready: Future[Any], past: Past | None) -> None:
        super().__init__(door, ready)
        self._past = past or Past()

    @property
    def requests_applied(self) -> int:
        """How many requests the run had accepted before this client: 0 for a new run.

        Those count that change the model or the store: every call but ``forward`` and those that make samplers. They
        are numbered from 1 in the order of calls; those that had failed, or fail now, are among them.
        """
        return self._past.count

    def past_results(self) -> dict[int, RecordedResult]:
        """Return what became of those requests, by number; waits until the unfinished ones are done.

        Results go ten minutes after a snapshot has come to stand in for their requests.

        Raises:
            TickworkError: why the model could not be brought back.
        """
        self._ready.result()
        return self._past.results()

    async def past_results_async(self) -> dict[int, RecordedResult]:
        """``past_results``, awaited."""
        await self._ready
        return await self._past.results_async()
