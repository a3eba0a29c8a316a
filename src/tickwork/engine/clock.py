"""``Clock``: decides when a window of arrivals closes and becomes a cycle."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from tickwork.engine.queue import Queue


@attrs.frozen
class Clock:
    """A window, not a metronome: the first arrival opens it, an idle engine sets no timer.

    Args:
        period: seconds that a window stays open for other clients to join; 0 closes it as soon as the
            executor is free, so that a client who waits for each result loses nothing by it.
        tokens: a window this full closes at once; asked anew each time, since what goes into a pass may change.
    """

    period: float = 0.0
    tokens: Callable[[], int] = lambda: 4096

    def due(self, queue: Queue) -> bool:
        """Whether the open window should close now; False without one."""
        if not queue.pending:
            return False
        return queue.closed or queue.tokens >= self.tokens() or self._left(queue) <= 0

    async def wait(self, queue: Queue) -> None:
        """Wait until a window is due, or the queue is closed and empty. Cancel: safe at any time."""
        await queue.wait(lambda: bool(queue.pending) or queue.closed)
        if queue.pending and not self.due(queue):
            with trio.move_on_after(self._left(queue)):
                await queue.wait(lambda: self.due(queue))

    def _left(self, queue: Queue) -> float:
        return queue.pending[0].received + self.period - trio.current_time()
