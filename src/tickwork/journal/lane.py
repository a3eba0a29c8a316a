"""``PastLane``: a training model as a journal tells it, and how far its requests can be followed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs

from tickwork.errors import JournalError
from tickwork.journal.records import LaneRecord, SnapshotRecord
from tickwork.requests import OpenSampler, changes_model


@attrs.frozen(eq=False)
class PastResult:
    """What became of a request.

    Args:
        settled: when, in seconds since the epoch.
        fetched: when it was handed over, if it was.
        value: the result, or the error as an exception.
        expired: whether it was let go, so that nothing but its being settled is known.
    """

    lane: str
    number: int
    owner: str
    kind: str
    settled: float
    fetched: float | None
    value: Any
    expired: bool = False


@attrs.frozen(eq=False)
class PastRequest:
    """An accepted request.

    Args:
        payload: what is asked, or the error that it fails with at its turn. A loss in it is a name, a ``GraphLoss``
            or a ``PastLoss``.
        result: what became of it, if that was recorded.
    """

    lane: str
    number: int
    owner: str
    kind: str
    payload: Any
    result: PastResult | None


# A row of requests, or what is wrong with it.
Entry = PastRequest | JournalError


@attrs.frozen(eq=False)
class PastLane:
    """One training model.

    Args:
        snapshot: its newest whole snapshot; None where it has to be made from its first request on.
        requests: what came after the snapshot, in order and without gaps, to be applied again.
        next: the number that comes after those.
        early: requests that wait for a number which has not come yet, in order.
        skipped: numbers that were given up, as pairs of first and last.
        broken: why ``requests`` end too early, if they do: the damaged row, snapshot or gap.
        cut: numbers that came after it and can not run any more.
    """

    about: LaneRecord
    snapshot: SnapshotRecord | None
    requests: tuple[PastRequest, ...]
    next: int
    early: tuple[PastRequest, ...]
    skipped: tuple[tuple[int, int], ...]
    broken: JournalError | None = None
    cut: tuple[int, ...] = ()


def follow(
    about: LaneRecord,
    snapshot: SnapshotRecord | None,
    entries: Mapping[int, Entry],
    skipped: Sequence[tuple[int, int]],
    why: JournalError | None,
) -> PastLane:
    """Follow a lane from its snapshot.

    Args:
        entries: its requests by number.
        why: what is wrong with its snapshot, where it had one and it is not whole.
    """
    start = 0 if snapshot is None else snapshot.number + 1
    requests, number, broken = _run(entries, dict(skipped), start)
    rest = sorted(other for other in entries if other >= number)
    if why is not None and 0 not in entries:
        requests, broken, rest = [], why, sorted(entries)
    elif broken is None and any(_has_run(entries[other]) for other in rest):
        message = f"request {number} of lane {about.lane!r} is missing, while later ones have run"
        broken = JournalError(message, lane=about.lane, number=number)
    early = [] if broken else [entry for other in rest if isinstance(entry := entries[other], PastRequest)]
    cut = rest if broken else [other for other in rest if isinstance(entries[other], JournalError)]
    gaps = tuple(sorted(skipped))
    return PastLane(about, snapshot, tuple(requests), number, tuple(early), gaps, broken, tuple(cut))


def changes(payload: Any, samplers: Collection[str]) -> bool:
    """Whether a lane without a request that has succeeded would be another.

    Args:
        samplers: those that were taken of the model and are still held.
    """
    if isinstance(payload, OpenSampler):
        # One that follows the model has led all others that do to where the model was.
        return payload.key in samplers or (payload.inflight and bool(samplers))
    return changes_model(payload)


def _run(
    entries: Mapping[int, Entry], skipped: Mapping[int, int], number: int
) -> tuple[list[PastRequest], int, JournalError | None]:
    """Take requests as long as each follows the last, or numbers that were given up."""
    found: list[PastRequest] = []
    while number in entries or number in skipped:
        if number in skipped:
            number = skipped[number] + 1
            continue
        entry = entries[number]
        if isinstance(entry, JournalError):
            return found, number, entry
        found.append(entry)
        number += 1
    return found, number, None


def _has_run(entry: Entry) -> bool:
    return isinstance(entry, PastRequest) and entry.result is not None
