"""The head: every registered implementation, full logits under autograd, and the anchors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from bench.kernels import oracle
from bench.kernels.anchors import ANCHORS, AbsentError, Anchor, Forward
from bench.kernels.cases import Case
from bench.kernels.inputs import HeadInputs, make
from bench.kernels.job import ANCHOR, FORWARD, FULL, NAIVE, REGISTERED, Candidate, Errors, Floor, Job, Limits, Mark, Run
from tickwork_kernels import HeadKernel, explain, linear_logprob
from tickwork_kernels.conformance import head as conformance
from tickwork_kernels.heads import HEADS
from tickwork_kernels.registry import Choice

SMALL = (256, 256, 2048)
SAMPLED_ROWS = 64
# A bfloat16 gradient is rounded once itself, and was made from rounded probabilities.
LIMITS = {"bfloat16": Limits(1e-3, 2**-6), "float32": Limits(1e-3, 1e-3), "float64": Limits(1e-9, 1e-9)}


def build(case: Case, device: torch.device) -> Job:
    """Return the job of a case."""
    inputs = make(case, device)
    candidates = [*_registered(inputs, case), _candidate("naive", NAIVE, naive, inputs, case)]
    candidates += [_anchor(each, inputs, case) for each in ANCHORS]
    return Job(case, candidates, _floors(case), conformance.checks(), LIMITS[case.dtype])


def naive(inputs: HeadInputs) -> torch.Tensor:
    """All logits at once, under autograd."""
    logits = (inputs.hidden @ inputs.weight.T).float()
    if (lora := inputs.lora) is not None:
        logits = logits + lora.scale * (inputs.hidden.float() @ lora.a.T @ lora.b.T)
    return logits.log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]


def ours(name: str, inputs: HeadInputs) -> torch.Tensor:
    """An implementation of this package, by name."""
    return linear_logprob(
        inputs.hidden, inputs.weight, inputs.targets, lora=inputs.lora, impl=name, check=False
    ).logprobs


def _registered(inputs: HeadInputs, case: Case) -> list[Candidate]:
    found, choice = [], _choices(inputs)
    for kernel in HEADS.all():
        why = choice[FULL].refused.get(kernel.name)
        made = _candidate(kernel.name, REGISTERED, partial(ours, kernel.name), inputs, case)
        chosen = tuple(mode for mode, each in choice.items() if each.name == kernel.name)
        found.append(replace(made, status=why and f"refused: {why}", chosen=chosen))
    return found


def _choices(inputs: HeadInputs) -> Mapping[str, Choice[HeadKernel]]:
    def ask() -> Choice[HeadKernel]:
        return explain(inputs.hidden, inputs.weight, inputs.targets, lora=inputs.lora)

    full = ask()
    with torch.no_grad():
        return {FULL: full, FORWARD: ask()}


def _anchor(anchor: Anchor, inputs: HeadInputs, case: Case) -> Candidate:
    try:
        forward, status = anchor.load(), None
    except AbsentError as error:
        forward, status = naive, f"absent: {error}"
    if inputs.lora is not None:
        status = "absent: it has no adapter of the head"
    made = _candidate(anchor.name, ANCHOR, forward, inputs, case, anchor.upstream)
    return replace(made, status=status)


def _candidate(
    name: str, kind: str, forward: Forward, inputs: HeadInputs, case: Case, upstream: str = "vector"
) -> Candidate:
    runs: dict[str, Run] = {FORWARD: _forward(forward, inputs), FULL: _full(forward, inputs, upstream)}
    return Candidate(name, kind, runs, partial(_errors, forward, inputs, case, upstream), upstream=upstream)


def _forward(forward: Forward, inputs: HeadInputs) -> Run:
    def run(mark: Mark) -> torch.Tensor:
        with torch.no_grad():
            return forward(inputs)

    return run


def _full(forward: Forward, inputs: HeadInputs, upstream: str) -> Callable[[Mark], list[torch.Tensor]]:
    given = inputs.upstream if upstream == "vector" else inputs.upstream.new_ones(())

    def run(mark: Mark) -> list[torch.Tensor]:
        logprobs = forward(inputs)
        mark()
        return [logprobs.detach(), *torch.autograd.grad(logprobs, inputs.leaves, given)]

    return run


def _errors(forward: Forward, inputs: HeadInputs, case: Case, upstream: str) -> Errors:
    """Compare all rows at a small shape, and some at the benchmark's; look whether a repeat has the same bits."""
    few = make(case.at(*SMALL), inputs.hidden.device)
    small = _compare(_full(forward, few, upstream)(lambda: None), few, upstream, len(few.targets))
    run = _full(forward, inputs, upstream)
    first = run(lambda: None)
    large = _compare(first, inputs, upstream, min(SAMPLED_ROWS, len(inputs.targets)))
    same = all(torch.equal(one, other) for one, other in zip(first, run(lambda: None), strict=True))
    logp, gradient, adapter = (_worst(*pair) for pair in zip(small, large, strict=True))
    return Errors(logp, gradient, adapter, same)


def _worst(*errors: float | None) -> float | None:
    found = [error for error in errors if error is not None]
    return float(torch.tensor(found).max()) if found else None  # NaN is the worst


def _compare(
    found: list[torch.Tensor], inputs: HeadInputs, upstream: str, count: int
) -> tuple[float | None, float, float | None]:
    whole = count == len(inputs.targets)
    rows = torch.linspace(0, len(inputs.targets) - 1, count, device=inputs.targets.device).long()
    scalar = upstream == "scalar"
    exact = oracle.exact(inputs, rows, torch.ones_like(rows) if scalar else inputs.upstream[rows])
    logp: float | None = None
    if not scalar:
        logp = float((found[0][rows].double() - exact.logprobs).abs().max())
    elif whole:  # of a sum, all rows or nothing
        logp = abs(float(found[0].double() - exact.logprobs.sum())) / count
    adapter = None
    if whole and exact.adapter is not None:
        adapter = max(oracle.error(*pair) for pair in zip(found[2:], exact.adapter, strict=True))
    return logp, oracle.row_error(found[1][rows], exact.hidden), adapter


def build_floor(case: Case) -> Floor:
    """Return what forward and backward must do."""
    return _floors(case)[FULL]


def _floors(case: Case) -> Mapping[str, Floor]:
    """One GEMM forward and one back; of an adapter two thin ones forward and four back."""
    gemm, thin = 2 * case.n * case.d * case.v, 2 * case.n * case.rank * (case.d + case.v)
    size = case.torch_dtype.itemsize
    read = size * (case.n * case.d + case.v * case.d) + 12 * case.n + 4 * case.rank * (case.d + case.v)
    written = size * case.n * case.d + 4 * case.rank * (case.d + case.v)
    return {FORWARD: Floor(gemm + thin, read), FULL: Floor(2 * gemm + 3 * thin, read + written)}
