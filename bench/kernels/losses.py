"""Token losses: every registered one in one sweep over the head, beside full logits and autograd."""

from __future__ import annotations

from functools import partial

import torch

from bench.kernels import head, oracle
from bench.kernels.cases import Case
from bench.kernels.inputs import HeadInputs, make
from bench.kernels.job import FULL, NAIVE, REGISTERED, Candidate, Errors, Job, Mark, Run
from tickwork_kernels import TokenLoss, linear_token_loss, token_losses
from tickwork_kernels.conformance import losses as conformance
from tickwork_kernels.token_losses import BoundLoss, bind


def build(case: Case, device: torch.device) -> Job:
    """Return the job of a case."""
    inputs = make(case, device)
    registered = [_candidate(loss, inputs, case) for loss in token_losses().values()]
    runs: dict[str, Run] = {FULL: partial(_naive, inputs)}
    naive = Candidate("naive", NAIVE, runs, Errors)
    floors = {FULL: head.build_floor(case)}
    return Job(case, [*registered, naive], floors, conformance.checks(), head.LIMITS[case.dtype])


def _candidate(loss: TokenLoss, inputs: HeadInputs, case: Case) -> Candidate:
    runs: dict[str, Run] = {FULL: partial(_ours, loss, inputs)}
    return Candidate(loss.name, REGISTERED, runs, partial(_errors, loss, case, inputs.hidden.device), chosen=(FULL,))


def _bound(loss: TokenLoss, inputs: HeadInputs) -> BoundLoss:
    """Return the loss with random inputs; one called ``logprobs`` is that of a sampler without an opinion."""
    flat = torch.full_like(inputs.upstream, -2.0)
    return bind(loss, {name: flat if name == "logprobs" else inputs.upstream for name in loss.inputs})


def _ours(loss: TokenLoss, inputs: HeadInputs, mark: Mark) -> list[torch.Tensor]:
    values = _bound(loss, inputs).inputs
    found = linear_token_loss(inputs.hidden, inputs.weight, inputs.targets, loss, values, check=False)
    mark()
    return [found.logprobs, *torch.autograd.grad(found.loss, [inputs.hidden])]


def _naive(inputs: HeadInputs, mark: Mark) -> list[torch.Tensor]:
    """Weighted cross-entropy of full logits: the least that any of the losses costs that way."""
    logprobs = head.naive(inputs)
    loss = -(inputs.upstream * logprobs).sum()
    mark()
    return [logprobs.detach(), *torch.autograd.grad(loss, [inputs.hidden])]


def _errors(loss: TokenLoss, case: Case, device: torch.device) -> Errors:
    """Compare all rows at a small shape, the derivative taken at the exact logprobs."""
    few = make(case.at(*head.SMALL), device)
    rows = torch.arange(len(few.targets), device=device)
    logprobs = oracle.exact(few, rows, torch.zeros_like(few.upstream)).logprobs
    bound = _bound(loss, few)
    exact_inputs = {name: value.double() for name, value in bound.inputs.items()}
    slope = BoundLoss(loss, exact_inputs, bound.config).evaluate(logprobs)[1]
    exact = oracle.exact(few, rows, slope)
    found, again = (_ours(loss, few, lambda: None) for _ in range(2))
    same = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    # A token at the very edge of a clip may fall on either side of it: rows are weighed by the largest.
    size = exact.hidden.norm(dim=1)
    off = (found[1].double() - exact.hidden).norm(dim=1) / size.clamp(min=float(size.max()) * 1e-3)
    return Errors(float((found[0] - logprobs).abs().max()), float(off.max()), None, same)
