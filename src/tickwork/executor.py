"""``Executor``: the one door between Trio and torch. ``LocalExecutor`` drives one device in one thread."""

from __future__ import annotations

# Loaded here for torch, which wants it: a script may end, and so the interpreter, before torch is first needed,
# and this module can not be loaded any more while it shuts down.
import concurrent.futures.thread  # noqa: F401
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import outcome
import trio

from tickwork.engine.plan import Stage
from tickwork.engine.request import Outcome
from tickwork.futures import no_blocking

if TYPE_CHECKING:
    from tickwork.catalogue import Catalogue


class Executor(Protocol):
    """Runs stages, one at a time. Nothing above it assumes one device or shared memory."""

    @property
    def sampling(self) -> bool:
        """Whether admitted samples are unfinished, so that turns of decoding are needed."""

    @property
    def max_tokens(self) -> int:
        """Tokens that a pass may hold now; fewer than before, perhaps, once memory has run out."""

    def open(self) -> AbstractAsyncContextManager[None]:
        """Make ready; leaving the context ends the current job and frees everything."""

    async def run(self, stage: Stage, cycle: int) -> list[Outcome]:
        """Run a stage and return an outcome for each request that finished in it.

        A failed request is an outcome. An exception means that the device can not go on.
        Cancel: the stage runs to its end; its outcomes are returned.
        """

    def nudge(self) -> None:
        """Ask for the current turn of decoding to end soon, because samples are waiting. Never raises."""


Job = tuple[Callable[[], list[Outcome]], Callable[["outcome.Outcome[list[Outcome]]"], object]]

# Tokens of a pass before there is a device to say how many fit.
DEFAULT_TOKENS = 4096


class LocalExecutor:
    """One device, owned by one thread from its first stage to its last (CUDA state belongs to a thread).

    Args:
        catalogue: where checkpoints lie.
        device: see ``compute.stage.Device``.
        dtype: see ``compute.stage.Device``.
        max_tokens: see ``compute.stage.Device``.
        invariant: see ``compute.stage.Device``.
        checkpoint_activations: see ``compute.stage.Device``.
        adapter_memory: see ``compute.stage.Device``.
        spare_core: see ``compute.stage.Device``.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        device: str | None,
        dtype: str | None,
        max_tokens: int | None,
        *,
        invariant: bool = False,
        checkpoint_activations: bool = False,
        adapter_memory: int | None = None,
        spare_core: bool = False,
    ) -> None:
        self._settings = (catalogue, device, dtype, max_tokens)
        self._options: dict[str, Any] = {
            "invariant": invariant,
            "checkpoint_activations": checkpoint_activations,
            "adapter_memory": adapter_memory,
            "spare_core": spare_core,
        }
        self._first_tokens = DEFAULT_TOKENS if max_tokens is None else max_tokens
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._device: Any = None
        self._nudged = False

    @property
    def max_tokens(self) -> int:
        """Tokens that one pass may hold now: it changes as models are loaded and memory runs out. Room: any thread."""
        device = self._device
        return self._first_tokens if device is None else int(device.max_tokens)

    @property
    def sampling(self) -> bool:
        """Whether admitted samples are unfinished."""
        return self._device is not None and bool(self._device.sampling)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Run the device thread. Cancel: the current job ends first."""
        token, ended = trio.lowlevel.current_trio_token(), trio.Event()
        thread = threading.Thread(target=self._main, args=(token, ended), name="tickwork-device", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._jobs.put(None)
            with trio.CancelScope(shield=True):
                await ended.wait()  # not a join in a worker: at the interpreter's end no thread can be started

    async def run(self, stage: Stage, cycle: int) -> list[Outcome]:
        """Run one stage on the device thread; see ``Executor.run``."""
        token, done = trio.lowlevel.current_trio_token(), trio.Event()
        results: list[outcome.Outcome[list[Outcome]]] = []

        def reply(result: outcome.Outcome[list[Outcome]]) -> None:
            results.append(result)
            token.run_sync_soon(done.set)

        self._nudged = False
        self._jobs.put((lambda: self._run(stage, cycle), reply))
        with trio.CancelScope(shield=True):
            await done.wait()
        return results[0].unwrap()

    def nudge(self) -> None:
        """End the current turn of decoding at its next step."""
        self._nudged = True

    def _run(self, stage: Stage, cycle: int) -> list[Outcome]:
        if self._device is None:
            from tickwork.compute.stage import Device  # noqa: PLC0415  torch is imported when first needed

            self._device = Device(*self._settings, **self._options)
        outcomes: list[Outcome] = self._device.run(stage, cycle, lambda: self._nudged)
        return outcomes

    def _main(self, token: trio.lowlevel.TrioToken, ended: trio.Event) -> None:
        with no_blocking(device=True):
            while (job := self._jobs.get()) is not None:
                act, reply = job
                reply(outcome.capture(act))
                del act, reply, job  # or the last job's tensors would live until the next
        self._device = None
        token.run_sync_soon(ended.set)
