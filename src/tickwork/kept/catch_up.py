"""``resume``: brings a training model to where an earlier process left it."""

from __future__ import annotations

import logging
from functools import partial

from tickwork.engine.portal import Portal
from tickwork.engine.request import Request
from tickwork.errors import EngineStoppedError, JournalError, TickworkError, lasting
from tickwork.futures import Future
from tickwork.kept.keeper import Keeper
from tickwork.kept.lane import KeptLane
from tickwork.kept.past import PastRun
from tickwork.requests import Captured, CreateModel, Restore
from tickwork.results import GetInfoResponse

log = logging.getLogger("tickwork")


def resume(keeper: Keeper, portal: Portal, run_id: str) -> tuple[KeptLane, Future[GetInfoResponse]]:
    """Return a run's lane, which takes requests at once, and what is settled when its model is there again.

    Raises:
        InvalidRequestError: there is no such run.
        TickworkError: why it can not be resumed.

    Room: any thread; the work is done in those of the keeper.
    """
    past = keeper.take(run_id)
    lane = KeptLane(keeper, portal, run_id)
    for result in past.results:
        if result.number > 0 and not result.expired:
            lane.past[result.number] = (result.kind, _settled(result.value))
    lane.resume(past.lane.next, [lane.owe(each) for each in past.due])
    return lane, _CatchUp(lane, past).start()


class _CatchUp:
    """Restores a lane's snapshot and runs again what came after it; opens the lane then, or breaks it off by name."""

    def __init__(self, lane: KeptLane, past: PastRun) -> None:
        self._lane, self._past = lane, past
        self._ready: Future[GetInfoResponse] = Future()
        self._info: GetInfoResponse | None = None
        self._error: BaseException | None = None
        self._left = 0

    def start(self) -> Future[GetInfoResponse]:
        self._lane.keeper.begun()
        self._lane.keeper.disk.put(self._read)
        return self._ready

    def _read(self) -> None:
        results = self._lane.keeper.results
        try:
            requests = self._requests()
        except JournalError as error:
            results.put(partial(self._end, error))
        else:
            results.put(partial(self._post, requests))

    def _requests(self) -> list[tuple[Request, bool]]:
        """Return what is to run, and of each whether it has succeeded before."""
        name, record = self._lane.name, self._past.lane.snapshot
        found = []
        if record is not None:
            state = self._lane.keeper.journal.read_snapshot(record)
            self._lane.snapshots.last.number = record.number
            captured = Captured(record.number, state.arrays, state.metadata)
            found.append((Request("step", name, Restore(name, captured)), True))
        for past in self._past.again:
            if past.result is None:
                found.append((self._lane.owe(past), False))
            elif (request := self._past.replay(past)) is not None:
                found.append((request, True))
        return found

    def _post(self, requests: list[tuple[Request, bool]]) -> None:
        self._left = len(requests)
        for request, succeeded in requests:
            self._follow(request, succeeded)
            try:
                self._lane.portal.post(request)
            except EngineStoppedError as error:
                request.future.set_error(error)
        if not requests:
            self._end(None)

    def _follow(self, request: Request, succeeded: bool) -> None:
        results = self._lane.keeper.results
        request.future.add_done_callback(lambda _: results.put(partial(self._ran, request, succeeded)))

    def _ran(self, request: Request, succeeded: bool) -> None:
        self._left -= 1
        error = request.future.future().exception()
        if error is not None and (succeeded or not lasting(error)):
            self._error = self._error or error
        elif isinstance(request.payload, Restore | CreateModel) and error is None:
            self._info = request.future.future().result()
        if not self._left:
            self._end(self._error)

    def _end(self, error: BaseException | None) -> None:
        lane = self._lane
        if isinstance(error, TickworkError) and lasting(error):
            log.error("%s can not be brought back: %s", lane.name, error)
            lane.break_off(error)
        else:
            lane.open()
        if error is not None:
            self._ready.set_error(error)
        elif self._info is not None:
            self._ready.set_result(self._info)
        else:  # its creation was still to be run
            lane.past[0][1].add_done_callback(self._created)
        lane.keeper.ended()

    def _created(self, done: Future[GetInfoResponse]) -> None:
        error = done.future().exception()
        if error is not None:
            self._ready.set_error(error)
        else:
            self._ready.set_result(done.future().result())


def _settled(value: object) -> Future[object]:
    if isinstance(value, BaseException):
        return Future.failed(value)
    done: Future[object] = Future()
    done.set_result(value)
    return done
