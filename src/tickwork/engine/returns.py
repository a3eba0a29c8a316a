"""``Returns``: which clients are about to come back, so that the pass they would share does not start without them."""

from __future__ import annotations

from collections import defaultdict

from tickwork.engine.request import Request

# Of the last pass's time: whoever came back later than that last time is not waited for.
PATIENCE = 0.2
# A client is given up once it has taken so many times as long as last time.
SLACK = 4.0


class Returns:
    """Learns how soon each lane's client submits its next request after the last of its results.

    Without it, of clients who wait for their results the first to come back after a shared pass would have the next
    one to itself, and all others the one after that. A client alone is never waited for, nor one who submits ahead, nor
    one who thinks; waiting takes ``PATIENCE`` of a pass's time at most.

    Room: the engine's thread.
    """

    def __init__(self) -> None:
        self._trains: set[str] = set()  # lanes that have had a pass, until they end
        self._held: dict[str, int] = defaultdict(int)  # passes and steps accepted and not settled
        self._away: dict[str, float] = {}  # lanes that hold none, and since when
        self._gaps: dict[str, float] = {}  # seconds that each was away the last time
        self._limit = 0.0

    def accepted(self, request: Request, now: float) -> None:
        """Note an arrival."""
        if request.kind == "pass":
            self._trains.add(request.lane)
        if request.kind in ("pass", "step"):
            self._held[request.lane] += 1
            if (since := self._away.pop(request.lane, None)) is not None:
                self._gaps[request.lane] = now - since

    def settled(self, request: Request, now: float) -> None:
        """Note a result."""
        if request.kind not in ("pass", "step"):
            return
        self._held[request.lane] -= 1
        if not self._held[request.lane]:
            del self._held[request.lane]
            if request.lane in self._trains:
                self._away[request.lane] = now
        if request.ends_lane:
            self._trains.discard(request.lane)
            self._away.pop(request.lane, None)
            self._gaps.pop(request.lane, None)

    def ran(self, seconds: float) -> None:
        """Note how long a stage with a pass took."""
        self._limit = PATIENCE * seconds

    def until(self, now: float) -> float:
        """Return how long to wait for those who are about to come back; ``now`` if for nobody."""
        gaps = [(since, self._gaps.get(lane, self._limit)) for lane, since in self._away.items()]
        return max((since + min(self._limit, SLACK * gap) for since, gap in gaps if gap < self._limit), default=now)
