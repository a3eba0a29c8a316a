"""``Request`` and ``Outcome``: one accepted piece of work, and what became of it."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from tickwork.errors import RequestFailedError
from tickwork.futures import Future

Kind = Literal["pass", "step", "sample", "call"]

# What a request without tokens weighs in credits: it takes host memory too.
BASE_WEIGHT = 256


@attrs.define(eq=False)
class Request:
    """One accepted piece of work.

    Args:
        kind: ``pass`` (rows through the model), ``step`` (a barrier in its lane), ``sample`` (joins the decode
            batch) or ``call`` (a function for a worker thread, outside all lanes).
        lane: whose order it keeps; a sample follows the barriers of the lane its weights come from.
        payload: what the executor reads.
        rows: tokens of each datum of a pass.
        whole: all logprobs must be known before any gradient (custom losses).
        tokens: tokens it brings in, for credits and windows.
        ends_lane: nothing is asked of the lane after it, so that no record of it need be kept.
        number: its place in its lane, if it is one that a snapshot of the lane must know to include.
        urgent: comes before what its lane holds, except what has begun.
        recorded: whether what a custom loss gave is wanted besides the result.
        gradients: d loss / d logprobs of each datum, float32, of a custom loss whose request is recorded and done.
    """

    kind: Kind
    lane: str
    payload: Any
    rows: tuple[int, ...] = ()
    whole: bool = False
    tokens: int = 0
    ends_lane: bool = False
    number: int | None = None
    urgent: bool = False
    recorded: bool = False
    gradients: Any = None
    cancelled: bool = False
    received: float = 0.0
    future: Future[Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.future = Future(on_cancel=self._cancel)

    @property
    def weight(self) -> int:
        """Credits it holds from its acceptance to its result."""
        return self.tokens + BASE_WEIGHT

    def _cancel(self) -> bool:
        if self.kind == "sample":
            self.cancelled = True
        return self.cancelled


@attrs.frozen
class Outcome:
    """What became of one request: a value, or the error that its future gets; see ``Request`` for its gradients."""

    request: Request
    value: Any = None
    error: RequestFailedError | None = None
    gradients: Any = None
