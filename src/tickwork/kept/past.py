"""``PastRun``: a run that an earlier process left in the journal, and what has to be run of it again."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from tickwork import build
from tickwork.engine.request import Request
from tickwork.errors import JournalError, LossError, TickworkError
from tickwork.journal.lane import PastLane, PastRequest, PastResult
from tickwork.journal.losses import PastLoss
from tickwork.journal.recovery import Recovered
from tickwork.kept.results import ResumableRun
from tickwork.records import Run
from tickwork.requests import ForwardBackward, changes_model, reads_checkpoint


@attrs.frozen(eq=False)
class PastRun:
    """A run of an earlier process.

    Args:
        results: what is recorded of its requests, those before its snapshot included.
        damage: everything in the journal that is damaged.
    """

    about: ResumableRun
    lane: PastLane
    results: tuple[PastResult, ...]
    damage: tuple[JournalError, ...]

    @property
    def again(self) -> tuple[PastRequest, ...]:
        """What came after its snapshot, up to the last request that has a result."""
        return self.lane.requests[: self._done]

    @property
    def due(self) -> tuple[PastRequest, ...]:
        """What was accepted after those, and is still to be run."""
        return self.lane.requests[self._done :]

    @property
    def _done(self) -> int:
        return max((place for place, each in enumerate(self.lane.requests) if each.result is not None), default=-1) + 1

    def replay(self, past: PastRequest) -> Request | None:
        """Return what brings about once more what a request with a result has done; None where that is nothing.

        Raises:
            JournalError: it is lost.
        """
        assert past.result is not None
        if isinstance(past.result.value, BaseException):
            if past.result.value in self.damage:
                raise past.result.value  # nobody knows whether it had succeeded
            return None
        if reads_checkpoint(past.payload):
            raise _lost(past, "the snapshot of what it has loaded")
        if not changes_model(past.payload):
            return None
        return request_of(past)


def past_runs(recovered: Recovered, run_of: Callable[[str], Run | None]) -> dict[str, PastRun]:
    """Return the runs of a journal by id, in the order in which they were made.

    Args:
        run_of: tells what the store knows of a run, or None.
    """
    found = {}
    for lane in recovered.lanes:
        name, run = lane.about.lane, run_of(lane.about.lane)
        results = tuple(result for result in recovered.results if result.lane == name)
        about = ResumableRun(
            run_id=name,
            base_model=lane.about.base_model or (run.base_model if run else None),
            lora=lane.about.lora or (run.lora if run else None),
            requests_applied=max(0, lane.next - 1),
            broken=lane.broken or _failed_at_once(lane),
        )
        found[name] = PastRun(about, lane, results, recovered.damage)
    return found


def request_of(past: PastRequest) -> Request:
    """Return what an accepted request asks of the engine; its payload is the error that it fails with, if it does."""
    payload = past.payload
    if isinstance(payload, ForwardBackward) and isinstance(payload.loss_fn, PastLoss):
        if past.result is not None and payload.loss_fn.gradients is None:
            raise _lost(past, f"what the custom loss {payload.loss_fn.name} gave")
        payload = _without_code(payload, payload.loss_fn)
    return again(past.lane, payload, past.number)


def again(lane: str, payload: object, number: int) -> Request:
    """Return a request of a lane that has its number already."""
    request = build.again(lane, payload)
    request.number, request.recorded = number, True
    return request


def _without_code(payload: ForwardBackward, loss: PastLoss) -> ForwardBackward | TickworkError:
    if loss.gradients is not None:
        return attrs.evolve(payload, gradients=loss.gradients)
    try:
        loss()
    except LossError as error:
        return error
    raise AssertionError("a loss of the past can not be called")


def _failed_at_once(lane: PastLane) -> TickworkError | None:
    """Return why the model was never there, if it was not."""
    first = lane.requests[0] if lane.requests else None
    if first is None or first.number != 0 or first.result is None:
        return None
    return first.result.value if isinstance(first.result.value, TickworkError) else None


def _lost(past: PastRequest, what: str) -> JournalError:
    return JournalError(f"{what} is lost: request {past.number}", lane=past.lane, number=past.number)
