"""``Session`` and what belongs to it: training models, samplers, losses."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import attrs
import trio

from tickwork.journal.records import LaneRecord, SamplerRecord, SessionRecord
from tickwork.requests import CustomLoss
from tickwork.server.completions import Completions
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
    """One client process.

    Args:
        past_losses: numbers of losses that were let go, and are in the journal still: what was accepted may need them.
    """

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
    past_losses: list[int] = attrs.Factory(list)

    @property
    def record(self) -> SessionRecord:
        """What the journal holds of it."""
        return SessionRecord(**{field.name: getattr(self, field.name) for field in attrs.fields(SessionRecord)})


def loss_id(session: Session, number: int) -> str:
    """Name a custom loss of a session."""
    return f"{session.session_id}:loss:{number}"
