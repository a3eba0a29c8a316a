"""``Keeper``: a service's way into its journal: what is under way, and the runs that were found there."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import attrs

from tickwork.engine.portal import Portal
from tickwork.errors import ClosedError, InvalidRequestError, fresh
from tickwork.futures import Future, Inner
from tickwork.journal.database import Durability
from tickwork.journal.journal import Journal
from tickwork.journal.records import ForgetRecord, Record, TrimRecord
from tickwork.kept.past import PastRun, past_runs
from tickwork.kept.worker import Act, Worker
from tickwork.records import Run

if TYPE_CHECKING:
    from tickwork.kept.lane import KeptLane

# Of what is under way, the engine's credits let in only so much: nothing need wait for room in the journal besides.
NO_LIMIT = 2**62
EVER = float("inf")


class Keeper:
    """The journal of one service.

    Results pass through one thread, ``results``, which records and shows them in their order; ``disk`` is another,
    where what takes long is read and written.

    Args:
        store: the store folder.
        durability: see ``Journal``.
        run_of: tells what the store knows of a run, or None.
        device_seconds: tells the seconds of the device that a lane has had.
        portal: of the engine, where that has a thread of its own and runs.

    Raises:
        JournalError: see ``Journal``.

    Room: any thread.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        durability: Durability,
        run_of: Callable[[str], Run | None],
        device_seconds: Callable[[str], float],
    ) -> None:
        self.journal = Journal(store, durability=durability, limit=NO_LIMIT)
        self.device_seconds = device_seconds
        self.portal: Portal | None = None
        past = self.journal.recovered
        self.journal.recovered = attrs.evolve(past, lanes=(), loose=(), results=())  # or their bodies would stay
        self.runs = past_runs(past.of(in_process=True), run_of)
        # Lanes that have a client, and all that the journal holds.
        self.lanes: weakref.WeakValueDictionary[str, KeptLane] = weakref.WeakValueDictionary()
        self._known = set(self.runs)
        self.results, self.disk = Worker("tickwork-results"), Worker("tickwork-disk")
        # Re-entrant because a finaliser may run while it is held.
        self._lock = threading.RLock()
        self._pending, self._closed = 0, False
        self._when_idle: list[Act] = []

    def check(self) -> None:
        """Refuse what can not be kept.

        Raises:
            JournalError: the journal can not be written any more.
        """
        if (failure := self.journal.failure) is not None:
            raise fresh(failure) from failure

    def begun(self) -> None:
        """Note something that was accepted."""
        with self._lock:
            self._pending += 1

    def ended(self) -> None:
        """Note that what became of it is shown."""
        with self._lock:
            self._pending -= 1
            acts = self._idle_acts()
        for act in acts:
            act()

    def opened(self, lane: KeptLane) -> None:
        """Note a lane that has a client."""
        with self._lock:
            self._known.add(lane.name)
            self.lanes[lane.name] = lane

    def take(self, run_id: str) -> PastRun:
        """Hand over a run that was found, to be resumed.

        Raises:
            InvalidRequestError: there is none, or it was handed over.
            TickworkError: why it can not be resumed.
        """
        with self._lock:
            if run_id not in self.runs:
                why = "has a client, or had one" if run_id in self._known else "is no run that was found"
                raise InvalidRequestError(f"{run_id!r} {why}; see resumable()", field="run_id")
            if (broken := self.runs[run_id].about.broken) is not None:
                raise fresh(broken) from broken
            return self.runs.pop(run_id)

    def forget(self, run_id: str) -> Future[None]:
        """Let go of a run for good, after all that was asked of it.

        Raises:
            ClosedError: the service is closed.
            InvalidRequestError: there is none.
        """
        if self._closed:
            raise ClosedError("the service is closed: make a new ServiceClient")
        with self._lock:
            if run_id not in self._known:
                raise InvalidRequestError(f"the journal holds no run {run_id!r}", field="run_id")
            self._known.remove(run_id)
            self.runs.pop(run_id, None)
        if (lane := self.lanes.get(run_id)) is not None:
            return lane.finish()
        forgotten: Future[None] = Future()
        self.begun()
        self.then(self.append(forgetting(run_id)), partial(self._settle, forgotten))
        return forgotten

    def append(self, records: list[Record]) -> Inner[None]:
        """Write records after everything so far."""
        return self.journal.append(records)

    def then(self, written: Inner[None], act: Callable[[BaseException | None], object]) -> None:
        """Call ``act(error)`` in the thread of results, once it is known whether something was written."""
        written.add_done_callback(lambda done: self.results.put(partial(act, done.exception())))

    def drain(self, portal: Portal) -> None:
        """Take nothing more in, and wait until all that was accepted is done, recorded and shown."""
        portal.refuse()
        self._wait()

    def retire(self) -> None:
        """Drain and end without anybody who waits for it, and the engine too if it runs. Safe in a finaliser."""
        if self.portal is not None:
            self.portal.refuse()
        self._then_idle(lambda: self.results.put(self._leave))

    def close(self) -> None:
        """End, once all is shown: after ``drain``, or once the engine has ended. Does nothing a second time."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._wait()
            for worker in (self.results, self.disk):  # a snapshot that was taken goes from one to the other
                worker.end()
                worker.join()
            self.journal.close()

    def _leave(self) -> None:
        if self.portal is not None:
            self.portal.close()
        if not self._closed:
            self._closed = True
            self.disk.put(self.journal.close)
            self.disk.end()
            self.results.end()

    def _wait(self) -> None:
        idle = threading.Event()
        self._then_idle(idle.set)
        idle.wait()

    def _then_idle(self, act: Act) -> None:
        with self._lock:
            self._when_idle.append(act)
            acts = self._idle_acts()
        for each in acts:
            each()

    def _idle_acts(self) -> list[Act]:
        acts: list[Act] = []
        if not self._pending:
            acts, self._when_idle = self._when_idle, []
        return acts

    def _settle(self, forgotten: Future[None], error: BaseException | None) -> None:
        if error is None:
            forgotten.set_result(None)
        else:
            forgotten.set_error(error)
        self.ended()


def forgetting(run_id: str) -> list[Record]:
    """Return what is written of a run's end."""
    return [ForgetRecord("lanes", run_id, unsettled=True), TrimRecord(EVER, EVER, run_id)]
