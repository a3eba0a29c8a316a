"""``Stack``: the adapters of a pass that lie side by side in it, stacked, so that their products run as one."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from tickwork.compute.lora import Adapter
from tickwork_kernels import LoraStack


@attrs.define(eq=False)
class Stack:
    """Adapters of one configuration with equally many consecutive tokens each.

    Args:
        adapters: ``K`` of them.
        start: first packed token.
        stop: one past the last.
        arena: ``[K, P]`` float32, their arenas; a copy where there are several.
        grad: ``[K, P]`` float32, what the backward pass adds their gradients to; None without one.
        leaves: what autograd must be asked for, so that it runs.

    Room: the device thread.
    """

    adapters: Sequence[Adapter]
    start: int
    stop: int
    arena: torch.Tensor
    grad: torch.Tensor | None
    leaves: list[torch.Tensor] = attrs.Factory(list)
    _views: dict[str, LoraStack] = attrs.Factory(dict)

    @classmethod
    def of(cls, adapters: Sequence[Adapter], start: int, stop: int, gradient: bool) -> Stack:
        """Stack adapters; with ``gradient`` also take memory for their gradients."""
        arenas = [adapter.arena for adapter in adapters]
        arena = arenas[0].detach()[None] if len(arenas) == 1 else torch.stack(arenas)
        stack = cls(adapters, start, stop, arena, torch.zeros_like(arena) if gradient else None)
        for path, (a, b) in adapters[0].places.items():
            views = [part for flat in (stack.arena, stack.grad) if flat is not None for part in _views(flat, a, b)]
            if gradient:
                stack.leaves += [view.requires_grad_() for view in views[:2]]
            stack._views[path] = LoraStack(start, stop, views[0], views[1], adapters[0].scale, *views[2:])
        return stack

    def at(self, path: str) -> LoraStack | None:
        """Return the part of the projection at ``path``, if it is adapted."""
        return self._views.get(path)


def _views(flat: torch.Tensor, *places: tuple[int, int, int]) -> list[torch.Tensor]:
    count, size = flat.shape
    return [flat.as_strided((count, rows, columns), (size, columns, 1), at) for at, rows, columns in places]


def stacks_of(segments: Sequence[tuple[Adapter | None, int, int]], gradient: bool) -> list[Stack]:
    """Stack the adapters of runs of tokens, neighbours of one configuration and length together."""
    stacks: list[Stack] = []
    run: list[tuple[Adapter, int, int]] = []
    for adapter, start, stop in [*segments, (None, 0, 0)]:
        if run and not (adapter is not None and _alike(run[0], (adapter, start, stop))):
            stacks.append(Stack.of([each for each, _, _ in run], run[0][1], run[-1][2], gradient))
            run = []
        if adapter is not None:
            run.append((adapter, start, stop))
    return stacks


def _alike(one: tuple[Adapter, int, int], other: tuple[Adapter, int, int]) -> bool:
    (a, *span), (b, *other_span) = one, other
    return (
        a.config.rank == b.config.rank and a.shapes == b.shapes and span[1] - span[0] == other_span[1] - other_span[0]
    )
