"""Multi-LoRA: what the adapters of a packed batch cost on top of the base projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.kernels import oracle
from bench.kernels.anchors import AbsentError, named
from bench.kernels.cases import SEGMENTS, Case
from bench.kernels.job import (
    ANCHOR,
    BASE,
    FORWARD,
    FULL,
    REGISTERED,
    Candidate,
    Errors,
    Floor,
    Job,
    Limits,
    Mark,
    Run,
    nothing,
)
from tickwork_kernels.conformance import multi_lora as conformance
from tickwork_kernels.multi_lora import MULTI_LORA, LoraSegment, MultiLoraCase, multi_lora
from tickwork_kernels.multi_lora import explain_multi_lora as explain

SMALL = (192, 128, 256)
SCALE = 2.0
LIMITS = {"bfloat16": Limits(1e-3, 2**-5), "float32": Limits(1e-3, 1e-3)}


@dataclass(frozen=True)
class Batch:
    """Packed tokens of several adapters.

    Args:
        x: ``[T, d_in]``, requires a gradient; ``y`` ``[T, d_out]`` the base's output, likewise.
        a: ``[r, d_in]`` of each segment; ``b`` ``[d_out, r]``. All require gradients.
        stacked: the same as two tensors, for who needs them so.
        bounds: where segments begin and the last one ends.
        upstream: ``[T, d_out]``.
    """

    x: torch.Tensor
    y: torch.Tensor
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    stacked: tuple[torch.Tensor, torch.Tensor]
    bounds: list[int]
    upstream: torch.Tensor

    @property
    def segments(self) -> list[LoraSegment]:
        """As the kernels take them."""
        spans = zip(self.bounds, self.bounds[1:], strict=False)
        return [LoraSegment(*span, self.a[i], self.b[i], SCALE) for i, span in enumerate(spans)]


Forward = Callable[[Batch], torch.Tensor]


def build(case: Case, device: torch.device) -> Job:
    """Return the job of a case."""
    batch = make(case, device)
    auto = explain(batch.x, batch.y, batch.segments).name
    candidates = []
    for each in MULTI_LORA.all():
        why = each.why_not(MultiLoraCase(batch.x, batch.y, batch.segments))
        made = _candidate(each.name, REGISTERED, partial(ours, each.name), batch, case)
        chosen = (FORWARD, FULL) if each.name == auto else ()
        candidates.append(replace(made, status=why and f"refused: {why}", chosen=chosen))
    grouped = _candidate("torch-grouped", ANCHOR, grouped_mm, batch, case, stacked=True)
    candidates += [replace(grouped, status=_why_no_grouped()), _base(batch, case)]
    thin, size = 2 * case.n * case.rank * (case.d + case.v), case.torch_dtype.itemsize
    forward = Floor(thin, size * case.n * (case.d + 2 * case.v))
    full = Floor(3 * thin, forward.nbytes + size * case.n * (2 * case.d + case.v))
    return Job(case, candidates, {FORWARD: forward, FULL: full}, conformance.checks(), LIMITS[case.dtype])


def make(case: Case, device: torch.device) -> Batch:
    """Draw a batch whose segments differ in length."""
    draw = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device) * scale

    def separate(whole: torch.Tensor) -> list[torch.Tensor]:
        return [part.detach().clone().requires_grad_() for part in whole]

    shares = [1 + index % 3 for index in range(SEGMENTS)]
    bounds = [case.n * sum(shares[:index]) // sum(shares) for index in range(SEGMENTS + 1)]
    dtype = case.torch_dtype
    a = normal(SEGMENTS, case.rank, case.d, scale=case.d**-0.5).requires_grad_()
    b = normal(SEGMENTS, case.v, case.rank, scale=case.rank**-0.5).requires_grad_()
    return Batch(
        normal(case.n, case.d).to(dtype).requires_grad_(),
        normal(case.n, case.v).to(dtype).requires_grad_(),
        separate(a),
        separate(b),
        (a, b),
        bounds,
        normal(case.n, case.v).to(dtype),
    )


def ours(name: str, batch: Batch) -> torch.Tensor:
    """An implementation of this package, by name."""
    return multi_lora(batch.x, batch.y, batch.segments, impl=name)


def grouped_mm(batch: Batch) -> torch.Tensor:
    """Torch's grouped matmul, down and up."""
    function = named("torch.nn.functional", "grouped_mm", f"torch {torch.__version__}")
    ends = torch.tensor(batch.bounds[1:], dtype=torch.int32, device=batch.x.device)
    a, b = (weight.to(batch.x.dtype).transpose(1, 2) for weight in batch.stacked)
    up: torch.Tensor = function(function(batch.x, a, offs=ends), b, offs=ends)
    return batch.y + SCALE * up


def _why_no_grouped() -> str | None:
    try:
        named("torch.nn.functional", "grouped_mm", f"torch {torch.__version__}")
    except AbsentError as error:
        return f"absent: {error}"
    return None


def _candidate(name: str, kind: str, forward: Forward, batch: Batch, case: Case, stacked: bool = False) -> Candidate:
    def idle(mark: Mark) -> torch.Tensor:
        with torch.no_grad():
            return forward(batch)

    runs: dict[str, Run] = {FORWARD: idle, FULL: partial(_full, forward, batch, stacked)}
    return Candidate(name, kind, runs, partial(_errors, forward, case, stacked, batch.x.device))


def _full(forward: Forward, batch: Batch, stacked: bool, mark: Mark) -> list[torch.Tensor]:
    """Return the output and all gradients, those of the adapters one by one or stacked."""
    out = forward(batch)
    mark()
    leaves = [batch.x, batch.y, *(batch.stacked if stacked else batch.a + batch.b)]
    return [out.detach(), *torch.autograd.grad(out, leaves, batch.upstream)]


def _base(batch: Batch, case: Case) -> Candidate:
    """The projection itself, forward and back to its input: what 100 % of overhead would be."""
    weight = torch.randn(case.v, case.d, device=batch.x.device).to(batch.x.dtype)

    def idle(mark: Mark) -> torch.Tensor:
        return batch.x.detach() @ weight.T

    def full(mark: Mark) -> list[torch.Tensor]:
        out = batch.x @ weight.T
        mark()
        return [out.detach(), *torch.autograd.grad(out, [batch.x], batch.upstream)]

    return Candidate("base GEMM", BASE, {FORWARD: idle, FULL: full}, Errors)


def _errors(forward: Forward, case: Case, stacked: bool, device: torch.device) -> Errors:
    """Compare output and gradients at a small shape with float64's, and a repeat with the first."""
    few = make(case.at(*SMALL), device)
    first, again = (_full(forward, few, stacked, nothing) for _ in range(2))
    found = first if stacked else [*first[:3], torch.stack(first[3:-SEGMENTS]), torch.stack(first[-SEGMENTS:])]
    error = max(oracle.error(*pair) for pair in zip(found, _exact(few), strict=True))
    same = all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    return Errors(gradient=error, deterministic=same)


def _exact(batch: Batch) -> list[torch.Tensor]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in (batch.x, batch.y, *batch.stacked)]
    x, y, a, b = leaves
    spans = list(zip(batch.bounds, batch.bounds[1:], strict=False))
    added = [SCALE * x[s:t] @ a[i].T @ b[i].T for i, (s, t) in enumerate(spans)]
    out = y + torch.cat(added)
    return [out.detach(), *torch.autograd.grad(out, leaves, batch.upstream.double())]
