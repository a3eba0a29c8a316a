"""Logprobs of target tokens under a linear head, and gradients for any per-token upstream, in two GEMMs.

The full ``[tokens, vocab]`` logits never exist: rows go through in chunks of a fixed size, so that memory is
bounded. With ``z`` the logits of a row, ``p`` their softmax, targets ``y_k`` and upstream gradients ``g_k``:
``d z = sum_k g_k (onehot(y_k) - p)``, hence one GEMM for ``z`` and one for ``d hidden = d z @ weight``, whatever
the loss. Where the gradient is a function of the logprob (``linear_token_loss``) both run while the chunk is at
hand; where it comes later (``TargetLogprobs``) the exponentials are kept within a byte budget and computed
again beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Elements of one chunk of logits: 16 MiB of float32, but never fewer rows than a GEMM needs to be efficient.
CHUNK_ELEMENTS = 2**22
CHUNK_ROWS = (128, 1024)


@dataclass(frozen=True)
class Lora:
    """An adapter of the head: ``weight + scale * b @ a``, with ``a`` ``[r, D]`` and ``b`` ``[V, r]`` in float32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Head:
    """A frozen head.

    Args:
        weight: ``[V, D]``, float32 or bfloat16.
        bias: ``[V]`` or None.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
        multiplier: factor of the logits, before the softcap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    multiplier: float = 1.0

    @property
    def chunk_rows(self) -> int:
        """Rows of one chunk; depends on the vocabulary only."""
        low, high = CHUNK_ROWS
        return max(low, min(high, CHUNK_ELEMENTS // self.weight.shape[0]))


@dataclass(frozen=True)
class HeadGradients:
    """Gradients of one batch: ``hidden`` ``[N, D]`` float32, and those of the adapter where there is one."""

    hidden: torch.Tensor
    a: torch.Tensor | None
    b: torch.Tensor | None


@dataclass
class _Chunk:
    """What a chunk's backward needs: exponentials ``[n, V]``, their row sums ``[n]``, the softcap's slope."""

    exponentials: torch.Tensor
    total: torch.Tensor
    slope: torch.Tensor | None


def head_logits(hidden: torch.Tensor, head: Head, lora: Lora | None = None) -> torch.Tensor:
    """Return float32 logits of all rows at once; for sampling, where rows are few.

    Semantics: ``softcap((hidden @ weight.T + scale * hidden @ a.T @ b.T + bias) * multiplier)``.

    Args:
        hidden: ``[N, D]`` in the weight's dtype.

    Returns:
        ``[N, V]`` float32.
    """
    logits = _matmul(hidden, head.weight.T)
    if lora is not None:
        logits.addmm_(hidden.float() @ lora.a.T, lora.b.T, alpha=lora.scale)
    if head.bias is not None:
        logits += head.bias.float()
    if head.multiplier != 1.0:
        logits *= head.multiplier
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


@torch.no_grad()
def linear_token_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    lora: Lora | None,
    gradient: Callable[[torch.Tensor, int, int], torch.Tensor],
) -> tuple[torch.Tensor, HeadGradients]:
    """Logprobs and gradients of an elementwise loss in one sweep over the head.

    Semantics: ``logp = head_logits(hidden).log_softmax(-1).gather(1, targets); logp.backward(gradient(logp))``.

    Args:
        hidden: ``[N, D]`` in the weight's dtype.
        targets: ``[N, K]`` int64.
        gradient: called as ``gradient(logp[start:stop], start, stop)``; returns d loss / d logp, ``[n, K]`` float32.

    Returns:
        ``(logp [N, K] float32, gradients)``. Rows whose gradient is zero cost no second GEMM.
    """
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    sums = _Sums(hidden, lora)
    for start, stop in _chunks(len(hidden), head.chunk_rows):
        rows, wanted = hidden[start:stop], targets[start:stop]
        logprobs[start:stop], chunk = _forward(rows, wanted, head, lora)
        upstream = gradient(logprobs[start:stop], start, stop)
        _backward(rows, wanted, head, lora, chunk, upstream, sums, start)
    return logprobs, sums.gradients()


class TargetLogprobs:
    """Logprobs now, gradients for an arbitrary upstream later.

    Args:
        hidden: ``[N, D]`` in the weight's dtype.
        targets: ``[N, K]`` int64.
        head: the frozen head.
        lora: its adapter, or None.
        keep_bytes: exponentials up to this size are kept for ``backward``; the rest is computed again there.
            0 for logprobs alone.
    """

    @torch.no_grad()
    def __init__(
        self, hidden: torch.Tensor, targets: torch.Tensor, head: Head, lora: Lora | None = None, keep_bytes: int = 0
    ) -> None:
        self._hidden, self._targets, self._head, self._lora = hidden, targets, head, lora
        self._kept: dict[int, _Chunk] = {}
        self.logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        for start, stop in _chunks(len(hidden), head.chunk_rows):
            self.logprobs[start:stop], chunk = _forward(hidden[start:stop], targets[start:stop], head, lora)
            keep_bytes -= chunk.exponentials.nbytes
            if keep_bytes >= 0:
                self._kept[start] = chunk

    @torch.no_grad()
    def backward(self, upstream: torch.Tensor) -> HeadGradients:
        """Return the gradients for d loss / d logprobs ``[N, K]``. May be called once: it frees what was kept."""
        sums = _Sums(self._hidden, self._lora)
        for start, stop in _chunks(len(self._hidden), self._head.chunk_rows):
            rows, targets, part = self._hidden[start:stop], self._targets[start:stop], upstream[start:stop].float()
            chunk = self._kept.pop(start, None)
            if chunk is None and bool(part.any()):
                _, chunk = _forward(rows, targets, self._head, self._lora)
            if chunk is not None:
                _backward(rows, targets, self._head, self._lora, chunk, part, sums, start)
        return sums.gradients()


class _Sums:
    def __init__(self, hidden: torch.Tensor, lora: Lora | None) -> None:
        self.hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        self.a = torch.zeros_like(lora.a) if lora is not None else None
        self.b = torch.zeros_like(lora.b) if lora is not None else None

    def gradients(self) -> HeadGradients:
        return HeadGradients(self.hidden, self.a, self.b)


def _forward(hidden: torch.Tensor, targets: torch.Tensor, head: Head, lora: Lora | None) -> tuple[torch.Tensor, _Chunk]:
    logits = head_logits(hidden, head, lora)
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
    wanted = logits.gather(1, targets)
    peak = logits.amax(1, keepdim=True)
    exponentials = logits.sub_(peak).exp_()
    total = _sum(exponentials, targets)
    return wanted - peak - total.log()[:, None], _Chunk(exponentials, total, slope)


def _sum(exponentials: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Row sums, the likeliest target added last: the 1 of a confident token would swallow the tail's small terms."""
    likely, which = exponentials.gather(1, targets).max(1, keepdim=True)
    place = targets.gather(1, which)
    total = exponentials.scatter_(1, place, 0.0).sum(1, keepdim=True) + likely
    exponentials.scatter_(1, place, likely)
    return total[:, 0]


def _backward(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    lora: Lora | None,
    chunk: _Chunk,
    upstream: torch.Tensor,
    sums: _Sums,
    start: int,
) -> None:
    active = upstream.any(1).nonzero()[:, 0]
    if len(active) == 0:
        return
    into = active + start
    if len(active) < len(hidden):
        hidden, targets, upstream = hidden[active], targets[active], upstream[active]
        chunk = _Chunk(
            chunk.exponentials[active], chunk.total[active], None if chunk.slope is None else chunk.slope[active]
        )
    dz = chunk.exponentials.mul_((-upstream.sum(1) / chunk.total)[:, None]).scatter_add_(1, targets, upstream)
    if chunk.slope is not None:
        dz *= chunk.slope
    if head.multiplier != 1.0:
        dz *= head.multiplier
    sums.hidden[into] = _through_weight(dz, targets, head.weight)
    if lora is not None and sums.a is not None and sums.b is not None:
        wide = hidden.float()
        low = dz @ lora.b * lora.scale
        sums.b.addmm_(dz.T, wide @ lora.a.T, alpha=lora.scale)
        sums.a.addmm_(low.T, wide)
        sums.hidden[into] += low @ lora.a


def _through_weight(dz: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``dz @ weight`` in float32; the targets' columns apart where rounding dz to bfloat16 would blur them."""
    if weight.dtype == torch.float32:
        return dz @ weight
    repeats = (targets[:, :, None] == targets[:, None, :]).tril(-1).any(2)
    apart = dz.gather(1, targets).masked_fill_(repeats, 0.0)
    bulk = dz.scatter(1, targets, 0.0).to(weight.dtype)
    return _matmul(bulk, weight) + torch.einsum("nk,nkd->nd", apart, weight[targets].float())


def _matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x @ y`` accumulated and returned in float32; products of bfloat16 operands are exact in it."""
    if x.dtype == torch.float32 and y.dtype == torch.float32:
        return x @ y
    if x.is_cuda:
        return torch.mm(x.to(y.dtype), y, out_dtype=torch.float32)
    return x.float() @ y.float()


def _chunks(rows: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
