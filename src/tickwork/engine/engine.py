"""``Engine``: drains the queue into cycles, hands stages to the executor, settles futures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import attrs
import trio

from tickwork.engine.clock import Clock
from tickwork.engine.plan import Stage, plan
from tickwork.engine.portal import Portal
from tickwork.engine.queue import Queue
from tickwork.engine.request import Outcome, Request
from tickwork.errors import ClosedError, EngineStoppedError, RequestFailedError
from tickwork.executor import Executor
from tickwork.futures import no_blocking

# The shortest turn of decoding between two cycles, in seconds.
DECODE_SLICE = 0.05
# The longest that decoding goes on without looking up: an abort waits for it.
DECODE_TURN = 0.25


class Started(Protocol):
    """What is told that the engine is up: a ``trio.TaskStatus``, or whoever starts it otherwise."""

    def started(self, value: Portal, /) -> None:
        """Take the portal."""


@attrs.frozen
class LaneStatistics:
    """Cycles that held a request of the lane, and those that ran without one since its first."""

    cycles: int
    missed: int


@attrs.frozen
class EngineStatistics:
    """What an engine has done since it started.

    Args:
        cycles: windows planned and run.
        passes: passes run.
        tokens: tokens of those passes.
        requests: requests settled.
        busy: seconds the executor was at work.
        uptime: seconds since the start; ``busy / uptime`` is the occupancy.
        queued: requests accepted and not yet planned.
        peak_queued: the most there ever were.
        credits: weight inside the door, of ``credit_limit``.
        waiting: callers in front of the door.
    """

    cycles: int
    passes: int
    tokens: int
    requests: int
    busy: float
    uptime: float
    queued: int
    peak_queued: int
    credits: int
    credit_limit: int
    waiting: int
    lanes: dict[str, LaneStatistics]


@attrs.define(eq=False)
class _Counters:
    cycles: int = 0
    passes: int = 0
    tokens: int = 0
    requests: int = 0
    busy: float = 0.0
    started: float = 0.0
    lane_cycles: dict[str, int] = attrs.Factory(lambda: defaultdict(int))
    lane_first: dict[str, int] = attrs.Factory(dict)


class Engine:
    """Runs accepted requests on one executor, each exactly once, in the order of its lane.

    Args:
        executor: where stages run.
        cycle_period: seconds that a window stays open; see ``Clock``.
        max_tokens_per_pass: bound of one pass; a window with that many tokens closes at once.
        max_queued_tokens: bound of everything accepted and not settled; further callers wait at the door.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        cycle_period: float = 0.0,
        max_tokens_per_pass: int = 4096,
        max_queued_tokens: int = 2**24,
    ) -> None:
        self._executor = executor
        self._clock = Clock(cycle_period, max_tokens_per_pass)
        self._max_tokens = max_tokens_per_pass
        self._max_queued = max_queued_tokens
        self._queue = Queue(self._take)
        self._live: set[Request] = set()
        self._count = _Counters()
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
            queued=len(self._queue.pending),
            peak_queued=self._queue.peak,
            credits=door.inside if door else 0,
            credit_limit=self._max_queued,
            waiting=door.waiting if door else 0,
            lanes={
                lane: LaneStatistics(cycles, count.cycles - count.lane_first[lane] - cycles)
                for lane, cycles in dict(count.lane_cycles).items()
            },
        )

    async def _run_all(self, task_status: Started) -> None:
        # The loop's own error must leave without an ExceptionGroup around it, hence the detour.
        death: Exception | None = None
        assert self._portal is not None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started(self._portal)
            try:
                await self._cycles()
            except Exception as error:
                death = error
                nursery.cancel_scope.cancel("the executor died")
        if death is not None:
            raise death

    async def _cycles(self) -> None:
        while True:
            if not self._executor.sampling:
                await self._clock.wait(self._queue)
            spent = await self._cycle() if self._clock.due(self._queue) else 0.0
            if self._executor.sampling:
                # Training and decoding get equal shares of a busy device.
                await self._decode(max(DECODE_SLICE, spent))
            elif self._queue.closed and not self._queue.pending:
                return

    async def _cycle(self) -> float:
        requests = self._queue.drain()
        self._live.update(requests)
        self._note_cycle(requests)
        stages = plan(requests, self._max_tokens)
        return sum([await self._run(job) for stage in stages for job in stage.jobs()])

    async def _decode(self, seconds: float) -> None:
        until = trio.current_time() + seconds
        while self._executor.sampling and (left := until - trio.current_time()) > 0:
            await self._run(Stage(decode=min(left, DECODE_TURN)))
            if any(request.kind == "sample" for request in self._queue.pending):
                return  # those join the batch before it goes on

    def _take(self, request: Request) -> bool:
        """Start a call at once, beside the cycles; end a turn of decoding for a sample that waits to join."""
        if request.kind == "call" and self._nursery is not None:
            self._live.add(request)
            self._nursery.start_soon(self._call, request)
            return True
        if request.kind == "sample":
            self._executor.nudge()
        return False

    def _note_cycle(self, requests: list[Request]) -> None:
        for lane in {request.lane for request in requests}:
            self._count.lane_first.setdefault(lane, self._count.cycles)
            self._count.lane_cycles[lane] += 1
        self._count.cycles += 1

    async def _run(self, stage: Stage) -> float:
        # The executor shields its stage, so this is where an abort comes through between two of them.
        await trio.lowlevel.checkpoint_if_cancelled()
        begun = trio.current_time()
        for outcome in await self._executor.run(stage, self._count.cycles):
            self._settle(outcome)
        spent = trio.current_time() - begun
        self._count.passes += len(stage.passes)
        self._count.tokens += sum(item.tokens for item in stage.passes)
        self._count.busy += spent
        return spent

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
        self._count.requests += 1
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
