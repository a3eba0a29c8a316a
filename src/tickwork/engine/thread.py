"""``EngineThread``: hosts an engine for callers that have no Trio run of their own."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import trio

from tickwork.engine.engine import Engine
from tickwork.engine.portal import Portal
from tickwork.futures import Inner

_running: set[EngineThread] = set()


def _at_exit() -> None:
    """Engines that nobody closed still drain, unless the interpreter ends by an exception."""
    for thread in list(_running):
        if hasattr(sys, "last_type"):
            thread.abort()
        else:
            with suppress(KeyboardInterrupt):  # close has then aborted, and the interpreter ends all the same
                thread.close()


# Before concurrent.futures shuts its pools, which loading a model needs; atexit comes after that.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)


class _Ready:
    """What ``nursery.start`` would be: takes the portal when the engine is up."""

    def __init__(self) -> None:
        self.portal: Inner[Portal] = Inner()

    def started(self, portal: Portal) -> None:
        self.portal.set_result(portal)


class EngineThread:
    """One engine in one daemon thread.

    Args:
        drain: waits until all that was accepted is done, where some of it is not with the engine yet.

    Room: any thread may start and end it; ending it joins the thread.
    """

    def __init__(self, engine: Engine, drain: Callable[[Portal], object] = lambda _: None) -> None:
        self._engine, self._drain = engine, drain
        self._ready = _Ready()
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._death: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name="tickwork-engine", daemon=True)

    def is_current(self) -> bool:
        """Whether the caller runs in this engine's thread."""
        return threading.current_thread() is self._thread

    def start(self) -> Portal:
        """Start the engine and return its portal once it is up."""
        self._thread.start()
        return self._ready.portal.result()

    def close(self) -> None:
        """Drain what was accepted, end, join.

        Raises:
            Exception: what the engine died of, if it did.
        """
        portal = self._ready.portal.result()
        try:
            self._drain(portal)
            portal.close()
            self._join()
        except BaseException:
            self.abort()  # Ctrl-C while draining
            raise
        if self._death is not None:
            raise self._death

    def abort(self) -> None:
        """Let the current job end, fail the rest, join. One that is starting is waited for first."""
        if not self._ended.is_set() and self._ready.portal.exception() is None and self._token is not None:
            try:
                self._token.run_sync_soon(self._scope.cancel)
            except trio.RunFinishedError:
                pass
        self._join()

    def _join(self) -> None:
        # The event first: Thread.join of Python 3.11 takes a thread for ended once a Ctrl-C has interrupted it.
        self._ended.wait()
        self._thread.join()

    def _main(self) -> None:
        _running.add(self)
        try:
            trio.run(self._run)
        except BaseException as error:
            self._death = error
            if not self._ready.portal.done():
                self._ready.portal.set_exception(error)
        finally:
            _running.discard(self)
            self._ended.set()

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            await self._engine.run(task_status=self._ready)
