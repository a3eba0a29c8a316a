"""One case after the other: judge, weigh, time, and write down."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.kernels import memory
from bench.kernels.cases import Case, Preset
from bench.kernels.ceilings import Ceilings
from bench.kernels.gate import Gate, Verdict
from bench.kernels.job import ANCHOR, BACKWARD, BASE, FORWARD, FULL, NAIVE, REGISTERED, Candidate, Job
from bench.kernels.jobs import build
from bench.kernels.timing import Key, Plan, Way, in_turns, quantile

Row = dict[str, Any]


@dataclass
class Sweep:
    """Measures cases.

    Args:
        device: where.
        preset: what, and how.
        rounds: of the interleaved providers.
        seconds: within which no case begins a further round; each gets its share of what is left.
        plugins: modules that registered kernels, for the processes that weigh.
        providers: the only ones wanted; none for all.
        check_seconds: for the conformance suite of one kernel.
        failed: names of registered kernels that failed.
    """

    device: torch.device
    preset: Preset
    rounds: int
    seconds: float
    plugins: Sequence[str]
    providers: Sequence[str]
    check_seconds: float
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ceilings = Ceilings(self.device, self.preset)
        self._gate = Gate(self.device, self.check_seconds)
        self._deadline = time.monotonic() + self.seconds

    def run(self) -> Iterator[list[Row]]:
        """Measure each case and yield its rows."""
        cases = self.preset.cases
        for index, case in enumerate(cases):
            yield self._case(case, len(cases) - index)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _case(self, case: Case, cases_left: int) -> list[Row]:
        job = build(case, self.device)
        wanted = [each for each in job.candidates if not self.providers or each.name in self.providers]
        verdicts = {each.name: self._gate.judge(each, job) for each in wanted if each.status is None}
        self.failed += [each.name for each in wanted if each.kind == REGISTERED and _failed(verdicts, each)]
        able = [each for each in wanted if each.name in verdicts and not _failed(verdicts, each)]
        weights = {each.name: None if each.kind == BASE else self._weigh(each, case) for each in able}
        rows: list[Row] = []
        temperatures = (False, True) if self.device.type == "cuda" else (False,)
        # Of what the checks have left: the first case pays for those of its operation.
        share = max(0.0, self._deadline - time.monotonic()) / cases_left / len(temperatures)
        for cold in temperatures:
            plan = Plan(self.device, self.rounds, self.preset.pause, time.monotonic() + share)
            ways = {(each.name, mode): Way(run, each.prepare) for each in able for mode, run in each.runs.items()}
            times, failures = in_turns(ways, plan, cold)
            self.failed += [each.name for each in able if each.kind == REGISTERED and _raised(each, failures)]
            for each in wanted:
                if each in able:
                    rows += self._rows(job, each, verdicts[each.name], weights[each.name], cold, times, failures)
                elif not cold:
                    rows.append(_known(case, each, verdicts.get(each.name, Verdict(each.status)), FULL, cold))
        _compare(rows)
        return rows

    def _weigh(self, candidate: Candidate, case: Case) -> int | None:
        try:
            return memory.extra_bytes(candidate, case, self.plugins, self.device)
        except Exception:  # its time will say what is wrong with it
            return None

    def _rows(
        self, job: Job, candidate: Candidate, verdict: Verdict, weight: int | None, cold: bool,
        times: dict[Key, list[list[float]]], failures: dict[Key, str],
    ) -> list[Row]:  # fmt: skip
        if (failure := _raised(candidate, failures)) is not None:
            return [_known(job.case, candidate, replace(verdict, failure=failure), FULL, cold)]
        rows = []
        for mode, seconds in _modes(candidate, times).items():
            row = _known(job.case, candidate, verdict, mode, cold) | _speed(seconds)
            row["extra_bytes"] = weight if mode == FULL else None
            if candidate.kind != BASE and mode in job.floors:
                row |= self._useful(job, mode, row["seconds_p50"])
            rows.append(row)
        return rows

    def _useful(self, job: Job, mode: str, median: float) -> Row:
        floor = job.floors[mode]
        least = self.ceilings.seconds(floor, job.case.torch_dtype)
        return {
            "useful_tflops": floor.flops / median / 1e12,
            "useful_gb_per_s": floor.nbytes / median / 1e9,
            "floor_seconds": least,
            "floor_fraction": least / median,
        }


def _speed(seconds: list[float]) -> Row:
    return {f"seconds_p{round(100 * q)}": quantile(seconds, q) for q in (0.2, 0.5, 0.8)} | {"rounds": len(seconds)}


def _raised(candidate: Candidate, failures: dict[Key, str]) -> str | None:
    return next((why for (name, _), why in failures.items() if name == candidate.name), None)


def _failed(verdicts: dict[str, Verdict], candidate: Candidate) -> bool:
    return candidate.name in verdicts and verdicts[candidate.name].failure is not None


def _modes(candidate: Candidate, times: dict[Key, list[list[float]]]) -> dict[str, list[float]]:
    """Return seconds by mode; a full run's marks tell its backward apart, which is never a difference of medians."""
    full = times[candidate.name, FULL]
    whole = {FULL: [sum(parts) for parts in full]}
    if FORWARD not in candidate.runs:
        return whole
    forward = [parts[0] for parts in times[candidate.name, FORWARD]]
    return {FORWARD: forward, BACKWARD: [parts[1] for parts in full], **whole}


def _known(case: Case, candidate: Candidate, verdict: Verdict, mode: str, cold: bool) -> Row:
    """Return a row with all that is known before the time."""
    failure = verdict.failure if candidate.status else verdict.failure and f"failed: {verdict.failure}"
    return {
        "operation": case.operation,
        "provider": candidate.name,
        "kind": candidate.kind,
        "chosen": mode in candidate.chosen or (mode == BACKWARD and FULL in candidate.chosen),
        "mode": mode,
        "temperature": "cold" if cold else "hot",
        "dtype": case.dtype,
        "N": case.n,
        "D": case.d,
        "V": case.v,
        "rank": case.rank,
        "upstream": candidate.upstream,
        "frozen": True,
        **dict.fromkeys(("seconds_p20", "seconds_p50", "seconds_p80", "rounds", "useful_tflops", "useful_gb_per_s")),
        **dict.fromkeys(("floor_seconds", "floor_fraction", "extra_bytes")),
        "logp_error": verdict.errors.logp,
        "dx_error": verdict.errors.gradient,
        "adapter_error": verdict.errors.adapter,
        "deterministic": verdict.errors.deterministic,
        "ratio_to_best_anchor": None,
        "checks": verdict.checks,
        "status": failure or "ok",
        "seed": case.seed,
    }


def _compare(rows: list[Row]) -> None:
    """Fill in how many times faster each is than the fastest anchor that does the whole work."""
    for row in rows:
        rivals = [
            other["seconds_p50"]
            for other in rows
            if (other["mode"], other["temperature"]) == (row["mode"], row["temperature"])
            and other["kind"] in (ANCHOR, NAIVE)
            and other["upstream"] == "vector"
            and other["seconds_p50"] is not None
        ]
        if rivals and row["seconds_p50"] is not None and row["kind"] != BASE:
            row["ratio_to_best_anchor"] = min(rivals) / row["seconds_p50"]
