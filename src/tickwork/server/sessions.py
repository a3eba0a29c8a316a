"""``Session`` and what belongs to it: training models, samplers, losses."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import attrs
import trio

from tickwork import build
from tickwork.journal.records import ForgetRecord, LaneRecord, SamplerRecord, SessionRecord
from tickwork.requests import CustomLoss
from tickwork.server.answers import HttpError, unknown
from tickwork.server.completions import Completions
from tickwork.server.door import Door
from tickwork.server.durable import Durable
from tickwork.server.lanes import Lane
from tickwork.server.promises import Promise


@attrs.define(eq=False)
class Model:
    """A training model of a session."""

    model_id: str
    session: Session
    number: int
    lane: Lane
    created: Promise
    about: LaneRecord
    released: bool = False

    @property
    def record(self) -> LaneRecord:
        """What the journal holds of it."""
        return attrs.evolve(self.about, released=self.released)


@attrs.define(eq=False)
class Sampler:
    """A sampling session.

    Args:
        sampling_session_id: also the key of its weights in the engine.
        lane: whose barriers its samples follow: its own, or the training model's of which it is a snapshot.
        base_model: None while only its checkpoint or its model knows it.
        number: its number in its session.
        clones: numbers given to clients that joined.
        used: when it was last asked for a sample.
        held: whether its weights are with the engine.
    """

    sampling_session_id: str
    session: Session
    number: int
    lane: str
    base_model: str | None = None
    model_path: str | None = None
    opened: Promise | None = None
    clones: int = 0
    completions: Completions = attrs.Factory(Completions)
    used: float = attrs.Factory(trio.current_time)
    held: bool = True

    @property
    def record(self) -> SamplerRecord:
        """What the journal holds of it."""
        return SamplerRecord(
            key=self.sampling_session_id,
            owner=self.session.owner,
            session_id=self.session.session_id,
            number=self.number,
            lane=self.lane,
            base_model=self.base_model,
            model_path=self.model_path,
            held=self.held,
            clones=self.clones,
        )


@attrs.define(eq=False)
class Session:
    """One client process."""

    session_id: str
    owner: str
    user_metadata: dict[str, str]
    tags: tuple[str, ...] = ()
    display_name: str | None = None
    project_id: str | None = None
    sdk_version: str = ""
    seen: float = attrs.Factory(trio.current_time)
    created_at: datetime = attrs.Factory(lambda: datetime.now(UTC))
    ended: str | None = None
    finish: dict[str, Any] | None = None
    models: dict[int, Model] = attrs.Factory(dict)
    samplers: dict[int, Sampler] = attrs.Factory(dict)
    losses: dict[str, CustomLoss] = attrs.Factory(dict)
    made_losses: dict[int, Promise] = attrs.Factory(dict)

    @property
    def record(self) -> SessionRecord:
        """What the journal holds of it."""
        return SessionRecord(**{field.name: getattr(self, field.name) for field in attrs.fields(SessionRecord)})


class Sessions:
    """All sessions, and their models and samplers by id."""

    def __init__(self, door: Door, durable: Durable) -> None:
        self._door, self._durable = door, durable
        self._all: dict[str, Session] = {}
        self._models: dict[str, Model] = {}
        self._samplers: dict[str, Sampler] = {}

    def open(self, owner: str, **about: Any) -> Session:
        """Make a session."""
        session = Session(str(uuid.uuid4()), owner, **about)
        self._all[session.session_id] = session
        return session

    def add(self, session: Session) -> None:
        """Record a session that is there already."""
        self._all[session.session_id] = session

    def of(self, owner: str) -> list[Session]:
        """Return an owner's sessions, newest first."""
        return [session for session in reversed(self._all.values()) if session.owner == owner]

    def find(self, session_id: str, owner: str) -> Session:
        """Return a session.

        Raises:
            HttpError: unknown, or another owner's.
        """
        session = self._all.get(session_id)
        if session is None or session.owner != owner:
            raise unknown("session", session_id)
        return session

    def living(self, session_id: str, owner: str) -> Session:
        """Return a session that has not ended, and note that it lives.

        Raises:
            HttpError: unknown, another owner's (404), or ended (410).
        """
        session = self.find(session_id, owner)
        if session.ended is not None:
            raise HttpError(410, f"session {session_id!r} was closed: {session.ended}")
        session.seen = trio.current_time()
        return session

    def model(self, model_id: str, owner: str) -> Model:
        """Return a training model that is held.

        Raises:
            HttpError: unknown, another owner's, or let go.
        """
        model = self._models.get(model_id)
        if model is None or model.session.owner != owner:
            raise unknown("training model", model_id)
        if model.released:
            raise HttpError(410, f"training model {model_id!r} was let go with its session: create it again")
        model.session.seen = trio.current_time()
        return model

    def sampler(self, sampling_session_id: str, owner: str) -> Sampler:
        """Return a sampling session.

        Raises:
            HttpError: unknown, or another owner's.
        """
        sampler = self._samplers.get(sampling_session_id)
        if sampler is None or sampler.session.owner != owner:
            raise unknown("sampling session", sampling_session_id)
        sampler.session.seen = trio.current_time()
        return sampler

    def model_of(self, sampler: Sampler) -> Model | None:
        """Return the training model that a sampler was taken of, if it was of one."""
        return self._models.get(sampler.lane)

    def find_sampler(self, sampling_session_id: str) -> Sampler | None:
        """Return a sampler whoever asks."""
        return self._samplers.get(sampling_session_id)

    def models_of(self, owner: str) -> list[Model]:
        """Return the training models that an owner holds."""
        mine = [model for model in self._models.values() if model.session.owner == owner and not model.released]
        return [model for model in mine if model.created.error is None]

    def add_model(self, number: int, model: Model) -> None:
        """Record a training model."""
        model.session.models[number] = model
        self._models[model.model_id] = model

    def add_sampler(self, number: int, sampler: Sampler, most: int) -> None:
        """Record a sampling session; of the owner's samplers past ``most`` those unused for longest are let go."""
        sampler.session.samplers[number] = sampler
        self._samplers[sampler.sampling_session_id] = sampler
        self.make_room(sampler.session.owner, most)

    def make_room(self, owner: str, most: int) -> None:
        """Let go of an owner's samplers past ``most``, unused for longest first."""
        held = [other for other in self._samplers.values() if other.held and other.session.owner == owner]
        for old in sorted(held, key=lambda other: other.used)[: max(0, len(held) - most)]:
            self._let_go(old)

    def release(self, model: Model) -> None:
        """Let go of a training model, after all that was asked of it."""
        if not model.released:
            model.released = True
            self._durable.note(model.record)
            self.end_lane(model)

    def end_lane(self, model: Model) -> None:
        """Let go of a released model as soon as all that was asked of it has been posted."""
        model.lane.end(lambda: self._door.forget(build.release(model.model_id, model.model_id)))

    def end(self, session: Session, why: str) -> None:
        """Close a session and let go of everything it holds."""
        if session.ended is not None:
            return
        session.ended = why
        self._durable.note(session.record)
        for model in session.models.values():
            self.release(model)
        for sampler in session.samplers.values():
            self._let_go(sampler)
        session.losses.clear()

    def sweep(self, session_seconds: float) -> None:
        """Close sessions that gave no sign of life for that long; forget those closed as long ago again."""
        now = trio.current_time()
        for session in list(self._all.values()):
            idle = now - session.seen
            if session.ended is None and idle >= session_seconds:
                self.end(session, f"it gave no sign of life for {session_seconds:g} s")
            elif session.ended is not None and idle >= 2 * session_seconds:
                self._forget(session)

    def models(self) -> list[Model]:
        """Return all training models."""
        return list(self._models.values())

    def lanes(self) -> list[Lane]:
        """Return the lanes of all training models that are held."""
        return [model.lane for model in self._models.values() if not model.released]

    def _let_go(self, sampler: Sampler) -> None:
        if sampler.held:
            sampler.held = False
            self._durable.note(sampler.record)
            self._door.forget(build.release(sampler.sampling_session_id, sampler.lane))

    def _forget(self, session: Session) -> None:
        del self._all[session.session_id]
        for model in session.models.values():
            del self._models[model.model_id]
            self._durable.note(ForgetRecord("lanes", model.model_id))
        for sampler in session.samplers.values():
            del self._samplers[sampler.sampling_session_id]
            self._durable.note(ForgetRecord("samplers", sampler.sampling_session_id))
        for number in session.made_losses:
            self._durable.note(ForgetRecord("losses", loss_id(session, number)))
        self._durable.note(ForgetRecord("sessions", session.session_id))


def loss_id(session: Session, number: int) -> str:
    """Name a custom loss of a session."""
    return f"{session.session_id}:loss:{number}"
