"""``Server``: what all routes share."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio
from starlette.requests import Request as HttpRequest

from tickwork.catalogue import Catalogue
from tickwork.engine.engine import Engine
from tickwork.engine.request import Request
from tickwork.errors import CheckpointError, InvalidRequestError, TickworkError
from tickwork.models import context_length, locate
from tickwork.results import ParsedCheckpointTinkerPath
from tickwork.server import body, strict
from tickwork.server.answers import HttpError, unknown
from tickwork.server.door import Door
from tickwork.server.durable import Durable
from tickwork.server.lanes import Lane
from tickwork.server.metrics import Metrics
from tickwork.server.promises import Kind, Promise, Promises
from tickwork.server.sessions import Sessions
from tickwork.server.settings import Settings
from tickwork.server.snapshots import Snapshots

T = TypeVar("T")
B = TypeVar("B", bound=strict.Body)

log = logging.getLogger("tickwork.server")

SWEEP_SECONDS = 1.0


class Server:
    """Settings, and what is going on: promises, sessions, the way into the engine.

    Room: the Trio run of the engine.
    """

    def __init__(self, settings: Settings, door: Door, catalogue: Catalogue, engine: Engine, durable: Durable) -> None:
        self.settings = settings
        self.durable = durable
        self.snapshots = Snapshots(durable, engine, settings.snapshot_seconds)
        self.door = door
        self.catalogue = catalogue
        self.engine = engine
        self.promises = Promises(settings.max_results)
        self.sessions = Sessions(door, durable, self.promises.forget)
        self.bodies = body.Bodies(settings.max_bodies)
        self.contexts = {name: context_length(name) or 0 for name in settings.models}
        self.under_way: dict[str, int] = {}
        self.stopping = trio.Event()
        self.secret = secrets.token_bytes(32)
        self.metrics = Metrics(self)
        self.copies: dict[tuple[str, str], str] = {}

    async def parse(self, model: type[B], request: HttpRequest, most: int | None = body.MOST_PLAIN) -> B:
        """Read a JSON body as one of ``bodies``.

        Args:
            most: its bytes; None for one that holds data.

        Raises:
            HttpError: too large, or not JSON.
            InvalidRequestError: naming the field.
        """
        raw = await body.read(request, self.settings, most)
        return await body.off_loop(len(raw), lambda: strict.parse(model, body.json_of(raw)))

    def refuse_when_stopping(self) -> None:
        """Take no new work while ending.

        Raises:
            HttpError: 503.
        """
        if self.stopping.is_set():
            raise HttpError(503, "the server is stopping", {"retry-after": "5"})

    def refuse_when_full(self, owner: str) -> None:
        """Take no more of an owner who does not fetch results.

        Raises:
            HttpError: 429.
        """
        most = self.settings.max_results
        if self.promises.count(owner) >= most:
            raise HttpError(429, f"{most} requests are in flight: fetch results first", {"retry-after": "1"})

    @contextmanager
    def counted(self, owner: str) -> Iterator[None]:
        """Count an HTTP request of an owner while it is under way.

        Raises:
            HttpError: 429, too many are.
        """
        count, most = self.under_way.get(owner, 0), self.settings.max_requests
        if count >= most:
            raise HttpError(429, f"{most} requests of this key are under way: wait for some", {"retry-after": "1"})
        self.under_way[owner] = count + 1
        try:
            yield
        finally:
            self.under_way[owner] -= 1
            if not self.under_way[owner]:
                del self.under_way[owner]

    def refuse_when_stuck(self) -> None:
        """Say why nothing more is shown, where results can not be written.

        Raises:
            HttpError: 503.
        """
        if self.durable.stuck:
            raise HttpError(503, str(self.durable.failure), {"retry-after": "5"})

    def base_model(self, name: str) -> str:
        """Return a served base model by its name, or by the folder it was loaded from.

        Raises:
            InvalidRequestError: not served.
        """
        for known, source in self.settings.models.items():
            if name in (known, source, public_name(known)):
                return known
        served = ", ".join(self.settings.models)
        raise InvalidRequestError(f"{name!r} is not served here; there is: {served}", field="base_model")

    def promise(self, request_id: str, owner: str, kind: Kind, make: Callable[[], Request]) -> Promise:
        """Promise the result of a request outside all numbered lanes."""
        promise = self.promises.make(request_id, owner, kind)
        try:
            self.door.post(make(), promise)
        except TickworkError as error:
            promise.fail(error)
        return promise

    def readable(self, path: str, owner: str) -> None:
        """Check that an owner may read a checkpoint: their own, or a published one.

        Raises:
            InvalidRequestError: not a checkpoint path.
            CheckpointError: unknown, or another owner's.
        """
        run_id = ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
        try:
            if self.catalogue.meta(path).public:
                return
        except CheckpointError:
            self.own(run_id, owner, f"checkpoint {path}")
            raise
        self.own(run_id, owner, f"checkpoint {path}")

    def own(self, run_id: str, owner: str, what: str) -> None:
        """Check that a run is an owner's.

        Raises:
            CheckpointError: unknown, or another owner's.
        """
        try:
            record = self.catalogue.run_record(run_id)
        except CheckpointError:
            record = None
        if record is None or record.owner != owner:
            raise CheckpointError(f"there is no {what}")

    def lane(self, model_id: str, owner: str) -> Lane:
        """Make the lane of a training model."""
        self.engine.set_share(model_id, self.settings.keys.share(owner))
        return Lane(model_id, owner, self.door, self.promises, self.durable, self.snapshots)

    def fetched(self, promise: Promise) -> None:
        """Note that a result is handed over."""
        self.promises.fetched(promise)
        self.durable.fetched(promise)

    async def in_thread(self, act: Callable[..., T], *args: Any) -> T:
        """Run what reads or changes the store in a worker thread."""
        return await trio.to_thread.run_sync(act, *args)

    async def sweep(self) -> None:
        """Give up on gaps, forget fetched results and dead sessions, now and then."""
        rounds = 0
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self._skip_gaps()
            self.durable.flush()
            rounds += 1
            if rounds % 10 == 0:
                self.promises.sweep(self.settings.result_seconds, self.settings.refetch_seconds)
                self.sessions.sweep(self.settings.session_seconds, lambda name: name in self.promises)
                self.durable.trim(self.settings.result_seconds, self.settings.refetch_seconds)

    def _skip_gaps(self) -> None:
        for lane in self.sessions.lanes():
            lane.skip(self.settings.gap_seconds)
            self._tell(lane)

    def _tell(self, lane: Lane) -> None:
        """Log a lane's hint, once."""
        if not lane.told and (hint := self.engine.hint(lane.model_id)) is not None:
            lane.told = True
            log.warning("%s %s", lane.model_id, hint, extra={"model_id": lane.model_id})

    async def drain(self) -> None:
        """Take no new work, finish what was accepted, and give clients a moment to fetch it."""
        self.stopping.set()
        if self.durable.stuck:
            return
        if self.durable.on:
            self._leave()
        else:
            self.promises.stop()
        await self.promises.drained()
        for model in self.sessions.models():
            if self.durable.on and not model.released:
                await self.snapshots.take(model.lane)
        with trio.move_on_after(self.settings.drain_seconds):
            await self.promises.handed_over()

    def _leave(self) -> None:
        """Leave what waits for an earlier number of its model to the next run of the server."""
        for model in self.sessions.models():
            for number in [number for number in model.lane.held if number > model.lane.next]:
                self.promises.leave(model.lane.held.pop(number).promise)


def public_name(name: str) -> str:
    """Return what a client on this machine can load a tokenizer from: a folder, or the name on the hub.

    The SDK takes a name with exactly two slashes for ``org/model/variant`` and cuts it; one more prevents that.
    """
    source = locate(name)
    if not Path(source).is_dir():
        return source
    return f"{source}/" if source.count("/") == 2 else source


def checkpoint_path(run_id: str, kind: str, name: str) -> str:
    """Return the path of a checkpoint named in a URL.

    Raises:
        HttpError: no such path can be.
    """
    path = f"tinker://{run_id}/{kind}/{name}"
    try:
        ParsedCheckpointTinkerPath.from_tinker_path(path)
    except InvalidRequestError:
        raise unknown("checkpoint", path) from None
    return path
