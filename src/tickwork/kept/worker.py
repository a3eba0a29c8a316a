"""``Worker``: a thread that does one thing after the other."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from tickwork.futures import no_blocking

Act = Callable[[], object]

log = logging.getLogger("tickwork")


class Worker:
    """Does what it is given, in that order, in a daemon thread of its own, which may not wait for results.

    Room: any thread may give it something, a finaliser too.
    """

    def __init__(self, name: str) -> None:
        self._acts: queue.SimpleQueue[Act | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._acts,), name=name, daemon=True)
        self._thread.start()

    def put(self, act: Act) -> None:
        """Do something after everything so far; once it has been told to end, never."""
        self._acts.put(act)

    def end(self) -> None:
        """End after everything so far."""
        self._acts.put(None)

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()


def _work(acts: queue.SimpleQueue[Act | None]) -> None:
    with no_blocking(device=True):
        while (act := acts.get()) is not None:
            try:
                act()
            except Exception:
                log.exception("%s failed", act)
            del act  # or what it holds would live until the next
