"""``Engine``: lets requests in by cycles, hands stages to the executor one by one, settles futures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

import trio

from tickwork.engine.clock import Clock
from tickwork.engine.plan import Planner, Stage
from tickwork.engine.portal import Portal
from tickwork.engine.queue import Queue
from tickwork.engine.request import Outcome, Request
from tickwork.engine.returns import Returns
from tickwork.engine.statistics import Counters, EngineStatistics
from tickwork.errors import ClosedError, EngineStoppedError, InvalidRequestError, RequestFailedError
from tickwork.executor import Executor
from tickwork.futures import no_blocking

# The shortest turn of decoding between two stages, in seconds.
DECODE_SLICE = 0.05
# The longest that decoding goes on without looking up: an abort waits for it.
DECODE_TURN = 0.25


class Started(Protocol):
    """What is told that the engine is up: a ``trio.TaskStatus``, or whoever starts it otherwise."""

    def started(self, value: Portal, /) -> None:
        """Take the portal."""


class Engine:
    """Runs accepted requests on one executor, each exactly once, in the order of its lane.

    Lanes share the device pass by pass, see ``Planner``; training and decoding get half of a busy device each, in
    turns of one stage and one slice of decoding that lasts as long, but at least ``DECODE_SLICE``.

    Args:
        executor: where stages run.
        cycle_period: seconds that a window stays open; see ``Clock``.
        max_tokens_per_pass: bound of one pass; a window with that many tokens closes at once. The executor's own bound
            holds where it is smaller, and where this is None.
        max_queued_tokens: bound of everything accepted and not settled; further callers wait at the door.
        merge: whether requests of several lanes may share a pass; without, each is cut as if it were alone.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        cycle_period: float = 0.0,
        max_tokens_per_pass: int | None = None,
        max_queued_tokens: int = 2**24,
        merge: bool = True,
    ) -> None:
        self._executor = executor
        self._max_tokens = max_tokens_per_pass
        self._clock = Clock(cycle_period, self._bound)
        self._max_queued = max_queued_tokens
        self._queue = Queue(self._take)
        self._planner = Planner(merge=merge)
        self._live: set[Request] = set()
        self._count = Counters()
        self._returns = Returns()
        self._portal: Portal | None = None
        self._nursery: trio.Nursery | None = None
        self._now: Callable[[], float] = lambda: 0.0

    async def run(self, *, task_status: Started = trio.TASK_STATUS_IGNORED) -> None:
        """Run until the portal is closed and everything accepted is settled.

        Room: any Trio task; start it with ``nursery.start``, which returns the portal.
        Cancel: the executor's current job ends, all other requests fail with ``EngineStoppedError``.

        Raises:
            Exception: what the executor died of; every pending future has then failed with it as its cause.
        """
        self._portal = Portal(trio.lowlevel.current_trio_token(), self._queue, self._max_queued)
        self._now = trio.lowlevel.current_clock().current_time
        self._count.started = self._now()
        try:
            with no_blocking():
                async with self._executor.open():
                    await self._run_all(task_status)
        except BaseException as error:
            self._fail_all(error)
            raise
        self._portal.credits.shut(ClosedError("the service is closed"))

    def set_share(self, lane: str, share: float) -> None:
        """Set a lane's part of a busy device, from its next pass on.

        Args:
            share: the tokens that it gets, in proportion to the shares of others that have rows to run; 1 unless set.

        Room: any thread.

        Raises:
            InvalidRequestError: not finite, or not above 0.
        """
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 < share <= sys.float_info.max:
            raise InvalidRequestError(f"{share!r}; a finite number above 0", field="share")
        self._planner.set_share(lane, float(share))

    def hint(self, lane: str) -> str | None:
        """Return how a lane's client could lose less time, or None; see ``LaneStatistics``. Room: any thread."""
        return self._count.hint(lane)

    def device_seconds(self, lane: str) -> float:
        """Return the seconds of the device that fell to a lane so far; see ``LaneStatistics``. Room: any thread."""
        return self._count.device_seconds(lane)

    def statistics(self) -> EngineStatistics:
        """Return counters. Room: any thread; numbers of a running engine may be a moment apart."""
        count, door = self._count, self._portal.credits if self._portal else None
        return EngineStatistics(
            cycles=count.cycles,
            passes=count.passes,
            tokens=count.tokens,
            requests=count.requests,
            busy=count.busy,
            uptime=self._now() - count.started,
            queued=self._queued,
            peak_queued=count.peak,
            credits=door.inside if door else 0,
            credit_limit=self._max_queued,
            waiting=door.waiting if door else 0,
            lanes=count.lanes(),
        )

    async def _run_all(self, task_status: Started) -> None:
        # The loop's own error must leave without an ExceptionGroup around it, hence the detour.
        death: Exception | None = None
        assert self._portal is not None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started(self._portal)
            try:
                await self._turns()
            except Exception as error:
                death = error
                nursery.cancel_scope.cancel("the executor died")
        if death is not None:
            raise death

    async def _turns(self) -> None:
        while True:
            if not self._executor.sampling and not self._planner:
                await self._clock.wait(self._queue)
                await self._wait_for_company()
            self._close_window()
            stage = self._planner.next(self._bound())
            spent = 0.0 if stage is None else await self._run(stage)
            if self._executor.sampling:
                await self._decode(max(DECODE_SLICE, spent))
            elif self._queue.closed and not self._queue.pending and not self._planner:
                return

    async def _wait_for_company(self) -> None:
        """Without a period, give clients who are about to come back the moment that they need to share the pass."""
        while not self._clock.period and not self._queue.closed and self._queue.tokens < self._bound():
            if (until := self._returns.until(self._now())) <= self._now():
                return
            with trio.move_on_at(until):
                await self._queue.change()

    def _close_window(self) -> None:
        """Let in what waits, if it is time: a cycle begins."""
        if self._clock.due(self._queue):
            requests = self._queue.drain()
            self._live.update(requests)
            self._count.begin_cycle(requests)
            for request in requests:
                self._planner.add(request)

    async def _decode(self, seconds: float) -> None:
        until = trio.current_time() + seconds
        while self._executor.sampling and (left := until - trio.current_time()) > 0:
            if any(request.kind == "sample" for request in self._queue.pending):
                self._close_window()  # those join the batch before it goes on, and cost it none of its turn
            await self._run(Stage(samples=self._planner.samples(), decode=min(left, DECODE_TURN)))

    def _bound(self) -> int:
        most = self._executor.max_tokens
        return most if self._max_tokens is None else min(most, self._max_tokens)

    @property
    def _queued(self) -> int:
        return len(self._queue.pending) + len(self._planner)

    def _take(self, request: Request) -> bool:
        """Start a call at once, beside the cycles; end a turn of decoding for a sample that waits to join."""
        if request.kind == "call" and self._nursery is not None:
            self._live.add(request)
            self._nursery.start_soon(self._call, request)
            return True
        if request.kind == "sample":
            self._executor.nudge()
        self._returns.accepted(request, self._now())
        self._count.peak = max(self._count.peak, self._queued + 1)
        return False

    async def _run(self, stage: Stage) -> float:
        # The executor shields its stage, so this is where an abort comes through between two of them.
        await trio.lowlevel.checkpoint_if_cancelled()
        begun = trio.current_time()
        outcomes = await self._executor.run(stage, self._count.cycles)
        self._count.ran(stage, begun, trio.current_time())
        if stage.passes:
            self._returns.ran(trio.current_time() - begun)
        for outcome in outcomes:
            self._settle(outcome)
        return trio.current_time() - begun

    async def _call(self, request: Request) -> None:
        try:
            self._settle(Outcome(request, value=await trio.to_thread.run_sync(request.payload)))
        except RequestFailedError as error:
            self._settle(Outcome(request, error=error))
        except Exception as error:
            # No device is involved, so whatever it is concerns this caller alone.
            what = f"the store: {error}" if isinstance(error, OSError) else f"the call raised {error!r}"
            failure = RequestFailedError(what)
            failure.__cause__ = error
            self._settle(Outcome(request, error=failure))

    def _settle(self, outcome: Outcome) -> None:
        self._live.discard(outcome.request)
        self._count.settled(outcome.request)
        self._returns.settled(outcome.request, self._now())
        if outcome.request.ends_lane:
            self._planner.forget(outcome.request.lane)
        outcome.request.gradients = outcome.gradients
        if outcome.error is not None:
            outcome.request.future.set_error(outcome.error)
        else:
            outcome.request.future.set_result(outcome.value)

    def _fail_all(self, cause: BaseException) -> None:
        reason = f"stopped: {cause!r}" if isinstance(cause, Exception) else "was aborted"
        error = EngineStoppedError(f"the engine {reason} before this request finished")
        error.__cause__ = cause if isinstance(cause, Exception) else None
        self._queue.close(error)
        if self._portal is not None:
            self._portal.credits.shut(error)
        for request in [*self._live, *self._queue.drain()]:
            request.future.set_error(error)
        self._live.clear()
