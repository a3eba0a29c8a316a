"""``Planner``: holds what was accepted, lane by lane, and hands it out fairly, stage by stage. Pure: no clock."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import attrs

from tickwork.engine.lane import Lane, Phase
from tickwork.engine.request import Request

__all__ = ["Pass", "Phase", "Piece", "Planner", "Stage"]


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
    """Samples to admit, then a pass or none, then steps, then decoding for ``decode`` seconds."""

    passes: tuple[Pass, ...] = ()
    steps: tuple[Request, ...] = ()
    samples: tuple[Request, ...] = ()
    decode: float = 0.0


class Planner:
    """The requests of all lanes that are not yet handed out, and whose turn it is.

    Lanes share passes as in start-time fair queueing (Goyal, Vin, Cheng 1996): each has a virtual time, the tokens it
    was served over its share, and the datum that comes next is that of the lane least served. A lane's quantum is what
    falls to it of a pass by the shares of all lanes that have rows to run. A lane that was away starts at the least of
    those that are there; one whose requests are too small for what it could have had makes up for one pass at most.
    From this follow:

    - A request of at most its lane's quantum is in the very next pass, whatever others hold, unless its lane is a
      quantum ahead of the one least served, or that one's next datum is longer than its own quantum.
    - Lanes that always have rows to run are served in proportion to their shares, but for a pass and a datum, where
      datums are no longer than quanta; else each gets its share of what a pass holds without the longest datum.
    - No pass leaves room in which the next datum of any lane would have fitted.

    Args:
        merge: whether requests of several lanes may share a pass; without, each is cut as if it were alone.
    """

    def __init__(self, *, merge: bool = True) -> None:
        self._merge = merge
        self._lanes: dict[str, Lane] = {}
        self._shares: dict[str, float] = {}
        self._samples: list[Request] = []
        self._held = 0
        # The virtual time of the lane least served, of those that have more to run, after the last pass and before it.
        self._least = self._before = 0.0
        self._present: set[Lane] = set()  # lanes that had rows to run in the last pass
        self._stepped = False  # whether the last stage was one of steps alone

    def __repr__(self) -> str:
        return f"<Planner {self._held} requests in {len(self._lanes)} lanes>"

    def __len__(self) -> int:
        """Requests of which not all has been handed out."""
        return self._held

    def add(self, request: Request) -> None:
        """Take a request in, behind those of its lane."""
        self._held += 1
        lane = self._lanes.get(request.lane)
        if request.kind == "sample":
            if lane is None or not lane.hold_back(request):
                self._samples.append(request)
            return
        if lane is None:
            lane = self._lanes[request.lane] = Lane(request.lane)
        lane.add(request)

    def set_share(self, name: str, share: float) -> None:
        """Set a lane's part of a busy device, in proportion to those of the others; 1 unless set. Room: any thread."""
        self._shares[name] = share

    def forget(self, name: str) -> None:
        """Drop a lane's share: it has ended."""
        self._shares.pop(name, None)

    def samples(self) -> tuple[Request, ...]:
        """Hand out the samples that have all steps before them in their lane behind them; no pass holds them back."""
        taken, self._samples = tuple(self._samples), []
        self._held -= len(taken)
        return taken

    def next(self, max_tokens: int) -> Stage | None:
        """Hand out the next stage: samples, and one pass or none, and of each lane one step at most.

        Steps that wait for nothing run before a pass, so that the rows behind them can share it, but no two stages of
        steps alone follow each other while there are rows to run. After a pass come the steps that it makes ready.

        Args:
            max_tokens: tokens of one pass; a single longer datum gets a pass of its own.

        Returns:
            None if nothing is held.
        """
        samples = self.samples()
        ready = [lane for lane in self._lanes.values() if lane.kind == "pass"]
        steps_wait = any(lane.kind == "step" for lane in self._lanes.values())
        passes = (self._compose(ready, max_tokens),) if ready and (self._stepped or not steps_wait) else ()
        steps = self._steps()
        self._stepped = bool(steps) and not passes
        self._tidy()
        return Stage(passes, steps, samples) if samples or passes or steps else None

    def _steps(self) -> tuple[Request, ...]:
        taken = []
        for lane in self._lanes.values():
            if lane.kind == "step":
                step, freed = lane.take_step()
                taken.append(step)
                self._samples += freed
        self._held -= len(taken)
        return tuple(taken)

    def _compose(self, ready: Sequence[Lane], max_tokens: int) -> Pass:
        for lane in ready:
            lane.begin(max_tokens, self._shares.get(lane.name, 1.0))
        level = max_tokens / sum(lane.share for lane in ready)
        self._admit(ready)
        whole = _served_whole([lane for lane in ready if lane.virtual <= self._least + level], ready, max_tokens)
        order = sorted(ready, key=lambda lane: (lane.virtual, lane not in whole, lane.left, lane.waiting[0].received))
        if not self._merge:
            order = order[:1]
            whole = set(order) if order[0].left <= max_tokens else set()
        chosen = _fill(order, whole, max_tokens)
        pieces = {lane: Piece(*lane.cut()) for lane in chosen}
        self._held -= sum(piece.last for piece in pieces.values())
        unfinished = [lane.virtual for lane in ready if lane not in pieces or not pieces[lane].last]
        least = min(unfinished) if unfinished else max(lane.virtual for lane in ready)
        self._before, self._least = self._least, max(self._least, least)
        return Pass(tuple(pieces.values()))

    def _admit(self, ready: Sequence[Lane]) -> None:
        """Bring up the virtual time of lanes that had no use for what they could have had."""
        stayed = [lane for lane in ready if lane in self._present]
        for lane in stayed:
            if not lane.begun:
                lane.virtual = max(lane.virtual, self._before)
        least = min((lane.virtual for lane in stayed), default=self._least)
        for lane in ready:
            if lane not in self._present:
                lane.virtual = max(lane.virtual, least)
        self._present = set(ready)

    def _tidy(self) -> None:
        """Forget idle lanes, except where they were served ahead of the others."""
        if self._held:
            self._lanes = {k: lane for k, lane in self._lanes.items() if lane.waiting or lane.virtual > self._least}
        else:
            self._lanes, self._present, self._least, self._before = {}, set(), 0.0, 0.0


def _served_whole(candidates: Sequence[Lane], ready: Sequence[Lane], max_tokens: int) -> set[Lane]:
    """Find the lanes whose request is small enough to be run whole, by max-min fairness: the smallest first."""
    found = set()
    room, shares = float(max_tokens), sum(lane.share for lane in ready)
    for lane in sorted(candidates, key=lambda lane: lane.left / lane.share):
        if lane.left * shares <= room * lane.share:
            found.add(lane)
            room, shares = room - lane.left, shares - lane.share
    return found


def _fill(order: Sequence[Lane], whole: set[Lane], max_tokens: int) -> list[Lane]:
    """Choose the datums of one pass: of the lane least served one at least, small requests whole, then one by one."""
    room, chosen = max_tokens, dict.fromkeys(order[:1])
    room -= order[0].take(order[0] in whole)
    for lane in order[1:]:
        if lane in whole and lane.left <= room:
            chosen[lane] = None
            room -= lane.take(True)
    heap = [(lane.virtual, index) for index, lane in enumerate(order) if not lane.through]
    heapify(heap)
    while heap:
        lane = order[index := heappop(heap)[1]]
        # What does not fit now will not fit later either.
        if lane.datum <= room:
            chosen[lane] = None
            room -= lane.take(False)
            if not lane.through:
                heappush(heap, (lane.virtual, index))
    return list(chosen)
