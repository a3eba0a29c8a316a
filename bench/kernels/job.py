"""What the sweep handles, whatever the operation: candidates, how each is run and checked, and the floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels.cases import Case

Mark = Callable[[], None]
Run = Callable[[Mark], object]

REGISTERED, NAIVE, ANCHOR, BASE = "registered", "naive", "anchor", "base"
FORWARD, BACKWARD, FULL = "forward", "backward", "full"
MODES = (FORWARD, BACKWARD, FULL)


@dataclass(frozen=True)
class Errors:
    """How far a candidate is from float64; None where there is nothing of the kind.

    Args:
        logp: largest absolute error of a logprob, or of the mean logprob where only their sum is returned.
        gradient: largest relative L2 error of a row of the hidden states' gradient; of ``adamw`` that of an
            adapter's update, of ``multi_lora`` the largest one of output and gradients.
        adapter: largest relative L2 error of the gradients of an adapter of the head.
        deterministic: whether two runs gave the same bits.
    """

    logp: float | None = None
    gradient: float | None = None
    adapter: float | None = None
    deterministic: bool | None = None


@dataclass(frozen=True)
class Limits:
    """Above which errors no speed is shown."""

    logp: float
    gradient: float

    def exceeded(self, errors: Errors) -> str | None:
        """Return which error is too large; None if none is."""
        for name, found, limit in (
            ("logprobs", errors.logp, self.logp),
            ("gradients", errors.gradient, self.gradient),
            ("adapter gradients", errors.adapter, self.gradient),
        ):
            if found is not None and not found <= limit:  # NaN is too large as well
                return f"{name} are off by {found:.3g}, {limit:.3g} allowed"
        return None


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Candidate:
    """One provider of an operation at one shape.

    Args:
        name: of the provider.
        kind: ``"registered"`` in the kernel package, ``"naive"``, ``"anchor"`` of somebody else, or ``"base"``, what
            the operation comes on top of.
        runs: mode -> how to run it once; a full run marks the end of its forward.
        errors: compare it with float64.
        prepare: what has to be done before each run, untimed.
        upstream: ``"vector"`` if each token may have a gradient of its own, else ``"scalar"``.
        status: ``"refused: why"`` or ``"absent: why"``, or None where it can run.
        chosen: modes in which ``impl="auto"`` takes it.
    """

    name: str
    kind: str
    runs: Mapping[str, Run]
    errors: Callable[[], Errors]
    prepare: Callable[[], None] = nothing
    upstream: str = "vector"
    status: str | None = None
    chosen: Sequence[str] = ()


@dataclass(frozen=True)
class Floor:
    """What an operation must do whoever does it.

    Args:
        flops: floating-point operations.
        nbytes: bytes that must be read or written once.
    """

    flops: float
    nbytes: float


@dataclass(frozen=True)
class Job:
    """One case, ready to be measured.

    Args:
        case: the operation and its shape.
        candidates: who does it.
        floors: mode -> what must be done; a backward has none, since it may have been done in the forward.
        checks: the conformance suite, ``(name, check(impl, device))``.
        limits: of the errors of what is registered.
    """

    case: Case
    candidates: Sequence[Candidate]
    floors: Mapping[str, Floor]
    checks: Sequence[tuple[str, Callable[[str, torch.device], Any]]]
    limits: Limits
