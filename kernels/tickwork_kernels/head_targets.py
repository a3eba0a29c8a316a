"""What comes in for the targets, and the entries of the logits' gradient that are theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tickwork_kernels.head import Chunk, Rows


@dataclass(frozen=True)
class Upstream:
    """Gradients that come in for some rows; None is zero.

    Args:
        logprobs: ``[n, K]``.
        lse: ``[n]``.
        entropy: ``[n]``.
    """

    logprobs: torch.Tensor
    lse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def chunk(self, start: int, stop: int) -> Upstream:
        """Return those of rows ``start`` to ``stop``."""
        parts = (self.logprobs, self.lse, self.entropy)
        return Upstream(*(None if part is None else part[start:stop] for part in parts))  # type: ignore[arg-type]

    @property
    def alpha(self) -> torch.Tensor:
        """Factor of the softmax, ``[n]``."""
        total = -self.logprobs.sum(1)
        return total if self.lse is None else total + self.lse

    def take(self, index: torch.Tensor) -> Upstream:
        """Return those of some rows."""
        parts = (self.logprobs, self.lse, self.entropy)
        return Upstream(*(None if part is None else part[index] for part in parts))  # type: ignore[arg-type]

    def active(self) -> torch.Tensor:
        """Return which rows anything comes in for, ``[n]`` bool."""
        active = self.logprobs.ne(0).any(1)
        for part in (self.lse, self.entropy):
            active = active if part is None else active | part.ne(0)
        return active


def factor(rows: Rows) -> torch.Tensor:
    """Return d logits / d (head's raw product) but for the softcap: ``[n]``."""
    ones = torch.ones(len(rows.hidden), dtype=rows.head.dtype, device=rows.hidden.device)
    return ones * rows.head.multiplier if rows.temperature is None else rows.head.multiplier / rows.temperature


def coefficients(rows: Rows, chunk: Chunk, upstream: Upstream) -> torch.Tensor:
    """Return the targets' entries of the gradient of the untempered logits ``[n, K]``; 0 at repeated targets."""
    g, targets = upstream.logprobs, rows.targets
    same = targets[:, :, None] == targets[:, None, :]
    own = (same * g[:, None, :]).sum(2) if targets.shape[1] > 1 else g
    total = g.sum(1, keepdim=True)
    p = chunk.logprobs.exp()
    found = (own - total) - total * torch.expm1(chunk.logprobs)
    if upstream.lse is not None:
        found = found + p * upstream.lse[:, None]
    if upstream.entropy is not None:
        assert chunk.entropy is not None
        # Where p is 0 its logprob may be -inf; the product is 0.
        finite = chunk.logprobs.clamp(min=torch.finfo(p.dtype).min)
        found = found - p * upstream.entropy[:, None] * (finite + chunk.entropy[:, None])
    if chunk.slope is not None:
        found = found * chunk.slope
    return found.masked_fill(same.tril(-1).any(2), 0.0) if targets.shape[1] > 1 else found


def add_targets(bulk: torch.Tensor, rows: Rows, apart: torch.Tensor) -> torch.Tensor:
    """Add the targets' share to the bulk through the weight, in place."""
    for k, y in enumerate(rows.targets.T):
        bulk.addcmul_(rows.head.weight[y].to(bulk.dtype), apart[:, k, None])
    return bulk
