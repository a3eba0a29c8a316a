"""``FakeExecutor`` and ``open_engine``: schedules and failures in virtual time, without a device.

::

    async def test_lanes_share_a_pass(autojump_clock):
        executor = FakeExecutor(token_cost=0.1)
        async with open_engine(executor, cycle_period=1.0) as (engine, portal):
            ...
        assert len(executor.ran) == 1
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TypedDict, Unpack

import attrs
import trio

from tickwork.engine.engine import Engine
from tickwork.engine.plan import Stage
from tickwork.engine.portal import Portal
from tickwork.engine.request import Outcome, Request
from tickwork.errors import RequestCancelledError, RequestFailedError
from tickwork.executor import Executor


@attrs.frozen
class Ran:
    """One stage that a ``FakeExecutor`` ran, the cycle it belonged to, and when it began and ended."""

    stage: Stage
    cycle: int
    begun: float
    ended: float


class FakeExecutor:
    """An executor whose device is ``trio.sleep``: under ``trio.testing.MockClock`` it takes no real time.

    The result of a request is its payload. The stages it ran are in ``ran``.

    Args:
        token_cost: seconds of a pass for each of its tokens.
        step_cost: seconds of a step.
        draw_cost: seconds of one turn of decoding, in which each unfinished sample draws a token.
        draws: tokens that a sample draws before it is finished.
        max_tokens: tokens that a pass may hold; the attribute of that name may be changed as the engine runs.
        failures: what befalls requests, by payload: a ``RequestFailedError`` fails that request alone, any
            other exception is the death of the device.

    Room: the Trio run of its engine.
    """

    def __init__(
        self,
        *,
        token_cost: float = 0.0,
        step_cost: float = 0.0,
        draw_cost: float = 0.0,
        draws: int = 1,
        max_tokens: int = 4096,
        failures: Mapping[object, Exception] | None = None,
    ) -> None:
        self._token_cost, self._step_cost, self._draw_cost = token_cost, step_cost, draw_cost
        self._draws = draws
        self.max_tokens = max_tokens
        self._failures = dict(failures or {})
        self._drawing: dict[Request, int] = {}
        self._busy = self._nudged = False
        self.is_open = False
        self.ran: list[Ran] = []

    def __repr__(self) -> str:
        return f"<FakeExecutor {len(self.ran)} stages, {len(self._drawing)} samples{', open' if self.is_open else ''}>"

    @property
    def sampling(self) -> bool:
        """Whether admitted samples are unfinished."""
        return bool(self._drawing)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Make ready; needed before ``run``."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    async def run(self, stage: Stage, cycle: int) -> list[Outcome]:
        """Sleep as long as the stage costs; see ``Executor.run``.

        Raises:
            RuntimeError: a stage is running already, or the executor is not open.
        """
        if self._busy or not self.is_open:
            raise RuntimeError("an executor runs one stage at a time, while it is open")
        self._busy, self._nudged, begun = True, False, trio.current_time()
        try:
            with trio.CancelScope(shield=True):
                outcomes = await self._work(stage)
        finally:
            self._busy = False
            self.ran.append(Ran(stage, cycle, begun, trio.current_time()))
        return outcomes

    def nudge(self) -> None:
        """End the current turn of decoding at its next draw."""
        self._nudged = True

    async def _work(self, stage: Stage) -> list[Outcome]:
        await trio.lowlevel.checkpoint()
        outcomes = self._admit(stage.samples)
        for item in stage.passes:
            await trio.sleep(item.tokens * self._token_cost)
            outcomes += [self._outcome(piece.request) for piece in item.pieces if piece.last]
        for request in stage.steps:
            await trio.sleep(self._step_cost)
            outcomes.append(self._outcome(request))
        if stage.decode:
            outcomes += await self._decode(stage.decode)
        return outcomes

    def _admit(self, samples: Iterable[Request]) -> list[Outcome]:
        seen = [(request, self._outcome(request)) for request in samples]
        self._drawing.update({request: self._draws for request, outcome in seen if outcome.error is None})
        return [outcome for _, outcome in seen if outcome.error is not None]

    async def _decode(self, seconds: float) -> list[Outcome]:
        until = trio.current_time() + seconds
        outcomes = await self._draw()
        while self._drawing and not outcomes and not self._nudged and trio.current_time() < until:
            outcomes = await self._draw()
        return outcomes

    async def _draw(self) -> list[Outcome]:
        gone = [request for request in self._drawing if request.cancelled]
        for request in gone:
            del self._drawing[request]
        if self._drawing:
            await trio.sleep(self._draw_cost)
        self._drawing = {request: left - 1 for request, left in self._drawing.items()}
        done = [request for request, left in self._drawing.items() if left <= 0]
        for request in done:
            del self._drawing[request]
        cancelled = RequestCancelledError("the sampling request was cancelled")
        return [Outcome(request, error=cancelled) for request in gone] + [self._outcome(request) for request in done]

    def _outcome(self, request: Request) -> Outcome:
        failure = self._failures.get(request.payload)
        if failure is None:
            return Outcome(request, value=request.payload)
        if isinstance(failure, RequestFailedError):
            return Outcome(request, error=failure)
        raise failure


class EngineSettings(TypedDict, total=False):
    """The keyword arguments of ``Engine``."""

    cycle_period: float
    max_tokens_per_pass: int | None
    max_queued_tokens: int
    merge: bool


@asynccontextmanager
async def open_engine(executor: Executor, **settings: Unpack[EngineSettings]) -> AsyncIterator[tuple[Engine, Portal]]:
    """Run an engine in a nursery of the calling Trio task, and yield it with its portal.

    Leaving normally drains what was accepted. An error in the body, or the engine's death, cancels the other and
    leaves in an ``ExceptionGroup``, as from any nursery.
    """
    engine = Engine(executor, **settings)
    async with trio.open_nursery() as nursery:
        portal: Portal = await nursery.start(engine.run)
        yield engine, portal
        portal.close()
