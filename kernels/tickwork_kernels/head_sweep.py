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
        dtype = rows.head.dtype
        for each in rows.adapters:
            assert each.a is not None
            assert each.b is not None
            span = slice(each.start, each.stop)
            part = dz[span]
            a, b, wide = (tensor.to(dtype) for tensor in (each.a, each.b, rows.hidden[span]))
            low = _thin(part, b) * each.scale
            coefficient = None if apart is None else apart[span] * each.scale
            if coefficient is not None:
                for k, y in enumerate(rows.targets[span].T):
                    low += coefficient[:, k, None] * b[y]
            if hidden is not None:
                hidden[span].addmm_(low, a)
            if self.adapters is not None:
                # The segment is the same object's part in every chunk: its parameters tell which one it is.
                grad_a, grad_b = self.adapters[self._places[id(each.a), id(each.b)]]
                down = wide @ a.T
                grad_a.addmm_(low.T, wide)
                grad_b += _thin(part.T, down * each.scale)
                if coefficient is not None:
                    _index_add(grad_b, rows.targets[span], coefficient[:, :, None] * down[:, None, :])


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
