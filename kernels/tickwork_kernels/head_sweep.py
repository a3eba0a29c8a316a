"""The sweep over the head, common to all implementations: chunks, targets, adapters, and gradients from parts.

With ``u`` the final logits of a row, ``p`` their softmax, ``H`` its entropy and upstream gradients ``g_k`` of the
logprobs of targets ``y_k``, ``l`` of the lse and ``e`` of the entropy, and with ``alpha = l - sum g``:

    d u_v = sum_k g_k [v = y_k] + p_v (alpha - e (log p_v + H))

The targets' columns are computed apart, in float32, from ``1 - p = -expm1(logp)``: in a rounded ``p - 1`` a confident
token's gradient would drown. All other columns, the *bulk*, go through the weight in one GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tickwork_kernels.head import NOTHING, Chunk, HeadKernel, Rows, matmul, rounded_matmul
from tickwork_kernels.head_targets import Upstream, add_targets, coefficients, factor
from tickwork_kernels.lora_groups import alike, rows_of, stacked
from tickwork_kernels.multi_lora import LoraSegment
from tickwork_kernels.token_losses import BoundLoss


@dataclass(frozen=True)
class HeadGradients:
    """Gradients of one call, in float32 (float64 for a float64 weight).

    Args:
        hidden: ``[N, D]``, or None where it was not wanted.
        adapters: ``(a, b)`` gradients of each adapter, in the order of its first segment; None where not wanted.
        weight: ``[V, D]`` or None.
        bias: ``[V]`` or None.
    """

    hidden: torch.Tensor | None
    adapters: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def chunks(kernel: HeadKernel, rows: Rows) -> Iterator[tuple[int, int, Rows]]:
    """Yield ``(start, stop, chunk)`` of the kernel's chunk size."""
    size = kernel.chunk_rows(rows)
    for start in range(0, len(rows.hidden), size):
        stop = min(start + size, len(rows.hidden))
        yield start, stop, rows.chunk(start, stop)


class Sums:
    """Gradients being summed over chunks."""

    def __init__(self, rows: Rows) -> None:
        head, needs, device = rows.head, rows.needs, rows.hidden.device

        def zeros(like: torch.Tensor) -> torch.Tensor:
            return torch.zeros(like.shape, dtype=head.dtype, device=device)

        self.hidden = zeros(rows.hidden) if needs.hidden else None
        both = [(each.a, each.b) for each in rows.adapters if each.a is not None and each.b is not None]
        pairs = {(id(a), id(b)): (a, b) for a, b in both}
        self._places = {key: place for place, key in enumerate(pairs)}
        self.adapters = [(zeros(a), zeros(b)) for a, b in pairs.values()] if needs.adapters else None
        self.weight = zeros(head.weight) if needs.weight else None
        self.bias = zeros(head.weight[:, 0]) if needs.bias else None

    def gradients(self) -> HeadGradients:
        """Return what has been summed."""
        return HeadGradients(self.hidden, self.adapters, self.weight, self.bias)

    def add(self, kernel: HeadKernel, rows: Rows, chunk: Chunk, upstream: Upstream, where: torch.Tensor) -> None:
        """Add the gradients of a chunk whose rows are the tokens ``where``. Consumes what the chunk kept."""
        scale = factor(rows)
        beta = None if upstream.entropy is None else upstream.entropy * scale
        targets = coefficients(rows, chunk, upstream) * _column(scale)
        if not rows.needs.logits:
            bulk = kernel.through(rows, chunk, upstream.alpha * scale, beta)
            self._add_hidden(where, add_targets(bulk, rows, targets))
            return
        dz = kernel.bulk(rows, chunk, upstream.alpha * scale, beta)
        apart: torch.Tensor | None = targets
        if dz.dtype == rows.head.weight.dtype == targets.dtype:
            # Nothing is rounded on the way: the targets may go with the bulk. Repeated ones hold zeros.
            dz.scatter_add_(1, rows.targets, targets)
            apart = None
        hidden = self._through_head(rows, dz, apart) if rows.needs.hidden else None
        self._add_adapters(rows, dz, apart, hidden)
        if hidden is not None:
            self._add_hidden(where, hidden)
        if self.weight is not None:
            self.weight += matmul(dz.T, rows.hidden)
            if apart is not None:
                wide = rows.hidden.to(self.weight.dtype)
                _index_add(self.weight, rows.targets, apart[:, :, None] * wide[:, None, :])
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
            if apart is not None:
                _index_add(self.bias, rows.targets, apart)

    @staticmethod
    def _through_head(rows: Rows, dz: torch.Tensor, apart: torch.Tensor | None) -> torch.Tensor:
        hidden = rounded_matmul(dz, rows.head.weight)
        return hidden if apart is None else add_targets(hidden, rows, apart)

    def _add_hidden(self, where: torch.Tensor, grad: torch.Tensor) -> None:
        assert self.hidden is not None
        self.hidden.index_copy_(0, where, grad)

    def _add_adapters(
        self, rows: Rows, dz: torch.Tensor, apart: torch.Tensor | None, hidden: torch.Tensor | None
    ) -> None:
        """Add the adapters' gradients, and their share of ``hidden``'s in place."""
        if apart is None:
            for group in alike(rows.adapters):
                self._add_group(rows, group, dz, hidden)
            return
        dtype = rows.head.dtype
        for each in rows.adapters:
            assert each.a is not None
            assert each.b is not None
            span = slice(each.start, each.stop)
            part, targets, coefficient = dz[span], rows.targets[span], apart[span] * each.scale
            a, b, wide = (tensor.to(dtype) for tensor in (each.a, each.b, rows.hidden[span]))
            low = _thin(part, b) * each.scale
            for k, y in enumerate(targets.T):
                low += coefficient[:, k, None] * b[y]
            if hidden is not None:
                hidden[span].addmm_(low, a)
            if self.adapters is not None:
                grad_a, grad_b = self._gradients_of(each)
                down = wide @ a.T
                grad_a.addmm_(low.T, wide)
                grad_b += _thin(part.T, down * each.scale)
                _index_add(grad_b, targets, coefficient[:, :, None] * down[:, None, :])

    def _add_group(
        self, rows: Rows, group: Sequence[LoraSegment], dz: torch.Tensor, hidden: torch.Tensor | None
    ) -> None:
        """Add the gradients of adapters whose products run as one; ``dz`` holds the targets too."""
        a, b = stacked(group, dz.dtype)
        part, wide = rows_of(group, dz), rows_of(group, rows.hidden)
        low = torch.bmm(part, b).mul_(group[0].scale)
        if hidden is not None:
            rows_of(group, hidden).baddbmm_(low, a)
        if self.adapters is not None:
            down = torch.bmm(wide, a.transpose(1, 2)).mul_(group[0].scale)
            grads = torch.bmm(low.transpose(1, 2), wide), torch.bmm(part.transpose(1, 2), down)
            for each, own_a, own_b in zip(group, *grads, strict=True):
                grad_a, grad_b = self._gradients_of(each)
                grad_a += own_a
                grad_b += own_b

    def _gradients_of(self, segment: LoraSegment) -> tuple[torch.Tensor, torch.Tensor]:
        # The segment is the same object's part in every chunk: its parameters tell which one it is.
        assert self.adapters is not None
        return self.adapters[self._places[id(segment.a), id(segment.b)]]


def evaluate(
    kernel: HeadKernel, idle: HeadKernel, rows: Rows, source: BoundLoss | Upstream
) -> tuple[Chunk, HeadGradients]:
    """Run forward and backward of each chunk in turn, where gradients follow from the logprobs or are given.

    Args:
        idle: what runs rows that are known to have no gradient.

    Returns:
        logprobs, lse, entropy, losses and upstream of all rows in one ``Chunk``, and the gradients.
    """
    sums = Sums(rows)
    active = source.active() if rows.needs.any else None
    index = None if active is None else active.nonzero()[:, 0]
    if active is None or index is None or len(index) == len(rows.hidden):
        return _evaluate(kernel, rows, source, sums, None), sums.gradients()
    others = (~active).nonzero()[:, 0]
    some = _evaluate(kernel, rows.take(index), source.take(index), sums, index)
    rest = _evaluate(idle, replace(rows.take(others), needs=NOTHING), source.take(others), sums, others)
    return _interleave(some, rest, index, others), sums.gradients()


def _evaluate(
    kernel: HeadKernel, rows: Rows, source: BoundLoss | Upstream, sums: Sums, index: torch.Tensor | None
) -> Chunk:
    parts = []
    for start, stop, part in chunks(kernel, rows):
        given = source.chunk(start, stop)
        chunk = kernel.forward(part, given if isinstance(given, BoundLoss) else None)
        if isinstance(given, BoundLoss):
            if chunk.upstream is None:
                chunk.losses, chunk.upstream = given.evaluate(chunk.logprobs)
            assert chunk.losses is not None
            chunk.losses, chunk.upstream = given.mask(chunk.losses), given.mask(chunk.upstream)
            given = Upstream(chunk.upstream)
        if rows.needs.any:
            where = torch.arange(start, stop, device=rows.hidden.device) if index is None else index[start:stop]
            sums.add(kernel, part, chunk, given, where)
        chunk.kept = None
        parts.append(chunk)
    return join(rows, parts)


def _interleave(some: Chunk, rest: Chunk, index: torch.Tensor, others: torch.Tensor) -> Chunk:
    order = torch.cat([index, others]).argsort()

    def both(name: str) -> torch.Tensor | None:
        one, other = getattr(some, name), getattr(rest, name)
        return None if one is None or other is None else torch.cat([one, other])[order]

    logprobs, lse = both("logprobs"), both("lse")
    assert logprobs is not None
    assert lse is not None
    return Chunk(logprobs, lse, both("entropy"), both("slope"), None, 0, both("losses"), both("upstream"))


def join(rows: Rows, parts: Sequence[Chunk]) -> Chunk:
    """Return the results of all chunks as those of one."""
    nothing = torch.empty(0, dtype=rows.head.dtype, device=rows.hidden.device)
    if not parts:
        empty = nothing.view(0, 1).expand(0, rows.targets.shape[1])
        return Chunk(empty, nothing, nothing if rows.entropy else None, None, None, 0, empty, empty)

    def cat(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("logprobs", "lse", "entropy", "slope")
    logprobs, lse, entropy, slope = (cat(name) for name in names)
    assert logprobs is not None
    assert lse is not None
    return Chunk(logprobs, lse, entropy, slope, losses=cat("losses"), upstream=cat("upstream"))


def _column(x: torch.Tensor) -> torch.Tensor:
    return x[:, None]


def _index_add(into: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    # index_add_ would add in any order on CUDA; index_put_ sorts first.
    into.index_put_((index,), values.to(into.dtype), accumulate=True)


def _thin(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x @ y`` for a narrow ``y`` that x's dtype would blur: as two terms where ``x`` is bfloat16."""
    if x.dtype == y.dtype:
        return x @ y
    high = y.to(x.dtype)
    return rounded_matmul(x, high) + rounded_matmul(x, (y - high.to(y.dtype)).to(x.dtype))
