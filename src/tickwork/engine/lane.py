"""``Lane``: the passes and steps of one lane in order, and how far the first of them has come."""

from __future__ import annotations

from collections import deque
from typing import Literal

import attrs

from tickwork.engine.request import Request

Phase = Literal["run", "probe", "apply"]


@attrs.define(eq=False)
class Lane:
    """Requests in order, of which the first may have been handed out in part.

    Args:
        name: of the lane; see ``Request``.
        share: its part of a busy device, in proportion to those of other lanes.
        virtual: tokens it was served, over its share.
        waiting: passes and steps.
        behind: samples, by the step that they wait for.
        phase: what is done with the first request's datums; see ``Piece``.
        start: how many of them have been handed out in this phase.
        stop: where the piece ends that is being put together.
        left: tokens of the first request that are not handed out, those of a second phase included.
    """

    name: str
    share: float = 1.0
    virtual: float = 0.0
    waiting: deque[Request] = attrs.Factory(deque)
    behind: dict[Request, list[Request]] = attrs.Factory(dict)
    phase: Phase = "run"
    start: int = 0
    stop: int = 0
    left: int = 0

    @property
    def kind(self) -> str | None:
        """What comes next: ``pass``, ``step`` or nothing."""
        return self.waiting[0].kind if self.waiting else None

    def add(self, request: Request) -> None:
        """Take a pass or step in: at the end, or as the next to begin."""
        if request.urgent:
            self.waiting.insert(int(self.begun), request)
        else:
            self.waiting.append(request)

    def hold_back(self, sample: Request) -> bool:
        """Let a sample wait for the last step before it; False if there is none."""
        step = next((request for request in reversed(self.waiting) if request.kind == "step"), None)
        if step is not None:
            self.behind.setdefault(step, []).append(sample)
        return step is not None

    def take_step(self) -> tuple[Request, list[Request]]:
        """Hand out the step that comes next, and the samples that waited for it alone."""
        step = self.waiting.popleft()
        return step, self.behind.pop(step, [])

    def begin(self, max_tokens: int, share: float) -> None:
        """Note the share; decide, unless it has begun, whether the first request, a pass, is probed first."""
        self.share = share
        if self.begun:
            return
        request = self.waiting[0]
        tokens = sum(request.rows)
        split = request.whole and tokens > max_tokens and len(request.rows) > 1
        self.phase, self.left = ("probe", 2 * tokens) if split else ("run", tokens)

    @property
    def begun(self) -> bool:
        """Whether the first request has been handed out in part."""
        return self.start > 0 or self.phase == "apply"

    @property
    def datum(self) -> int:
        """Tokens of the next datum, or of all where none can be run without the others."""
        rows = self.waiting[0].rows
        return self.left if self._at_once or not rows else rows[self.stop]

    @property
    def through(self) -> bool:
        """Whether the piece that is being put together reaches to the last datum."""
        return self.stop == len(self.waiting[0].rows)

    def take(self, all_left: bool) -> int:
        """Add the next datum, or all that are left, to the piece; return its tokens."""
        rows, start = self.waiting[0].rows, self.stop
        self.stop = len(rows) if all_left or self._at_once else min(start + 1, len(rows))
        tokens = sum(rows[start : self.stop])
        self.left -= tokens
        self.virtual += tokens / self.share
        return tokens

    def cut(self) -> tuple[Request, int, int, Phase, bool]:
        """Hand out the piece: request, start, stop, phase, and whether the request is through after it."""
        request, through = self.waiting[0], self.through
        last = through and self.phase != "probe"
        piece = (request, self.start, self.stop, self.phase, last)
        self.start = self.stop
        if through:
            self.phase, self.start, self.stop = ("run" if last else "apply"), 0, 0
        if last:
            self.waiting.popleft()
        return piece

    @property
    def _at_once(self) -> bool:
        return self.phase == "run" and self.waiting[0].whole
