"""``CatchUp``: brings a training model to where its recorded results left it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import attrs
import trio

from tickwork import build
from tickwork.engine.request import Request
from tickwork.errors import JournalError, RequestFailedError, TickworkError, lasting
from tickwork.journal.journal import Journal
from tickwork.journal.lane import PastLane, PastRequest, changes
from tickwork.journal.losses import GraphLoss
from tickwork.journal.records import BackRecord
from tickwork.requests import Captured, ForwardBackward, OpenSampler, Restore, reads_checkpoint
from tickwork.server.lanes import Ask, Held
from tickwork.server.server import Server
from tickwork.server.session import Model, Session

log = logging.getLogger("tickwork.server")


class CatchUp:
    """Restores a lane's snapshot and runs again what came after it; opens the lane then, or breaks it off by name.

    Args:
        model: whose lane is shut.
        again: requests up to the last that has a result; one without is settled on the way.
    """

    def __init__(
        self,
        server: Server,
        journal: Journal,
        model: Model,
        past: PastLane,
        again: Sequence[tuple[PastRequest, Held | None]],
    ) -> None:
        self._server, self._journal, self._model, self._past, self._again = server, journal, model, past, again
        self._damage = journal.recovered.damage
        lane = model.lane.model_id
        self._samplers = frozenset(
            sampler.sampling_session_id
            for sampler in model.session.samplers.values()
            if sampler.lane == lane and sampler.held
        )

    async def run(self) -> None:
        """Catch up, beside the engine's other work."""
        lane, begun = self._model.lane, trio.current_time()
        try:
            count = await self._run()
        except RequestFailedError as error:
            if lasting(error):
                self._break_off(error)
            return
        except TickworkError:
            return  # the engine has ended
        seconds = trio.current_time() - begun
        log.info("%s is back at request %d; %d ran again, %.1f s", lane.model_id, self._past.next - 1, count, seconds)
        self._note(count)
        lane.open()
        if self._model.released:
            self._server.sessions.end_lane(self._model)

    async def _run(self) -> int:
        self._check()
        futures = [await self._server.door.submit(request) for request in await self._restored()]
        for past, held in self._again:
            if held is not None:
                await self._settle(past, held)
            elif self._matters(past):
                futures.append(await self._server.door.submit(self._request(past)))
                self._let_go(past)
        for future in futures:
            self._know(await future)
        return len(futures)

    def _check(self) -> None:
        created, base = self._model.created, self._past.about.base_model
        if self._past.broken is not None:
            raise self._past.broken
        if created.error is not None:
            raise created.error
        if base not in (None, *self._server.settings.models) and self._wanted():
            raise JournalError(f"its base model {base!r} is not served any more: start the server with --model {base}")

    async def _restored(self) -> list[Request]:
        record = self._past.snapshot
        if record is None or not self._wanted():
            return []
        state = await trio.to_thread.run_sync(self._journal.read_snapshot, record)
        self._server.snapshots.resumed(self._model.lane, record.number)
        captured = Captured(record.number, state.arrays, state.metadata)
        return [Request("step", record.lane, Restore(record.lane, captured, self._samplers))]

    def _wanted(self) -> bool:
        """Whether anybody may ask for what the model is, or was when a sampler was taken of it."""
        unfinished = any(held is not None for _, held in self._again) or not self._model.lane.idle
        return not self._model.released or unfinished or bool(self._samplers)

    def _matters(self, past: PastRequest) -> bool:
        """Whether a request that has succeeded changed what is still there."""
        payload = past.payload
        if past.result is None or not self._wanted():
            return False
        if isinstance(past.result.value, BaseException):
            if past.result.value in self._damage:
                raise past.result.value  # nobody knows whether it had succeeded
            return False
        if reads_checkpoint(payload):
            message = f"the snapshot of what request {past.number} has loaded is lost"
            raise JournalError(message, lane=past.lane, number=past.number)
        return changes(payload, self._samplers)

    def _let_go(self, past: PastRequest) -> None:
        """Let go once more of a sampler that was made again only for what it did to others."""
        payload = past.payload
        if isinstance(payload, OpenSampler) and payload.key not in self._samplers:
            self._server.door.forget(build.release(payload.key, past.lane))

    def _request(self, past: PastRequest) -> Request:
        request = request_of(past, self._model.session)
        assert isinstance(request, Request)
        request.number = past.number
        return request

    async def _settle(self, past: PastRequest, held: Held) -> None:
        if isinstance(held.ask, Request):
            held.ask.number = past.number
            held.promise.follow(await self._server.door.submit(held.ask))
        else:
            held.promise.fail(held.ask)

    def _know(self, value: object) -> None:
        """Take what was made for what was promised, where nothing else is left of its creation."""
        if not self._model.created.settled.is_set():
            self._model.created.fulfil(value)

    def _note(self, count: int, why: str | None = None) -> None:
        """Leave word for whoever looks into the journal."""
        lane, boots = self._model.lane.model_id, self._journal.recovered.boots
        self._server.durable.note(BackRecord(lane, boots, self._past.next - 1, count, why))

    def _break_off(self, why: RequestFailedError) -> None:
        lane = self._model.lane
        log.error("%s can not be brought back: %s", lane.model_id, why)
        self._note(0, str(why))
        if self._model.created.place is None and not self._model.created.settled.is_set():
            self._model.created.fail(why)
        for _, held in self._again:
            if held is not None and held.promise.future is None:
                held.promise.fail(why)
        lane.break_off(why)


def request_of(past: PastRequest, session: Session) -> Ask:
    """Return what an accepted request asks of the engine, or the error that it fails with at its turn."""
    payload = past.payload
    if isinstance(payload, TickworkError):
        return payload
    graph = payload.loss_fn if isinstance(payload, ForwardBackward) else None
    if isinstance(graph, GraphLoss) and (loss := session.losses.get(graph.loss_id)) is not None:
        payload = attrs.evolve(payload, loss_fn=loss)
    return build.again(past.lane, payload)
