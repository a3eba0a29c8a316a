"""What is written to the journal: one frozen value for each kind of row, and for each change.

Requests of a training model are numbered from 0, its creation, in the order in which they run. A sampler is a lane
without order: its requests have numbers that only tell them apart.

Times are seconds since the epoch, since other clocks end with their process.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import attrs

from tickwork.requests import LossGraph
from tickwork.types import LoraConfig

# Whose are runs, requests and results of a service in process, which no server takes over. No key's owner has a space.
IN_PROCESS = "in process"


@attrs.frozen
class SessionRecord:
    """One client process, as of its last change."""

    session_id: str
    owner: str
    user_metadata: Mapping[str, str]
    created_at: datetime
    tags: tuple[str, ...] = ()
    display_name: str | None = None
    project_id: str | None = None
    sdk_version: str = ""
    ended: str | None = None
    finish: Mapping[str, Any] | None = None


@attrs.frozen
class LaneRecord:
    """One training model, as of its last change.

    Args:
        lane: the model's id.
        number: the model's in its session.
        released: whether its client has let go of it; its requests still run.
    """

    lane: str
    owner: str
    session_id: str
    number: int
    base_model: str | None = None
    lora: LoraConfig | None = None
    released: bool = False


@attrs.frozen
class SamplerRecord:
    """One sampling session, as of its last change.

    Args:
        key: its id, and that of its weights in the engine.
        lane: whose barriers its samples follow: its own, or the training model's of which it is a snapshot.
        number: the sampler's in its session.
        clones: numbers given to clients that joined.
    """

    key: str
    owner: str
    session_id: str
    number: int
    lane: str
    base_model: str | None = None
    model_path: str | None = None
    held: bool = True
    clones: int = 0


@attrs.frozen(eq=False)
class LossRecord:
    """One custom loss that was sent as a graph."""

    loss_id: str
    owner: str
    session_id: str
    number: int
    graph: LossGraph


@attrs.frozen
class RequestRecord:
    """An accepted request.

    Args:
        kind: what its result is encoded as; free text.
        body: the payload, or the error that it fails with at its turn, by ``codec.encode``.
    """

    lane: str
    number: int
    owner: str
    kind: str
    body: bytes


@attrs.frozen
class ResultRecord:
    """What became of a request: in the same ``append`` as it, or later.

    Args:
        settled: when.
        body: the result or the error, by ``codec.encode``.
        gradients: d loss / d logprobs of each datum, float32, as a tuple of arrays by ``codec.encode``, where a loss
            in process gave them.
    """

    lane: str
    number: int
    settled: float
    body: bytes
    gradients: bytes | None = None


@attrs.frozen
class FetchedRecord:
    """Results of a lane were handed over."""

    lane: str
    numbers: tuple[int, ...]
    fetched: float


@attrs.frozen
class SkippedRecord:
    """The numbers from ``first`` to ``last`` never came and were given up."""

    lane: str
    first: int
    last: int


@attrs.frozen
class SnapshotRecord:
    """The state of a lane after all its requests up to ``number``.

    Args:
        file: its name in the folder of snapshots.
        size: bytes.
        checksum: SHA-256 of the file.
    """

    lane: str
    number: int
    file: str
    size: int
    checksum: str


@attrs.frozen
class BackRecord:
    """How a lane came back when the journal was last opened; nothing is brought back from it.

    Args:
        boots: how often the journal had been opened by then.
        number: its last request of before.
        again: how many requests ran again.
        why: why it could not be brought back, if it could not.
    """

    lane: str
    boots: int
    number: int
    again: int = 0
    why: str | None = None


@attrs.frozen
class ForgetRecord:
    """A session, lane, sampler or loss is over; with a lane go its requests and snapshots, not its results.

    Args:
        table: ``sessions``, ``lanes``, ``samplers`` or ``losses``.
        unsettled: whether a lane may go though requests of it have no result.
    """

    table: str
    key: str
    unsettled: bool = False


@attrs.frozen
class TrimRecord:
    """Requests that a snapshot covers may go, and results settled or fetched before the times given.

    Args:
        lane: of this lane alone; None means of all but those of services in process.
    """

    settled_before: float
    fetched_before: float
    lane: str | None = None


Named = SessionRecord | LaneRecord | SamplerRecord | LossRecord
Change = (
    RequestRecord
    | ResultRecord
    | FetchedRecord
    | SkippedRecord
    | SnapshotRecord
    | BackRecord
    | ForgetRecord
    | TrimRecord
)
Record = Named | Change
