"""What tests of the planner and of the device share: all stages of some requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tickwork.engine.plan import Planner, Stage
from tickwork.engine.request import Request


def lazily(planner: Planner, max_tokens: int) -> Iterator[Stage]:
    """Take stages as long as there are any."""
    while (stage := planner.next(max_tokens)) is not None:
        yield stage


def stages_of(planner: Planner, max_tokens: int) -> list[Stage]:
    """Take all that a planner has left."""
    return list(lazily(planner, max_tokens))


def plan(requests: Iterable[Request], max_tokens: int, *, merge: bool = True) -> list[Stage]:
    """Return the stages of requests that are all there before the first is planned."""
    planner = Planner(merge=merge)
    for request in requests:
        planner.add(request)
    return stages_of(planner, max_tokens)
