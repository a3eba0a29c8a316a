"""Logprobs now, gradients for an arbitrary upstream later: what is held in between, in three modes of memory."""

from __future__ import annotations

from typing import Literal

import torch

from tickwork_kernels.head import Chunk, HeadKernel, Rows
from tickwork_kernels.head_sweep import HeadGradients, Sums, chunks, join
from tickwork_kernels.head_targets import Upstream, add_targets, coefficients, factor

Memory = Literal["stash", "cache", "recompute"]
CACHE_BYTES = 2**28


class HeldLogprobs:
    """Logprobs of all rows, and what their backward needs.

    Args:
        kernel: the implementation.
        rows: the rows.
        memory: ``"stash"`` keeps one ``[N, D]`` row of the gradient for each token, two with an entropy's gradient:
            backward only scales it (2 GEMMs in all). ``"cache"`` keeps the chunks' probabilities up to ``cache_bytes``
            and computes the others again (2 or 3 GEMMs, one more with a weight's gradient). ``"recompute"`` keeps
            nothing.
        cache_bytes: what ``"cache"`` may keep.
    """

    @torch.no_grad()
    def __init__(self, kernel: HeadKernel, rows: Rows, memory: Memory, cache_bytes: int = CACHE_BYTES) -> None:
        self._kernel, self._rows, self._stashed = kernel, rows, memory == "stash" and rows.needs.any
        self._kept: dict[int, Chunk] = {}
        self._mean: list[torch.Tensor] = []
        self._spread: list[torch.Tensor] = []
        room = cache_bytes if memory == "cache" else -1
        parts = []
        for start, _, part in chunks(kernel, rows):
            chunk = kernel.forward(part, None)
            parts.append(chunk)
            room -= chunk.nbytes
            if self._stashed:
                self._stash(part, chunk)
            if self._stashed or room < 0:
                chunk.kept = None
            elif rows.needs.any:
                self._kept[start] = chunk
        self._whole = join(rows, parts)

    @property
    def logprobs(self) -> torch.Tensor:
        """Of the targets, ``[N, K]``."""
        return self._whole.logprobs

    @property
    def lse(self) -> torch.Tensor:
        """Logsumexp of the logits, ``[N]``."""
        return self._whole.lse

    @property
    def entropy(self) -> torch.Tensor | None:
        """In nats, ``[N]``, if it was wanted."""
        return self._whole.entropy

    def _stash(self, rows: Rows, chunk: Chunk) -> None:
        one, zero = torch.ones_like(chunk.lse), torch.zeros_like(chunk.lse)
        if rows.needs.entropy:  # first: with beta nothing that was kept is consumed
            self._spread.append(self._kernel.through(rows, chunk, zero, one))
        self._mean.append(self._kernel.through(rows, chunk, one, None))

    @torch.no_grad()
    def backward(self, upstream: Upstream) -> HeadGradients:
        """Return the gradients for what comes in; a second call computes again what the first one consumed."""
        if self._stashed:
            return self._scale(upstream)
        sums = Sums(self._rows)
        active = upstream.active()
        for start, stop, part in chunks(self._kernel, self._rows):
            index = active[start:stop].nonzero()[:, 0]
            chunk, given, where = self._kept.pop(start, None), upstream.chunk(start, stop), index + start
            if len(index) == 0:
                continue
            some = part if len(index) == stop - start else part.take(index)
            if some is not part:
                chunk = None if chunk is None else self._kernel.select(chunk, index)
                given = given.take(index)
            sums.add(self._kernel, some, chunk or self._kernel.forward(some, None), given, where)
        return sums.gradients()

    def _scale(self, upstream: Upstream) -> HeadGradients:
        rows = self._rows
        scale = factor(rows)[:, None]
        if not self._mean:
            return HeadGradients(torch.zeros(rows.hidden.shape, dtype=rows.head.dtype, device=rows.hidden.device))
        hidden = torch.cat(self._mean) * (upstream.alpha[:, None] * scale)
        if upstream.entropy is not None:
            hidden.addcmul_(torch.cat(self._spread), upstream.entropy[:, None] * scale)
        return HeadGradients(add_targets(hidden, rows, coefficients(rows, self._whole, upstream) * scale))
