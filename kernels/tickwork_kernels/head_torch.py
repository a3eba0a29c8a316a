"""The reference of the head: plain torch on any device, in float32 or float64, and the CPU path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tickwork_kernels.head import Chunk, HeadCase, HeadKernel, Rows, head_logits
from tickwork_kernels.token_losses import BoundLoss


@dataclass
class _Kept:
    """Exponentials ``[n, V]`` relative to the row's peak, their row sums ``[n]``, the softcap's slope ``[n, V]``."""

    exponentials: torch.Tensor
    total: torch.Tensor
    slope: torch.Tensor | None


class TorchHead(HeadKernel):
    """Chunks of logits in plain torch: the definition that every other implementation is held to."""

    name = "torch"

    def preference(self, case: HeadCase) -> int:
        """Everywhere, until something better can."""
        return 0

    def forward(self, rows: Rows, loss: BoundLoss | None) -> Chunk:
        """See ``HeadKernel``."""
        head, targets = rows.head, rows.targets
        logits = head_logits(rows.hidden, head, rows.adapters)
        slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
        if rows.temperature is not None:
            logits /= rows.temperature[:, None]
        wanted = logits.gather(1, targets)
        peak = logits.amax(1, keepdim=True)
        centred = logits.sub_(peak)
        weighted = None
        if rows.entropy:
            # At -inf, where nothing is left of a logit, the product is 0, not NaN.
            weighted = torch.where(centred.isinf(), 0.0, centred.exp() * centred).sum(1)
        exponentials = centred.exp_()
        likely, rest = _sums(exponentials, targets)
        # log(likely + rest), exact also where rest is too small to change likely: a confident token's logprob.
        log_total = torch.where(likely > 0, likely.log() + (rest / likely).log1p(), rest.log())
        chunk = Chunk(wanted - peak - log_total[:, None], peak[:, 0] + log_total)
        total = likely + rest
        if weighted is not None:
            chunk.entropy = log_total - weighted / total
        if slope is not None:
            chunk.slope = slope.gather(1, targets)
        if rows.needs.any:
            chunk.kept = _Kept(exponentials, total, slope)
            chunk.nbytes = exponentials.nbytes * (1 if slope is None else 2)
        return chunk

    def select(self, chunk: Chunk, index: torch.Tensor) -> Chunk:
        """See ``HeadKernel``."""
        kept: _Kept = chunk.kept
        parts = (chunk.entropy, chunk.slope, kept.slope)
        entropy, slope, slopes = (None if part is None else part[index] for part in parts)
        some = _Kept(kept.exponentials[index], kept.total[index], slopes)
        return Chunk(chunk.logprobs[index], chunk.lse[index], entropy, slope, some)

    def bulk(self, rows: Rows, chunk: Chunk, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        """See ``HeadKernel``; without ``beta`` what was kept is overwritten."""
        kept: _Kept = chunk.kept
        if beta is None:
            dz = kept.exponentials.mul_((alpha / kept.total)[:, None])
        else:
            assert chunk.entropy is not None
            p = kept.exponentials / kept.total[:, None]
            dz = p * (alpha - beta * chunk.entropy)[:, None] - beta[:, None] * torch.special.xlogy(p, p)
        if kept.slope is not None:
            dz *= kept.slope
        return dz.scatter_(1, rows.targets, 0.0)


def _sums(exponentials: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest target's term and the sum of all others: its 1 would swallow the tail's small terms."""
    likely, which = exponentials.gather(1, targets).max(1, keepdim=True)
    place = targets.gather(1, which)
    rest = exponentials.scatter_(1, place, 0.0).sum(1)
    exponentials.scatter_(1, place, likely)
    return likely[:, 0], rest
