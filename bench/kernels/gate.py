"""What must hold before a speed is shown: the conformance suite, and errors against float64."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from bench.kernels.job import REGISTERED, Candidate, Errors, Job, Limits
from bench.kernels.timing import describe

# Of those that may compute as they like: beyond this it is another function.
LOOSE = Limits(0.25, 0.25)
UNKNOWN = Errors()


@dataclass(frozen=True)
class Verdict:
    """Of one candidate at one shape.

    Args:
        failure: why no speed may be shown, or None.
        errors: as far as they are known.
        checks: how many of the suite's checks passed, in words.
    """

    failure: str | None
    errors: Errors = UNKNOWN
    checks: str = ""


@dataclass
class Gate:
    """Runs the suite once for each kernel.

    Args:
        device: where.
        seconds: that one kernel's suite may take; what is not reached by then is not held against it.
    """

    device: torch.device
    seconds: float
    _known: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def judge(self, candidate: Candidate, job: Job) -> Verdict:
        """Return whether a candidate may be timed."""
        registered = candidate.kind == REGISTERED
        suite = self._suite(candidate.name, job) if registered else Verdict(None)
        if suite.failure is not None:
            return suite
        try:
            candidate.prepare()
            errors = candidate.errors()
        except Exception as error:  # whatever it raises is its result
            return Verdict(describe(error), checks=suite.checks)
        limits = job.limits if registered else LOOSE
        return Verdict(limits.exceeded(errors), errors, suite.checks)

    def _suite(self, name: str, job: Job) -> Verdict:
        key = (job.case.operation, name)
        if key not in self._known:
            self._known[key] = self._run(name, job)
        return self._known[key]

    def _run(self, name: str, job: Job) -> Verdict:
        deadline, total = time.monotonic() + self.seconds, len(job.checks)
        for passed, (title, check) in enumerate(job.checks):
            if time.monotonic() > deadline:
                return Verdict(None, checks=f"{passed} of {total} passed in {self.seconds:.0f} s")
            try:
                check(name, self.device)
            except Exception as error:  # a check may fail by any exception
                return Verdict(f"check {title!r}: {describe(error)}", checks=f"{passed} of {total} passed")
        return Verdict(None, checks=f"all {total} passed")
