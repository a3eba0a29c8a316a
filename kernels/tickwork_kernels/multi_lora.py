"""LoRA of several adapters on one packed batch of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class LoraSegment(NamedTuple):
    """Consecutive tokens of a packed batch that share an adapter.

    Args:
        start: first token.
        stop: one past the last token.
        a: ``[r, d_in]``, or None where the base alone applies.
        b: ``[d_out, r]``.
        scale: factor of ``b @ a``.
    """

    start: int
    stop: int
    a: torch.Tensor | None
    b: torch.Tensor | None
    scale: float


def multi_lora(x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment]) -> torch.Tensor:
    """Add each segment's low-rank product to the base output.

    Semantics: ``y[s:t] + scale * x[s:t] @ a.T @ b.T`` for each segment.

    Args:
        x: input of the base projection, ``[T, d_in]``.
        y: its output, ``[T, d_out]``; not changed.
        segments: covering ``0..T`` in order; ranks may differ.

    Returns:
        ``[T, d_out]`` of ``y``'s dtype.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    if len(segments) == 1:
        return _segment(x, y, segments[0])
    # Split rather than slice: the backward of a slice fills a tensor of the whole batch with zeros.
    sizes = [segment.stop - segment.start for segment in segments]
    return torch.cat([_segment(*part) for part in zip(x.split(sizes), y.split(sizes), segments, strict=True)])


def _segment(x: torch.Tensor, y: torch.Tensor, segment: LoraSegment) -> torch.Tensor:
    if segment.a is None or segment.b is None:
        return y
    low = x @ segment.a.to(x.dtype).T
    return torch.addmm(y, low, segment.b.to(x.dtype).T, alpha=segment.scale)
