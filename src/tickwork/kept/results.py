"""What a journal tells of runs and of their requests, as a script sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import attrs

from tickwork.errors import TickworkError
from tickwork.futures import Future
from tickwork.results import SaveWeightsForSamplerResponse
from tickwork.types import LoraConfig


@attrs.frozen
class RecordedResult:
    """What became of a request.

    Args:
        kind: the method that made it: ``"forward_backward"`` (of a custom loss too), ``"optim_step"``,
            ``"save_state"``, ``"load_state"`` …
        value: what its future gave.
        error: what it failed with, if it did.
    """

    kind: str
    value: Any = None
    error: BaseException | None = None


@attrs.frozen
class ResumableRun:
    """A run that an earlier process left in the journal.

    Args:
        requests_applied: how many requests it has accepted, its creation excluded; resuming brings their effect back.
        broken: why it can not be resumed, if it can not.
    """

    run_id: str
    base_model: str | None
    lora: LoraConfig | None
    requests_applied: int
    broken: TickworkError | None = None


@attrs.frozen(eq=False)
class Past:
    """The requests that a run had accepted before it got the client that it has.

    Args:
        count: how many they were, its creation excluded.
        futures: the kind and the future of each whose result is known, or will be, by number.
    """

    count: int = 0
    futures: Mapping[int, tuple[str, Future[Any]]] = attrs.Factory(dict)

    def results(self) -> dict[int, RecordedResult]:
        """Return what became of them, once it is known."""
        for _, future in self.futures.values():
            with contextlib.suppress(TickworkError):
                future.result()
        return self._results()

    async def results_async(self) -> dict[int, RecordedResult]:
        """``results``, awaited."""
        for _, future in self.futures.values():
            with contextlib.suppress(TickworkError):
                await future
        return self._results()

    def _results(self) -> dict[int, RecordedResult]:
        return {number: _result(*self.futures[number]) for number in sorted(self.futures) if number > 0}


def _result(kind: str, done: Future[Any]) -> RecordedResult:
    error = done.future().exception()
    if error is not None:
        return RecordedResult(kind, None, error)
    value = done.future().result()
    return RecordedResult(
        kind, SaveWeightsForSamplerResponse(value.path) if kind == "save_weights_for_sampler" else value
    )
