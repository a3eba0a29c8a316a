"""A frozen projection and the LoRA of several adapters on it, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from tickwork_kernels.multi_lora import LoraSegment, explain_multi_lora, multi_lora
from tickwork_kernels.support import refuse_second_derivatives

IMPLEMENTATIONS = ("auto", "torch", "batched")


class LoraStack(NamedTuple):
    """Consecutive tokens of a packed batch that go through ``K`` adapters of one rank, equally many through each.

    Args:
        start: first token.
        stop: one past the last token; ``stop - start`` is a multiple of ``K``.
        a: ``[K, r, d_in]``, float32 or of the input's dtype.
        b: ``[K, d_out, r]``, likewise.
        scale: factor of ``b @ a``.
        grad_a: ``[K, r, d_in]`` float32, to which the backward pass adds the gradient of ``a`` where ``a`` requires
            one; autograd then returns none for ``a``. None leaves the gradient to autograd.
        grad_b: ``[K, d_out, r]`` float32, the same for ``b``.
    """

    start: int
    stop: int
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    grad_a: torch.Tensor | None = None
    grad_b: torch.Tensor | None = None

    def segments(self) -> list[LoraSegment]:
        """Return one segment for each adapter."""
        each = (self.stop - self.start) // len(self.a)
        a, b = self.a.unbind(), self.b.unbind()
        return [
            LoraSegment(
                self.start + k * each,
                self.start + (k + 1) * each,
                a[k],
                b[k],
                self.scale,
                None if self.grad_a is None else self.grad_a[k],
                None if self.grad_b is None else self.grad_b[k],
            )
            for k in range(len(self.a))
        ]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return its rows of a ``[T, d]`` tensor as ``[K, n, d]``, a view."""
        return x[self.start : self.stop].view(len(self.a), -1, x.shape[1])


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stacks: Sequence[LoraStack],
    *,
    impl: str = "auto",
    check: bool = True,
) -> torch.Tensor:
    """Project all rows through a frozen weight, and those of each stack through its adapters.

    Semantics: ``multi_lora(x, linear(x, weight, bias), segments_of(stacks, len(x)))``; ``weight`` and ``bias`` get no
    gradient.

    Args:
        x: ``[T, d_in]`` floating.
        weight: ``[d_out, d_in]`` of ``x``'s dtype.
        bias: ``[d_out]`` likewise, or None.
        stacks: in order, without overlap; rows between them go through the weight alone.
        impl: ``"torch"`` computes what the semantics say; ``"batched"`` makes one batched product of each stack, and
            the input's gradient in one buffer; ``"auto"`` takes ``"batched"`` on CPU and ``"torch"``, with whatever
            ``multi_lora`` prefers, elsewhere.
        check: False for a caller who knows that the arguments fit.

    Returns:
        ``[T, d_out]`` of ``x``'s dtype. Rows of one adapter depend on the others by rounding alone.

    Raises:
        ValueError: an argument does not fit; says which.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {list(IMPLEMENTATIONS)}, not {impl!r}")
    if check:
        _check(x, weight, stacks)
    if impl == "torch" or (impl == "auto" and x.device.type != "cpu"):
        return multi_lora(x, linear(x, weight, bias), segments_of(stacks, len(x)))
    adapters = [tensor for stack in stacks for tensor in (stack.a, stack.b)]
    out: torch.Tensor = _Batched.apply(x, weight.detach(), bias, stacks, *adapters)  # type: ignore[no-untyped-call]
    return out


def segments_of(stacks: Sequence[LoraStack], rows: int) -> list[LoraSegment]:
    """Return segments that cover all rows: those of the stacks, and of the base alone between them."""
    segments: list[LoraSegment] = []
    end = 0
    for stack in stacks:
        if stack.start > end:
            segments.append(LoraSegment(end, stack.start, None, None, 1.0))
        segments += stack.segments()
        end = stack.stop
    return [*segments, LoraSegment(end, rows, None, None, 1.0)] if rows > end else segments


def _check(x: torch.Tensor, weight: torch.Tensor, stacks: Sequence[LoraStack]) -> None:
    for index, stack in enumerate(stacks):
        count = len(stack.a) if stack.a.dim() == stack.b.dim() == 3 else 0
        if not count or len(stack.b) != count:
            shapes = f"{list(stack.a.shape)} and {list(stack.b.shape)}"
            raise ValueError(f"stacks[{index}].a and .b must be [K, r, d_in] and [K, d_out, r], not {shapes}")
        if (stack.stop - stack.start) % count:
            raise ValueError(f"stacks[{index}] must give its {count} adapters equally many of its rows")
    # Only the widths and dtype of the output are looked at: its values do not exist yet.
    explain_multi_lora(x, x.new_empty(1, len(weight)).expand(len(x), -1), segments_of(stacks, len(x)))
    if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        wanted, got = f"[d_out, {x.shape[1]}] {x.dtype}", f"{list(weight.shape)} {weight.dtype}"
        raise ValueError(f"weight must be {wanted} as x is, not {got}")


class _Batched(torch.autograd.Function):
    """``low = scale * x @ a.T`` is kept; the products with the adapters are added where the base's results lie."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stacks: Sequence[LoraStack],
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        x = x.contiguous()
        out = linear(x, weight, bias)
        lows = []
        for stack, a, b in zip(stacks, adapters[::2], adapters[1::2], strict=True):
            low = torch.bmm(stack.rows(x), a.to(x.dtype).transpose(1, 2)).mul_(stack.scale)
            stack.rows(out).baddbmm_(low, b.to(x.dtype).transpose(1, 2))
            lows.append(low)
        wanted = any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(weight, *adapters, *([x, *lows] if wanted else []))
        ctx.stacks = stacks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivatives()
        stacks, needs, grad = ctx.stacks, ctx.needs_input_grad, grads[0].contiguous()
        weight, *kept = ctx.saved_tensors
        adapters, (x, *lows) = kept[: 2 * len(stacks)], kept[2 * len(stacks) :] or [None]
        dx = grad @ weight if needs[0] else None
        found: list[torch.Tensor | None] = [None] * len(adapters)
        for index, stack in enumerate(stacks):
            a, b = (each.to(grad.dtype) for each in adapters[2 * index : 2 * index + 2])
            wide = stack.rows(grad)
            d_low = torch.bmm(wide, b).mul_(stack.scale)
            if dx is not None:
                stack.rows(dx).baddbmm_(d_low, a)
            if needs[4 + 2 * index]:
                own = torch.bmm(d_low.transpose(1, 2), stack.rows(x))
                found[2 * index] = _kept(own, stack.a.dtype, stack.grad_a)
            if needs[5 + 2 * index]:
                own = torch.bmm(wide.transpose(1, 2), lows[index])
                found[2 * index + 1] = _kept(own, stack.b.dtype, stack.grad_b)
        return dx, None, None, None, *found


def _kept(grad: torch.Tensor, dtype: torch.dtype, into: torch.Tensor | None) -> torch.Tensor | None:
    """Add a gradient to its buffer, or return it where there is none."""
    if into is None:
        return grad.to(dtype)
    into.add_(grad)
    return None
