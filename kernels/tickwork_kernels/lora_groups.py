"""Segments whose products run as one: neighbours of equal length, rank and scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tickwork_kernels.multi_lora import LoraSegment


def alike(segments: Sequence[LoraSegment]) -> list[list[LoraSegment]]:
    """Group neighbours of equal length, rank and scale: their products run as one."""
    groups: list[list[LoraSegment]] = []
    for each in segments:
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and last.stop == each.start
            and last.stop - last.start == each.stop - each.start
            and last.scale == each.scale
            and last.a is not None
            and each.a is not None
            and last.a.shape == each.a.shape
        ):
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def stacked(group: Sequence[LoraSegment], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the adapters of a group as ``[K, r, D]`` and ``[K, V, r]``."""
    pairs = [[tensor.to(dtype) for tensor in (each.a, each.b) if tensor is not None] for each in group]
    if len(pairs) == 1:
        return [tensor[None] for tensor in pairs[0]]
    return [torch.stack(tensors) for tensors in zip(*pairs, strict=True)]


def rows_of(group: Sequence[LoraSegment], x: torch.Tensor) -> torch.Tensor:
    """Return a group's rows of ``[N, d]`` as ``[K, n, d]``, a view."""
    return x[group[0].start : group[-1].stop].view(len(group), -1, x.shape[1])
