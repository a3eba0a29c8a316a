"""``recover``: what an earlier run of the server has accepted, brought back before anybody is let in."""

from __future__ import annotations

import logging
import time

import attrs
import trio

from tickwork.errors import JournalError
from tickwork.journal.journal import Journal
from tickwork.journal.lane import PastLane, PastRequest, PastResult
from tickwork.journal.recovery import Recovered
from tickwork.requests import ForwardBackward, Sample
from tickwork.server.catch_up import CatchUp, request_of
from tickwork.server.kinds import CREATE, UNLOAD, kind_of
from tickwork.server.lanes import Held, request_id
from tickwork.server.promises import Promise, plain
from tickwork.server.routes_sampling import announce, draw, know_base, weight_of
from tickwork.server.routes_training import make_loss
from tickwork.server.server import Server
from tickwork.server.session import Model, Sampler, Session

log = logging.getLogger("tickwork.server")

LOST = plain("lost")


async def recover(server: Server, journal: Journal) -> None:
    """Bring back sessions, models, samplers, losses and promises; lanes catch up beside what is asked from then on.

    Room: the Trio run of the server, before it listens.
    """
    past = journal.recovered.of(in_process=False)
    for damage in past.damage:
        log.error("%s", damage)
    await _Recovery(server, journal, past).run()
    journal.recovered = attrs.evolve(past, lanes=(), loose=(), results=())  # nobody needs their bodies any more


class _Recovery:
    def __init__(self, server: Server, journal: Journal, past: Recovered) -> None:
        self._server, self._journal, self._past = server, journal, past
        self._sessions: dict[str, Session] = {}

    async def run(self) -> None:
        """Bring everything back, in the order in which one thing needs the other."""
        for record in self._past.sessions:
            session = Session(**{field.name: getattr(record, field.name) for field in attrs.fields(type(record))})
            self._sessions[session.session_id] = session
            self._server.sessions.add(session)
        for result in self._past.results:
            self._result(result)
        await self._losses()
        lanes = [(past, model) for past in self._past.lanes if (model := self._model(past)) is not None]
        self._samplers()
        for past, model in lanes:
            self._resume(past, model)
        for request in self._past.loose:
            self._sample(request)

    def _result(self, past: PastResult) -> None:
        """Serve a result again, for as long as it would have been."""
        promise = self._promise(past.lane, past.number, past.owner, past.kind)
        failed = isinstance(past.value, BaseException)
        promise.settle(None if failed else past.value, past.value if failed else None)
        promise.settled_at = _ago(past.settled)
        if past.fetched is not None:
            self._server.promises.fetched(promise)
            promise.fetched_at = _ago(past.fetched)

    async def _losses(self) -> None:
        known = [record for record in self._past.losses if record.session_id in self._sessions]
        of = self._sessions
        for made in [make_loss(self._server, of[each.session_id], each.number, each.graph) for each in known]:
            await made.settled.wait()

    def _model(self, past: PastLane) -> Model | None:
        about, session = past.about, self._sessions.get(past.about.session_id)
        if session is None:
            return None
        lane = self._server.lane(about.lane, about.owner)
        lane.next = past.next
        lane.given_up = {number for first, last in past.skipped for number in range(first, last + 1)}
        model = Model(about.lane, session, about.number, lane, self._created(past), about, about.released)
        self._server.sessions.add_model(about.number, model)
        if about.released:
            self._server.promises.make(f"{about.lane}:unload", about.owner, UNLOAD).fulfil(about.lane)
        return model

    def _created(self, past: PastLane) -> Promise:
        """Return the promise of a model's creation, or one that nobody was given where its result is gone."""
        name = request_id(past.about.lane, 0)
        found = self._server.promises.find(name, past.about.owner)
        if found is not None:
            return found
        if past.requests and past.requests[0].number == 0 and past.requests[0].result is None:
            return self._again(past.requests[0])
        alone = Promise(name, past.about.owner, CREATE)
        alone.accepted.set()
        return alone

    def _samplers(self) -> None:
        for record in self._past.samplers:
            if (session := self._sessions.get(record.session_id)) is not None:
                about = (record.key, session, record.number, record.lane, record.base_model, record.model_path)
                sampler = Sampler(*about, clones=record.clones)
                # Weights of a checkpoint are read again when they are next asked for.
                sampler.held = record.held and record.lane != record.key
                sampler.completions.begin(self._past.boots)
                self._server.sessions.add_sampler(record.number, sampler, self._server.settings.max_samplers)
                if (model := self._server.sessions.model_of(sampler)) is not None:
                    know_base(sampler, model.created)
        for result in self._past.results:
            sampler_of = self._server.sessions.find_sampler(result.lane)
            promise = self._server.promises.find(request_id(result.lane, result.number), result.owner)
            if sampler_of is not None and promise is not None and promise.fetched_at is None:
                announce(sampler_of, promise)

    def _resume(self, past: PastLane, model: Model) -> None:
        """Let a lane catch up with its recorded results, and go on with what has none."""
        done = max((place for place, each in enumerate(past.requests) if each.result is not None), default=-1) + 1
        lost = [self._lost(past, number) for number in past.cut if self._unanswered(past, number)]
        due = [self._held(each, model) for each in past.requests[done:]]
        early = [self._held(each, model) for each in past.early]
        model.lane.shut()
        model.lane.resume(due + lost, early) if past.broken else model.lane.resume(due, early + lost)
        again = [(each, None if each.result else self._held(each, model)) for each in past.requests[:done]]
        catch_up = CatchUp(self._server, self._journal, model, past, again)
        self._server.durable.start(catch_up.run)

    def _held(self, past: PastRequest, model: Model) -> Held:
        """Promise an accepted request once more."""
        return Held(request_of(past, model.session), self._again(past))

    def _again(self, past: PastRequest) -> Promise:
        found = self._server.promises.find(request_id(past.lane, past.number), past.owner)
        return found or self._promise(past.lane, past.number, past.owner, past.kind, self._weight(past))

    def _unanswered(self, past: PastLane, number: int) -> bool:
        return self._server.promises.find(request_id(past.about.lane, number), past.about.owner) is None

    def _lost(self, past: PastLane, number: int) -> Held:
        """Promise the reason why a request can not be had again."""
        why = past.broken or JournalError(f"request {number} is damaged", lane=past.about.lane, number=number)
        return Held(why, self._promise(past.about.lane, number, past.about.owner, LOST.text))

    def _promise(self, lane: str, number: int, owner: str, kind: str, weight: int = 0) -> Promise:
        name = request_id(lane, number)
        promise = self._server.promises.make(name, owner, kind_of(kind, name), weight, (lane, number))
        promise.accepted.set()
        promise.keep = self._server.durable.keep
        return promise

    def _sample(self, past: PastRequest) -> None:
        """Draw a sample that was not finished, from the seed that it has."""
        sampler = self._server.sessions.find_sampler(past.lane)
        if past.result is None and sampler is not None and isinstance(past.payload, Sample):
            draw(self._server, sampler, past.payload, self._again(past))

    def _weight(self, past: PastRequest) -> int:
        if isinstance(past.payload, Sample):
            sampler = self._server.sessions.find_sampler(past.lane)
            return 0 if sampler is None else weight_of(self._server, sampler, past.payload)
        if isinstance(past.payload, ForwardBackward):
            return sum(datum.model_input.length for datum in past.payload.data)
        return 0


def _ago(seconds: float) -> float:
    """Turn a time of the calendar into one of Trio's clock."""
    return trio.current_time() - max(0.0, time.time() - seconds)
