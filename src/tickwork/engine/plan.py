"""The planner: a pure function from the requests of one cycle to its stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import attrs

from tickwork.engine.request import Request

Phase = Literal["run", "probe", "apply"]


@attrs.frozen
class Piece:
    """Datums ``start`` to ``stop`` of one request, and what a pass does with them.

    Args:
        phase: ``run`` does all of it; a custom loss too large for one pass is split into ``probe`` pieces
            (logprobs only) and, once its callable knows the gradients, ``apply`` pieces (forward and backward).
        last: whether the request is through after it.
    """

    request: Request
    start: int
    stop: int
    phase: Phase = "run"
    last: bool = True

    @property
    def tokens(self) -> int:
        """Tokens in its rows."""
        return sum(self.request.rows[self.start : self.stop])


@attrs.frozen
class Pass:
    """Pieces that go through the model together; at most one request of each lane."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Tokens in its rows."""
        return sum(piece.tokens for piece in self.pieces)


@attrs.frozen
class Stage:
    """Samples to admit, then passes, then steps, then decoding for ``decode`` seconds."""

    passes: tuple[Pass, ...] = ()
    steps: tuple[Request, ...] = ()
    samples: tuple[Request, ...] = ()
    decode: float = 0.0

    def jobs(self) -> list[Stage]:
        """Cut into parts with one pass each, so that results come, and an abort takes effect, pass by pass."""
        passes: list[tuple[Pass, ...]] = [(item,) for item in self.passes] or [()]
        first, last = 0, len(passes) - 1
        return [
            Stage(item, self.steps if index == last else (), self.samples if index == first else ())
            for index, item in enumerate(passes)
        ]


def plan(requests: Iterable[Request], max_tokens: int) -> list[Stage]:
    """Arrange the requests of one cycle.

    A request's level is the number of barriers ahead of it in its own lane. Requests of equal level share
    passes across lanes; then that level's steps run; then comes the next level.

    Args:
        requests: in order of arrival.
        max_tokens: tokens of one pass; a single longer datum gets a pass of its own.
    """
    barriers: dict[str, int] = defaultdict(int)
    levels: dict[int, list[Request]] = defaultdict(list)
    for request in requests:
        levels[barriers[request.lane]].append(request)
        barriers[request.lane] += request.kind == "step"
    return [_stage(levels[level], max_tokens) for level in sorted(levels)]


def _stage(requests: Sequence[Request], max_tokens: int) -> Stage:
    return Stage(
        passes=tuple(
            packed for turn in _turns(r for r in requests if r.kind == "pass") for packed in _pack(turn, max_tokens)
        ),
        steps=tuple(r for r in requests if r.kind == "step"),
        samples=tuple(r for r in requests if r.kind == "sample"),
    )


def _turns(requests: Iterable[Request]) -> list[list[Request]]:
    """Split into turns with one request of each lane.

    Two requests of one lane never share a pass: whether they arrive in one cycle is a matter of timing, and
    a client's numbers must not be. It also lets a failed pass be undone for one request alone.
    """
    seen: dict[str, int] = defaultdict(int)
    turns: dict[int, list[Request]] = defaultdict(list)
    for request in requests:
        turns[seen[request.lane]].append(request)
        seen[request.lane] += 1
    return [turns[turn] for turn in sorted(turns)]


def _pack(requests: Iterable[Request], max_tokens: int) -> list[Pass]:
    """Fill passes with whole pieces, smallest requests first, so that nobody waits behind a larger neighbour."""
    passes: list[list[Piece]] = []
    room = 0
    for request in sorted(requests, key=lambda r: sum(r.rows)):
        for piece in _pieces(request, max_tokens):
            if not passes or piece.tokens > room or any(other.request is request for other in passes[-1]):
                passes.append([])
                room = max_tokens
            passes[-1].append(piece)
            room -= piece.tokens
    return [Pass(tuple(pieces)) for pieces in passes]


def _pieces(request: Request, max_tokens: int) -> list[Piece]:
    bounds = _bounds(request.rows, max_tokens)
    phases: tuple[Phase, ...] = ("probe", "apply") if request.whole and len(bounds) > 1 else ("run",)
    parts = [(start, stop, phase) for phase in phases for start, stop in bounds]
    return [Piece(request, *part, last=part is parts[-1]) for part in parts]


def _bounds(rows: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Cut a request between datums so that each part holds at most ``max_tokens``."""
    bounds: list[tuple[int, int]] = []
    start = filled = 0
    for index, tokens in enumerate(rows):
        if index > start and filled + tokens > max_tokens:
            bounds.append((start, index))
            start, filled = index, 0
        filled += tokens
    return [*bounds, (start, len(rows))]
