"""``Host``: what all clients of one service share: the way into its engine, its store, its names."""

from __future__ import annotations

import itertools
import re
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import trio

from tickwork import build
from tickwork.catalogue import Catalogue
from tickwork.convert import as_metadata, is_finite
from tickwork.engine.engine import Engine
from tickwork.engine.portal import Portal
from tickwork.engine.request import Request
from tickwork.engine.statistics import EngineStatistics
from tickwork.engine.thread import EngineThread
from tickwork.errors import ClosedError, InvalidRequestError, WrongThreadError
from tickwork.executor import LocalExecutor
from tickwork.futures import Future, must_run

if TYPE_CHECKING:
    from tickwork.kept.keeper import Keeper

Build = Callable[[], Request]


class Door(Protocol):
    """Takes a client's requests in: the host, or, where there is a journal, the lane of a training model."""

    def submit(self, build: Build) -> Future[Any]:
        """Build and post a request; see ``Host.submit``."""

    async def submit_async(self, build: Build) -> Future[Any]:
        """Build and post a request; see ``Host.submit_async``."""

    def forget(self, key: str, lane: str) -> None:
        """Let go of a model or sampler; see ``Host.forget``."""


class Host:
    """One engine, started when first needed, in a thread of its own unless a portal is given.

    Args:
        keeper: the way into the journal, if there is one; closed with the host.

    Room: any thread.
    """

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        user_metadata: Mapping[str, str] | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.engine = engine
        self.catalogue = catalogue
        self.keeper = keeper
        if keeper is not None:
            weakref.finalize(self, keeper.retire).atexit = False
        self.user_metadata = as_metadata(user_metadata)
        self.session_id = str(uuid.uuid4())
        self._portal: Portal | None = None
        self._thread: EngineThread | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._numbers = {"train": itertools.count(), "sample": itertools.count()}

    def attach(self, portal: Portal) -> None:
        """Use an engine that runs in the caller's own nursery."""
        self._portal = portal

    @property
    def portal(self) -> Portal:
        """The running engine's portal.

        Raises:
            ClosedError: the service is closed.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("the service is closed: make a new ServiceClient")
            if self._portal is None:
                keeper = self.keeper
                self._thread = EngineThread(self.engine) if keeper is None else EngineThread(self.engine, keeper.drain)
                self._portal = self._thread.start()
                # A service whose last reference goes drains and ends by itself.
                if keeper is None:
                    weakref.finalize(self, self._portal.close).atexit = False
                else:
                    keeper.portal = self._portal
            return self._portal

    def door(self, model_id: str) -> Door:
        """Return what takes the requests of a new training model in."""
        if self.keeper is None:
            return self
        from tickwork.kept.lane import KeptLane  # noqa: PLC0415  only where there is a journal

        return KeptLane(self.keeper, self.portal, model_id)

    def next_id(self, kind: str) -> str:
        """Return the next ``SESSION:train:N`` or ``SESSION:sample:N``."""
        return f"{self.session_id}:{kind}:{next(self._numbers[kind])}"

    def submit(self, build: Build) -> Future[Any]:
        """Build and post a request; what is wrong with it is told by its future.

        Raises:
            ClosedError: the service is closed.
            QueueFullError: the queue is full and the caller must not block.
        """
        try:
            return self.portal.submit(build())
        except InvalidRequestError as error:
            return Future.failed(error)

    async def submit_async(self, build: Build) -> Future[Any]:
        """Build and post a request, waiting for a full queue. Cancel: before acceptance it never existed."""
        try:
            return await self.portal.submit_async(build())
        except InvalidRequestError as error:
            return Future.failed(error)

    def call(self, act: Callable[[], Any]) -> Request:
        """Make a request of a function for a worker thread, outside all lanes."""
        return Request("call", "", act)

    def forget(self, key: str, lane: str) -> None:
        """Let go of a model or sampler after all that was asked of it. Safe in a finaliser."""
        if self._portal is not None and not self._closed:
            self._portal.drop(build.release(key, lane))

    def set_share(self, lane: str, share: float) -> None:
        """Set a lane's part of a busy device; see ``Engine.set_share``."""
        self.engine.set_share(lane, share)

    def hint(self, lane: str) -> str | None:
        """Return how a lane's client could lose less time, or None."""
        return self.engine.hint(lane)

    def statistics(self) -> EngineStatistics:
        """Return the engine's counters."""
        return self.engine.statistics()

    def close(self, *, abort: bool = False) -> None:
        """End the engine and wait for it; ``abort`` lets only the current job finish.

        Raises:
            Exception: what the engine died of, if it did and ``abort`` is off.
            WrongThreadError: on the engine's or the device's own thread, which would wait for itself.
        """
        if must_run(device=True) or (self._thread is not None and self._thread.is_current()):
            raise WrongThreadError("a service can not be closed from its own thread: leave its with block instead")
        with self._lock:
            first, self._closed = not self._closed, True
        try:
            if first and self._thread is not None:
                self._thread.abort() if abort else self._thread.close()
        finally:
            if self.keeper is not None:
                self.keeper.close()
            self.catalogue.close()

    async def drain(self) -> None:
        """Under Trio, wait until all that was accepted is done, where some of it is not with the engine yet."""
        if self.keeper is not None:
            await trio.to_thread.run_sync(self.keeper.drain, self.portal, abandon_on_cancel=True)

    def abandon(self) -> None:
        """Let a close that is draining in another thread end after the current job, and wait for that."""
        if self._thread is not None:
            self._thread.abort()


def make_engine(
    catalogue: Catalogue,
    device: str | None,
    dtype: str | None,
    cycle_period: float,
    max_tokens: int | None,
    *,
    merge: bool = True,
    invariant: bool = False,
    checkpoint_activations: bool = False,
    adapter_memory: int | None = None,
    spare_core: bool = False,
) -> Engine:
    """Build an engine with a local executor; arguments as for ``ServiceClient``.

    Args:
        spare_core: see ``compute.threads.Threads``.

    Raises:
        InvalidRequestError: a setting that is not offered, by name.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise InvalidRequestError(f"{dtype!r}; 'float32' or 'bfloat16'", field="dtype")
    if device is not None and not (isinstance(device, str) and re.fullmatch(r"cpu|cuda(:\d+)?", device)):
        raise InvalidRequestError(f"{device!r}; 'cpu', 'cuda' or 'cuda:N'", field="device")
    if not is_finite(cycle_period) or cycle_period < 0:
        raise InvalidRequestError(f"{cycle_period!r}; seconds, at least 0", field="cycle_period")
    switches = {"merge": merge, "invariant": invariant, "checkpoint_activations": checkpoint_activations}
    for field, switch in switches.items():
        if not isinstance(switch, bool):
            raise InvalidRequestError(f"{switch!r}; True or False", field=field)
    for field, value in (("max_tokens_per_pass", max_tokens), ("adapter_memory", adapter_memory)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidRequestError(f"{value!r}; a whole number, at least 1", field=field)
    executor = LocalExecutor(
        catalogue,
        device,
        dtype,
        max_tokens,
        invariant=invariant,
        checkpoint_activations=checkpoint_activations,
        adapter_memory=adapter_memory,
        spare_core=spare_core,
    )
    merge = merge and not invariant
    return Engine(executor, cycle_period=cycle_period, max_tokens_per_pass=max_tokens, merge=merge)
