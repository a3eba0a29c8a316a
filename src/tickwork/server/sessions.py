"""``Session`` and what belongs to it: training models, samplers, losses."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import attrs
import trio

from tickwork import build
from tickwork.requests import CustomLoss
from tickwork.server.answers import HttpError, unknown
from tickwork.server.completions import Completions
from tickwork.server.lanes import Door, Lane
from tickwork.server.promises import Promise

log = logging.getLogger("tickwork.server")

# Training models that one session may make, ended ones included; samplers of one key that are known by id, let go ones
# included; custom losses of one key.
MOST_MADE, MOST_LOSSES = 4096, 1024


@attrs.define(eq=False)
class Model:
    """A training model of a session."""

    model_id: str
    session: Session
    lane: Lane
    created: Promise
    released: bool = False


@attrs.define(eq=False)
class Sampler:
    """A sampling session.

    Args:
        sampling_session_id: also the key of its weights in the engine.
        lane: whose barriers its samples follow: its own, or the training model's of which it is a snapshot.
        base_model: None while only its checkpoint or its model knows it.
        clones: numbers for clients that join.
        used: when it was last asked for a sample.
        held: whether its weights are with the engine.
    """

    sampling_session_id: str
    session: Session
    lane: str
    base_model: str | None = None
    model_path: str | None = None
    opened: Promise | None = None
    clones: Iterator[int] = attrs.Factory(lambda: itertools.count(1))
    completions: Completions = attrs.Factory(Completions)
    used: float = attrs.Factory(trio.current_time)
    held: bool = True


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


class Sessions:
    """All sessions, and their models and samplers by id.

    Args:
        forgotten: told the ids of sessions that are forgotten, and all their models and samplers with them.
    """

    def __init__(self, door: Door, forgotten: Callable[[set[str]], None]) -> None:
        self._door, self._forgotten = door, forgotten
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
            del old.session.samplers[int(old.sampling_session_id.rpartition(":")[2])]

    def release(self, model: Model) -> None:
        """Let go of a training model, after all that was asked of it."""
        if not model.released:
            model.released = True
            model.lane.end()
            self._door.forget(build.release(model.model_id, model.model_id))

    def end(self, session: Session, why: str) -> None:
        """Close a session and let go of everything it holds."""
        if session.ended is not None:
            return
        session.ended = why
        log.info("session %s ended: %s", session.session_id, why, extra=_told(session))
        for model in session.models.values():
            self.release(model)
        for sampler in session.samplers.values():
            self._let_go(sampler)
        session.losses.clear()
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

    def lanes(self) -> list[Lane]:
        """Return the lanes of all training models that are held."""
        return [model.lane for model in self._models.values() if not model.released]

    def _let_go(self, sampler: Sampler) -> None:
        if sampler.held:
            sampler.held = False
            self._door.forget(build.release(sampler.sampling_session_id, sampler.lane))

    def _forget(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            del self._all[session.session_id]
            for model in session.models.values():
                del self._models[model.model_id]
            for sampler in session.samplers.values():
                del self._samplers[sampler.sampling_session_id]
        if sessions:
            self._forgotten({session.session_id for session in sessions})


def _told(session: Session) -> dict[str, str]:
    return {"session_id": session.session_id, "owner": session.owner}
