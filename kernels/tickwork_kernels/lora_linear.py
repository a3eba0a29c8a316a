"""A frozen projection and the LoRA of several adapters on it, as one operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from tickwork_kernels.multi_lora import LoraSegment, explain_multi_lora, multi_lora
from tickwork_kernels.support import refuse_second_derivatives

IMPLEMENTATIONS = ("auto", "torch", "grouped")


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    segments: Sequence[LoraSegment],
    *,
    impl: str = "auto",
    check: bool = True,
) -> torch.Tensor:
    """Project all rows through a frozen weight and each segment through its adapter.

    Semantics: ``multi_lora(x, linear(x, weight, bias), segments)``; ``weight`` and ``bias`` get no gradient.

    Args:
        x: ``[T, d_in]`` floating.
        weight: ``[d_out, d_in]`` of ``x``'s dtype.
        bias: ``[d_out]`` likewise, or None.
        segments: as for ``multi_lora``, but without gradient buffers.
        impl: ``"torch"`` computes what the semantics say; ``"grouped"`` puts neighbouring segments of equal length,
            rank and scale into one batched product each, and the input's gradient into one buffer; ``"auto"`` takes
            ``"grouped"`` on CPU and ``"torch"``, with whatever ``multi_lora`` prefers, elsewhere.
        check: False for a caller who knows that the arguments fit.

    Returns:
        ``[T, d_out]`` of ``x``'s dtype. A segment's rows depend on the others by rounding alone, and with
        ``"torch"`` on CPU not at all.

    Raises:
        ValueError: an argument does not fit; says which.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {list(IMPLEMENTATIONS)}, not {impl!r}")
    if impl == "torch" or (impl == "auto" and x.device.type != "cpu"):
        return multi_lora(x, linear(x, weight, bias), segments)
    if check:
        _check(x, weight, segments)
    leaves = [leaf for segment in segments for leaf in (segment.a, segment.b)]
    out: torch.Tensor = _Grouped.apply(x, weight.detach(), bias, segments, *leaves)  # type: ignore[no-untyped-call]
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, segments: Sequence[LoraSegment]) -> None:
    # Only the widths and dtype of the output are looked at: its values do not exist yet.
    explain_multi_lora(x, x.new_empty(1, len(weight)).expand(len(x), -1), segments)
    if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        wanted, got = f"[d_out, {x.shape[1]}] {x.dtype}", f"{list(weight.shape)} {weight.dtype}"
        raise ValueError(f"weight must be {wanted} as x is, not {got}")
    if any(segment.grad_a is not None or segment.grad_b is not None for segment in segments):
        raise ValueError("segments must come without grad_a and grad_b: lora_linear gives gradients to autograd")


@dataclass(frozen=True)
class _Group:
    """Neighbouring segments of equal length, rank and scale, from segment ``first`` on.

    Args:
        a: ``[K, r, d_in]`` of the input's dtype.
        b: ``[K, d_out, r]`` likewise.
    """

    first: int
    start: int
    stop: int
    scale: float
    a: torch.Tensor
    b: torch.Tensor

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the group's rows of a ``[T, d]`` tensor as ``[K, n, d]``, a view."""
        return x[self.start : self.stop].view(len(self.a), -1, x.shape[1])


def _groups(segments: Sequence[LoraSegment], dtype: torch.dtype) -> Iterator[_Group]:
    first = 0
    while first < len(segments):
        head, last = segments[first], first + 1
        if head.a is None or head.stop == head.start:
            first = last
            continue
        while last < len(segments) and _alike(head, segments[last]):
            last += 1
        members = segments[first:last]
        # Stacked for each call: copying adapters is cheap beside the products, and nobody need keep them together.
        a, b = (torch.stack([each[place].detach().to(dtype) for each in members]) for place in (2, 3))  # type: ignore[union-attr]
        yield _Group(first, head.start, members[-1].stop, head.scale, a, b)
        first = last


def _alike(one: LoraSegment, other: LoraSegment) -> bool:
    return (
        one.a is not None
        and other.a is not None
        and one.stop - one.start == other.stop - other.start
        and one.a.shape == other.a.shape
        and one.scale == other.scale
    )


class _Grouped(torch.autograd.Function):
    """``low = scale * x @ a.T`` is kept; the products with the adapters are added where the base's results lie."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        segments: Sequence[LoraSegment],
        *leaves: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x.contiguous()
        out = linear(x, weight, bias)
        groups, lows = list(_groups(segments, x.dtype)), []
        for group in groups:
            low = torch.bmm(group.rows(x), group.a.transpose(1, 2)).mul_(group.scale)
            group.rows(out).baddbmm_(low, group.b.transpose(1, 2))
            lows.append(low)
        wanted = any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(weight, x if wanted else None, *(lows if wanted else []))
        ctx.groups, ctx.dtypes = groups, [None if leaf is None else leaf.dtype for leaf in leaves]
        ctx.shapes = [None if leaf is None else leaf.shape for leaf in leaves]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivatives()
        grad = grads[0].contiguous()
        weight, x, *lows = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = grad @ weight if needs[0] else None
        found: list[torch.Tensor | None] = [None] * len(ctx.dtypes)
        for place, group in enumerate(ctx.groups):
            wide = group.rows(grad)
            d_low = torch.bmm(wide, group.b).mul_(group.scale)
            if dx is not None:
                group.rows(dx).baddbmm_(d_low, group.a)
            if x is None:
                continue
            grad_a = torch.bmm(d_low.transpose(1, 2), group.rows(x))
            grad_b = torch.bmm(wide.transpose(1, 2), lows[place])
            for index in range(len(group.a)):
                for letter, each in ((0, grad_a), (1, grad_b)):
                    at = 2 * (group.first + index) + letter
                    if needs[4 + at]:
                        found[at] = each[index].to(ctx.dtypes[at])
        for at, (shape, dtype) in enumerate(zip(ctx.shapes, ctx.dtypes, strict=True)):
            if needs[4 + at] and found[at] is None:  # of an empty segment
                found[at] = grad.new_zeros(shape, dtype=dtype)
        return dx, None, None, None, *found
