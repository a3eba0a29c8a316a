"""``probe``: how a probe is declared, and what it can find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

import attrs
import numpy as np

if TYPE_CHECKING:
    from tickwork.conformance.target import Target


class Verdict(StrEnum):
    """What became of a probe."""

    PASS = "PASS"
    REFUSED = "REFUSED"
    IGNORED = "IGNORED"
    WRONG = "WRONG"
    BROKEN = "BROKEN"
    SKIPPED = "SKIPPED"


BAD = frozenset({Verdict.IGNORED, Verdict.WRONG, Verdict.BROKEN})


@attrs.frozen
class Finding:
    """One row of the report."""

    group: str
    name: str
    verdict: Verdict
    found: str


class FoundError(Exception):
    """Ends a probe with a verdict other than PASS."""

    def __init__(self, verdict: Verdict, found: str) -> None:
        super().__init__(found)
        self.verdict = verdict


# Returns what it found, in a few words.
Act = Callable[["Target"], str]


@attrs.frozen
class Probe:
    """A question to a server."""

    group: str
    name: str
    act: Act


REGISTRY: list[Probe] = []


def probe(act: Act) -> Act:
    """Declare a probe; it is named like its function, its group like its module."""
    REGISTRY.append(Probe(act.__module__.rpartition(".")[2], act.__name__, act))
    return act


def same(a: object, b: object, what: str, verdict: Verdict = Verdict.WRONG, tolerance: float = 2e-4) -> None:
    """Require two numbers or arrays to be equal."""
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape:
        raise FoundError(verdict, f"{what}: shapes {first.shape} and {second.shape}")
    if not np.allclose(first, second, rtol=min(tolerance, 0.01), atol=tolerance):
        raise FoundError(verdict, f"{what}: off by {np.abs(first - second).max():.3g}")


def differs(a: object, b: object, what: str, verdict: Verdict = Verdict.IGNORED, least: float = 1e-6) -> None:
    """Require two numbers or arrays to differ."""
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape == second.shape and np.abs(first - second).max(initial=0.0) <= least:
        raise FoundError(verdict, what)


def require(fine: bool, what: str, verdict: Verdict = Verdict.WRONG) -> None:
    """Require something to hold."""
    if not fine:
        raise FoundError(verdict, what)


@contextmanager
def refused(target: Target, what: str) -> Iterator[None]:
    """Require a refusal: a 4xx, or a failed request that is the user's."""
    try:
        yield
    except Exception as error:
        if target.is_refusal(error):
            return
        raise
    raise FoundError(Verdict.IGNORED, f"{what} was accepted")
