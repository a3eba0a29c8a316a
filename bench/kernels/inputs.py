"""Inputs of the head with logits as a model's are: some tokens are near certain, others hopeless."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.kernels.cases import Case
from tickwork_kernels import Lora

# Rows of the weight that are drawn at once: a whole one in float32 would take more memory than the kernels do.
DRAWN_ROWS = 8192
# Standard deviation of the logits; and the largest lift of a target's, as a share of log V.
SPREAD, LIFT = 2.0, 1.5


@dataclass(frozen=True)
class HeadInputs:
    """Of one call.

    Args:
        hidden: ``[N, D]``, requires a gradient.
        weight: ``[V, D]``, frozen.
        targets: ``[N]``.
        upstream: ``[N]`` float32, the gradient that comes in for the logprobs.
        lora: an adapter of the head that requires gradients, or None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor
    lora: Lora | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What gets gradients."""
        return [self.hidden] if self.lora is None else [self.hidden, self.lora.a, self.lora.b]


def make(case: Case, device: torch.device) -> HeadInputs:
    """Return inputs of a case.

    A target's logit is lifted by up to 1.5 log V: random ones alone would hide what confident tokens show, and would
    flatter a kernel that leaves out small probabilities.
    """
    draw = torch.Generator(device).manual_seed(case.seed)
    weight = torch.empty(case.v, case.d, dtype=case.torch_dtype, device=device)
    for rows in weight.split(DRAWN_ROWS):
        rows.copy_(torch.randn(rows.shape, generator=draw, device=device) * (SPREAD * case.d**-0.5))
    targets = torch.randint(case.v, (case.n,), generator=draw, device=device)
    lift = torch.rand(case.n, 1, generator=draw, device=device) * (LIFT * math.log(case.v))
    own = weight[targets].float()
    hidden = torch.randn(case.n, case.d, generator=draw, device=device) + own * (lift / own.square().sum(1, True))
    upstream = torch.randn(case.n, generator=draw, device=device)
    return HeadInputs(
        hidden.to(weight.dtype).requires_grad_(), weight, targets, upstream, _adapter(case, draw) if case.rank else None
    )


def _adapter(case: Case, draw: torch.Generator) -> Lora:
    a = torch.randn(case.rank, case.d, generator=draw, device=draw.device) * case.d**-0.5
    b = torch.randn(case.v, case.rank, generator=draw, device=draw.device) * 0.1
    return Lora(a.requires_grad_(), b.requires_grad_(), 1.0)
