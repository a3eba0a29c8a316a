"""What an engine counts, for itself and lane by lane, and the hint that follows from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import attrs

from tickwork.engine.plan import Stage
from tickwork.engine.request import Request

# A lane that was away for more cycles than this paused of its own accord; its client was not just waiting for a result.
PAUSE = 4
# Cycles that are watched before anything is said of a lane.
WATCHED = 8


@attrs.frozen
class LaneStatistics:
    """What has become of one lane since its first pass; a lane that only steps or samples has none.

    Args:
        cycles: windows that closed while a request of it was accepted and not settled.
        missed: windows that closed while none was.
        requests: passes and steps settled.
        tokens: tokens of its rows in passes.
        waited: seconds, all together, between the arrival of a pass or step and the start of its first stage.
        device: seconds of the device that fall to it: a stage's time is divided by tokens, that of one without
            tokens equally. Decoding is nobody's.
        hint: one sentence if its client loses time by waiting for each result, else None.
    """

    cycles: int
    missed: int
    requests: int = 0
    tokens: int = 0
    waited: float = 0.0
    device: float = 0.0
    hint: str | None = None


@attrs.frozen
class EngineStatistics:
    """What an engine has done since it started.

    Args:
        cycles: windows closed.
        passes: passes run.
        tokens: tokens of those passes.
        requests: requests settled.
        busy: seconds the executor was at work.
        uptime: seconds since the start; ``busy / uptime`` is the occupancy.
        queued: requests accepted of which not all was handed to the executor.
        peak_queued: the most there ever were.
        credits: weight inside the door, of ``credit_limit``.
        waiting: callers in front of the door.
        lanes: by lane, those that were released excepted.
    """

    cycles: int
    passes: int
    tokens: int
    requests: int
    busy: float
    uptime: float
    queued: int
    peak_queued: int
    credits: int
    credit_limit: int
    waiting: int
    lanes: dict[str, LaneStatistics]


@attrs.define(eq=False)
class _Lane:
    """Counters of one lane.

    Args:
        since: cycles before its first pass.
        last: the last cycle that held it; ``busy`` counts the cycles with a pass of anybody's up to then.
        drew: whether its last result was a sample, without which its client may have nothing to submit.
        late: cycles with passes of others that closed between two of its own, no more than ``PAUSE`` apart;
            ``away`` counts those without passes too.
    """

    since: int
    last: int
    busy: int
    drew: bool = False
    cycles: int = 0
    late: int = 0
    away: int = 0
    requests: int = 0
    tokens: int = 0
    waited: float = 0.0
    device: float = 0.0

    def hold(self, cycle: int, busy_before: int) -> None:
        """Note a cycle that holds it."""
        away = cycle - self.last - 1
        if 0 < away <= PAUSE and not self.drew:
            self.away += away
            self.late += busy_before - self.busy
        self.cycles += 1
        self.last = cycle

    @property
    def hint(self) -> str | None:
        """What its client could do better: more than a third of the cycles near its own passed it by."""
        watched = self.cycles + self.away
        if watched < WATCHED or 3 * self.late <= watched:
            return None
        return f"missed {self.late} of {watched} cycles: submit the next request before you await the last one's result"

    def told(self, cycles: int) -> LaneStatistics:
        """Return what is shown of it."""
        missed = cycles - self.since - self.cycles
        return LaneStatistics(self.cycles, missed, self.requests, self.tokens, self.waited, self.device, self.hint)


@attrs.define(eq=False)
class Counters:
    """Counts cycles, stages and results as they come. Room: the engine's thread; others may read."""

    cycles: int = 0
    passes: int = 0
    tokens: int = 0
    requests: int = 0
    busy: float = 0.0
    started: float = 0.0
    peak: int = 0
    _busy_cycles: int = 0  # those that held a pass
    _live: dict[str, int] = attrs.Factory(lambda: defaultdict(int))  # by lane, requests in a cycle and not settled
    _live_passes: int = 0
    _lanes: dict[str, _Lane] = attrs.Factory(dict)

    def lanes(self) -> dict[str, LaneStatistics]:
        """Return the statistics of each lane."""
        return {name: lane.told(self.cycles) for name, lane in dict(self._lanes).items()}

    def hint(self, name: str) -> str | None:
        """Return a lane's hint."""
        lane = self._lanes.get(name)
        return None if lane is None else lane.hint

    def device_seconds(self, name: str) -> float:
        """Return a lane's seconds of the device."""
        lane = self._lanes.get(name)
        return 0.0 if lane is None else lane.device

    def begin_cycle(self, requests: Iterable[Request]) -> None:
        """Count a window that closes, with the requests that it lets in."""
        self.cycles += 1
        for request in requests:
            self._live[request.lane] += 1
            self._live_passes += request.kind == "pass"
            if request.kind == "pass" and request.lane not in self._lanes:
                self._lanes[request.lane] = _Lane(self.cycles - 1, self.cycles - 1, self._busy_cycles)
        busy_before, self._busy_cycles = self._busy_cycles, self._busy_cycles + (self._live_passes > 0)
        for name in self._live:
            if (lane := self._lanes.get(name)) is not None:
                lane.hold(self.cycles, busy_before)
                lane.busy = self._busy_cycles

    def ran(self, stage: Stage, begun: float, ended: float) -> None:
        """Count a stage."""
        self.busy += ended - begun
        self.passes += len(stage.passes)
        self.tokens += sum(item.tokens for item in stage.passes)
        tokens = {piece.request: piece.tokens for item in stage.passes for piece in item.pieces}
        parts = tokens if any(tokens.values()) else dict.fromkeys([*tokens, *stage.steps], 1)
        for request in [*tokens, *stage.steps]:
            if (lane := self._lanes.get(request.lane)) is not None:
                lane.tokens += tokens.get(request, 0)
                lane.device += (ended - begun) * parts.get(request, 0) / sum(parts.values())
        for request in _begun_in(stage):
            if (lane := self._lanes.get(request.lane)) is not None:
                lane.waited += begun - request.received

    def settled(self, request: Request) -> None:
        """Count a result; the last of a lane takes the lane's records with it."""
        self.requests += 1
        if request.kind == "call":
            return
        self._live_passes -= request.kind == "pass"
        self._live[request.lane] -= 1
        if not self._live[request.lane]:
            del self._live[request.lane]
        if request.ends_lane:
            self._lanes.pop(request.lane, None)
        elif (lane := self._lanes.get(request.lane)) is not None:
            lane.drew = request.kind == "sample"
            lane.requests += not lane.drew


def _begun_in(stage: Stage) -> list[Request]:
    pieces = [piece for item in stage.passes for piece in item.pieces]
    return [piece.request for piece in pieces if not piece.start and piece.phase != "apply"] + list(stage.steps)
