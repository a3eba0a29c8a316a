"""The head as an attention, on CPU: hidden states are the queries, the vocabulary is both keys and values.

``softmax(hidden @ weight.T) @ weight`` is what an attention computes, and its logsumexp is the other half of a
logprob: torch's fused CPU attention runs both GEMMs block by block in cache and never writes a logit to memory.
The weight goes through in slices of a bounded size (a bfloat16 one converted to float32 slice by slice), whose
results are merged by their logsumexp.

Source of the merge: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
"""

from __future__ import annotations

import torch

from tickwork_kernels.head import Chunk, HeadCase, HeadKernel, Rows
from tickwork_kernels.token_losses import BoundLoss

# Of one mask: 8 MiB in float32.
ROWS, COLUMNS = 1024, 2048
OPERATION = "_scaled_dot_product_flash_attention_for_cpu"


class AttentionHead(HeadKernel):
    """Frozen head on CPU: logprobs and ``softmax @ weight`` from torch's fused attention."""

    name = "attention"

    def why_not(self, case: HeadCase) -> str | None:
        """See ``HeadKernel``."""
        rows, head = case.rows, case.rows.head
        reasons = {
            "hidden: is not on CPU": case.device.type != "cpu",
            "weight: neither float32 nor bfloat16": case.dtype not in (torch.float32, torch.bfloat16),
            "bias: not supported": head.bias is not None,
            "softcap: not supported": head.softcap is not None,
            "multiplier: 0 leaves nothing to attend to": head.multiplier == 0,
            "lora: not supported": bool(rows.adapters),
            "entropy: not computed": rows.entropy or rows.needs.entropy,
            "gradients other than hidden's: not computed": rows.needs.logits,
            "this torch has no fused CPU attention": not hasattr(torch.ops.aten, OPERATION),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def preference(self, case: HeadCase) -> int:
        """Where a gradient is wanted; the second GEMM is of no use without one."""
        return 10 if case.rows.needs.hidden else -1

    def chunk_rows(self, rows: Rows) -> int:
        """See ``HeadKernel``: no logits are kept, hence many rows."""
        return ROWS

    def workspace(self, rows: Rows) -> int:
        """See ``HeadKernel``: the mask of a slice, the slice in float32, and three ``[n, D]``."""
        width = rows.hidden.shape[1]
        return 4 * (ROWS * COLUMNS + COLUMNS * width + 3 * ROWS * width)

    def forward(self, rows: Rows, loss: BoundLoss | None) -> Chunk:
        """See ``HeadKernel``; keeps the bulk through the weight at ``alpha`` 1, ``[n, D]`` float32."""
        head, hidden = rows.head, rows.hidden.float().contiguous()
        if rows.temperature is not None:
            hidden = hidden / rows.temperature[:, None]
        mean, rest = _others(hidden, rows.targets, head.weight, head.multiplier)
        wanted = torch.stack([(hidden * head.weight[y].float()).sum(1) for y in rows.targets.T], 1) * head.multiplier
        logprobs, lse = _with_targets(wanted, rest, rows.targets)
        kept = mean.mul_((rest - lse).exp_()[:, None])
        return Chunk(logprobs, lse, kept=kept, nbytes=kept.nbytes)

    def through(self, rows: Rows, chunk: Chunk, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        """See ``HeadKernel``."""
        kept: torch.Tensor = chunk.kept
        return kept * alpha[:, None]


def _others(
    q: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to all but the targets; return the mean ``[n, D]`` and the logsumexp ``[n]``.

    Taking a confident token's own share out of the whole afterwards would leave rounding errors as large as its
    gradient. The mask is one buffer of zeros in which the targets of a slice are set and reset.
    """
    mean, lse = torch.zeros_like(q), q.new_full((len(q),), -torch.inf)
    mask = q.new_zeros(len(q), min(COLUMNS, len(weight)))
    for start in range(0, len(weight), COLUMNS):
        part = weight[start : start + COLUMNS].float().contiguous()  # the operation reads rows end to end
        row, k = ((targets >= start) & (targets < start + len(part))).nonzero(as_tuple=True)
        place = (row, targets[row, k] - start)
        mask[place] = -torch.inf
        other, other_lse = _attend(q, part, mask[:, : len(part)], scale)
        if targets.shape[1] >= len(part):  # torch calls the logsumexp of nothing 0
            other_lse = other_lse.masked_fill((mask[:, : len(part)] == -torch.inf).all(1), -torch.inf)
        mask[place] = 0.0
        total = torch.logaddexp(lse, other_lse)
        shift = total.masked_fill(total == -torch.inf, 0.0)
        mean.mul_((lse - shift).exp_()[:, None]).addcmul_(other, (other_lse - shift).exp_()[:, None])
        lse = total
    return mean, lse


def _attend(q: torch.Tensor, part: torch.Tensor, mask: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    operation = getattr(torch.ops.aten, OPERATION)
    output, lse = operation(
        q[None, None], part[None, None], part[None, None], 0.0, False, attn_mask=mask[None, None], scale=scale
    )
    return output[0, 0], lse.view(-1)


def _with_targets(wanted: torch.Tensor, rest: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs ``[n, K]`` and the lse of targets and rest, exact for confident tokens too."""
    repeated = (targets[:, :, None] == targets[:, None, :]).tril(-1).any(2)
    likely, which = wanted.max(1, keepdim=True)
    others = wanted.masked_fill(repeated | (targets == targets.gather(1, which)), -torch.inf)
    rest = torch.cat([others, rest[:, None]], 1).logsumexp(1)
    more = torch.logaddexp(rest - likely[:, 0], torch.zeros_like(rest))
    return wanted - likely - more[:, None], likely[:, 0] + more
