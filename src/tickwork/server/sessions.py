"""``Sessions``: all of them, and how much each may hold."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import trio

from tickwork import build
from tickwork.journal.records import ForgetRecord
from tickwork.server.answers import HttpError, unknown
from tickwork.server.door import Door
from tickwork.server.durable import Durable
from tickwork.server.lanes import Lane
from tickwork.server.session import Model, Sampler, Session, loss_id

log = logging.getLogger("tickwork.server")

# Training models that one session may make, ended ones included; samplers of one key that are known by id, let go ones
# included; custom losses of one key.
MOST_MADE, MOST_LOSSES = 4096, 1024


class Sessions:
    """All sessions, and their models and samplers by id.

    Args:
        durable: where they are recorded.
        forgotten: told the ids of sessions that are forgotten, and all their models and samplers with them.
    """

    def __init__(self, door: Door, durable: Durable, forgotten: Callable[[set[str]], None]) -> None:
        self._door, self._durable, self._forgotten = door, durable, forgotten
        self._all: dict[str, Session] = {}
        self._models: dict[str, Model] = {}
        self._samplers: dict[str, Sampler] = {}

    def __len__(self) -> int:
        """Sessions that are kept, ended ones included."""
        return len(self._all)

    def held(self) -> dict[str, int]:
        """Count what is open, and what the engine holds for it."""
        return {
            "sessions": sum(session.ended is None for session in self._all.values()),
            "models": sum(not model.released for model in self._models.values()),
            "samplers": sum(sampler.held for sampler in self._samplers.values()),
        }

    def open(self, owner: str, most: int, **about: Any) -> Session:
        """Make a session.

        Raises:
            HttpError: 429, the owner has ``most`` already, none of them ended.
        """
        mine = [session for session in self._all.values() if session.owner == owner]
        if len(mine) >= most:
            ended = [session for session in mine if session.ended is not None]
            if not ended:
                raise HttpError(429, f"this key has {most} sessions, the most it may: end some", {"retry-after": "10"})
            self._forget(ended[:1])
        session = Session(str(uuid.uuid4()), owner, **about)
        self._all[session.session_id] = session
        log.info("session %s opened", session.session_id, extra=_told(session))
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

    def check_model(self, session: Session, most: int) -> None:
        """Refuse a training model past the bounds.

        Raises:
            HttpError: 403.
        """
        if len(self.models_of(session.owner)) >= most:
            raise HttpError(403, f"this key holds {most} training models, the most it may: close some of them")
        if len(session.models) >= MOST_MADE:
            raise HttpError(403, f"this session has made {MOST_MADE} training models: open a new session")

    def check_loss(self, session: Session) -> None:
        """Refuse a custom loss past the bound.

        Raises:
            HttpError: 403.
        """
        mine = [each for each in self._all.values() if each.owner == session.owner and each.ended is None]
        if sum(len(each.made_losses) for each in mine) >= MOST_LOSSES:
            raise HttpError(403, f"this key holds {MOST_LOSSES} custom losses: end the sessions that made them")

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
        """Let go of an owner's samplers past ``most``, unused for longest first; forget them past ``MOST_MADE``."""
        mine = sorted((s for s in self._samplers.values() if s.session.owner == owner), key=lambda other: other.used)
        held = [sampler for sampler in mine if sampler.held]
        for old in held[: max(0, len(held) - most)]:
            self._let_go(old)
        gone = [sampler for sampler in mine if not sampler.held]
        for old in gone[: max(0, len(mine) - MOST_MADE)]:
            del self._samplers[old.sampling_session_id]
            del old.session.samplers[old.number]
            self._durable.note(ForgetRecord("samplers", old.sampling_session_id))

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
        log.info("session %s ended: %s", session.session_id, why, extra=_told(session))
        for model in session.models.values():
            self.release(model)
        for sampler in session.samplers.values():
            self._let_go(sampler)
        session.losses.clear()
        session.past_losses.extend(session.made_losses)
        session.made_losses.clear()

    def sweep(self, session_seconds: float, kept: Callable[[str], bool]) -> None:
        """Close sessions that gave no sign of life for that long; forget those closed as long ago again.

        Args:
            kept: whether the promise of an id is kept.
        """
        now, dead = trio.current_time(), []
        for session in list(self._all.values()):
            idle = now - session.seen
            if session.ended is None and idle >= session_seconds:
                self.end(session, f"it gave no sign of life for {session_seconds:g} s")
            elif session.ended is not None and idle >= 2 * session_seconds:
                dead.append(session)
        self._forget(dead)
        for sampler in self._samplers.values():
            sampler.completions.sweep(kept)

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

    def _forget(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            del self._all[session.session_id]
            for model in session.models.values():
                del self._models[model.model_id]
                self._durable.note(ForgetRecord("lanes", model.model_id))
            for sampler in session.samplers.values():
                del self._samplers[sampler.sampling_session_id]
                self._durable.note(ForgetRecord("samplers", sampler.sampling_session_id))
            for number in (*session.past_losses, *session.made_losses):
                self._durable.note(ForgetRecord("losses", loss_id(session, number)))
            self._durable.note(ForgetRecord("sessions", session.session_id))
        if sessions:
            self._forgotten({session.session_id for session in sessions})


def _told(session: Session) -> dict[str, str]:
    return {"session_id": session.session_id, "owner": session.owner}
