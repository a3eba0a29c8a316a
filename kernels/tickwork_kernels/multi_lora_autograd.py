"""``multi_lora`` on the Triton kernels: the tables they read, their launches, and the backward pass."""

# mypy: allow-untyped-calls

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from tickwork_kernels import support
from tickwork_kernels.multi_lora import LoraSegment
from tickwork_kernels.multi_lora_triton import (
    PIECE,
    SEGMENT,
    TILE,
    TOTAL,
    TOTAL_BLOCK,
    blocks_of,
    constants,
    down_kernel,
    options,
    outer_kernel,
    total_kernel,
    up_kernel,
)

Rows = list[tuple[int, ...]]


def run(x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment]) -> torch.Tensor:
    """Compute ``multi_lora`` for arguments that were checked."""
    if all(segment.a is None for segment in segments):
        return y
    weights = [weight for segment in segments for weight in (segment.a, segment.b)]
    out: torch.Tensor = _MultiLora.apply(x, y, segments, *weights)
    return out


class _MultiLora(torch.autograd.Function):
    """``low = scale * x @ a.T`` and ``y + low @ b.T``; ``low`` is kept for the backward pass in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment], *weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the two steps; keep what the gradients asked for will need."""
        x, y = x.contiguous(), y.contiguous()
        plan = Plan(x, segments, weights)
        low = plan.down(x, transposed=False)
        needs = ctx.needs_input_grad
        # The weights are saved for autograd's check that nobody changes them in between; the plan holds them too.
        ctx.save_for_backward(x if any(needs[3::2]) else None, low if any(needs[4::2]) else None, *weights)
        ctx.plan, ctx.segments = plan, segments
        return plan.up(low, y, y.shape[1], transposed=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients that are asked for, those of adapters into their buffers where given."""
        support.refuse_second_derivatives()
        plan, needs, wide = ctx.plan, ctx.needs_input_grad, grad.contiguous()
        x, low, *weights = ctx.saved_tensors
        dx, grads = None, [None] * len(weights)
        if needs[0] or any(needs[3::2]):
            d_low = plan.down(wide, transposed=True)
            if needs[0]:
                dx = plan.up(d_low, None, _width(weights), transposed=False)
            grads[0::2] = plan.outer(x, d_low, weights[0::2], needs[3::2], [s.grad_a for s in ctx.segments], False)
        grads[1::2] = plan.outer(wide, low, weights[1::2], needs[4::2], [s.grad_b for s in ctx.segments], True)
        return dx, grad if needs[1] else None, None, *grads


def _width(weights: Sequence[torch.Tensor | None]) -> int:
    """Return ``d_in``, from the first ``a`` there is."""
    return next(int(a.shape[1]) for a in weights[0::2] if a is not None)


class Plan:
    """The tables of one batch, on its device.

    Args:
        x: ``[T, d_in]``, for its dtype and device.
        segments: of the batch.
        weights: ``a`` and ``b`` of each segment in turn.
    """

    def __init__(
        self, x: torch.Tensor, segments: Sequence[LoraSegment], weights: Sequence[torch.Tensor | None]
    ) -> None:
        self.dtype, self.device, self.blocks = x.dtype, x.device, blocks_of(x.dtype)
        self.spans = [(segment.start, segment.stop) for segment in segments]
        self.kept = _kept(x.dtype, weights)
        self.weights = [None if weight is None else _aligned(weight, self.kept) for weight in weights]
        ranks = [0 if a is None else int(a.shape[0]) for a in weights[0::2]]
        # A multiple of the block: of the width no more than its divisibility may reach the compiled code.
        self.low_width = -(-max(ranks) // self.blocks.ranks) * self.blocks.ranks
        rows = [
            (*map(_address, self.weights[2 * i : 2 * i + 2]), ranks[i], _bits(segment.scale), segment.stop, 0)
            for i, segment in enumerate(segments)
        ]
        tiles = [(i, t) for i, span in enumerate(self.spans) for t in range(*span, self.blocks.tokens)]
        self.table, self.tiles = _upload([(rows, SEGMENT.value), (tiles, TILE.value)], x.device)

    def down(self, wide: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Return ``scale * wide @ a.T``, or ``scale * wide @ b`` if transposed: ``[T, low_width]`` float32."""
        low = torch.empty(len(wide), self.low_width, dtype=torch.float32, device=self.device)
        programs = len(self.tiles) * (self.low_width // self.blocks.ranks)
        self._launch(down_kernel, programs, transposed, False, wide, low, self.table, self.tiles, wide.shape[1])
        return low

    def up(self, low: torch.Tensor, base: torch.Tensor | None, width: int, transposed: bool) -> torch.Tensor:
        """Return ``low @ a``, or ``base + low @ b.T`` if transposed: ``[T, width]`` of the input's dtype."""
        # The interpreter truncates where it stores bfloat16.
        dtype = torch.float32 if support.interpreting() else self.dtype
        out = torch.empty(len(low), width, dtype=dtype, device=self.device)
        programs = len(self.tiles) * -(-width // self.blocks.features)
        like = torch.empty(0, dtype=self.dtype, device=self.device) if base is None else base
        add = base is not None
        self._launch(up_kernel, programs, transposed, add, low, like, out, self.table, self.tiles, width)
        return out.to(self.dtype)

    def outer(
        self,
        wide: torch.Tensor,
        low: torch.Tensor,
        weights: Sequence[torch.Tensor | None],
        needed: Sequence[bool],
        buffers: Sequence[torch.Tensor | None],
        transposed: bool,
    ) -> list[torch.Tensor | None]:
        """Add ``low.T @ wide`` of each segment to its buffer, or return it where there is none.

        Args:
            wide: ``[T, dim]`` of the input's dtype.
            low: ``[T, low_width]`` float32.
            weights: whose gradient it is, of each segment.
            needed: whether it is asked for.
            buffers: float32, where given; segments of one adapter may share one.
            transposed: whether the gradients are ``[dim, rank]`` rather than ``[rank, dim]``.
        """
        into = [
            (torch.zeros(weight.shape, dtype=torch.float32, device=self.device) if buffer is None else buffer)
            if weight is not None and need
            else None
            for weight, need, buffer in zip(weights, needed, buffers, strict=True)
        ]
        pieces, totals, partials = self._pieces(into)
        if pieces:
            table, sums = _upload([(pieces, PIECE.value), (totals, TOTAL.value)], self.device)
            columns, rows = -(-wide.shape[1] // self.blocks.features), self.low_width // self.blocks.ranks
            programs = len(table) * columns * rows
            self._launch(outer_kernel, programs, transposed, False, wide, low, self.table, table, wide.shape[1])
            self._add_up(sums, max((total[1] for total in totals), default=0))
        del partials  # held until here: the kernels know it by its address alone
        return [
            None if grad is None or weight is None or buffer is not None else grad.to(weight.dtype)
            for grad, weight, buffer in zip(into, weights, buffers, strict=True)
        ]

    def _pieces(self, into: Sequence[torch.Tensor | None]) -> tuple[Rows, Rows, torch.Tensor]:
        """Cut segments into pieces; return those, the sums to make of partials, and room for the partials."""
        found: dict[int, list[tuple[int, int]]] = {}
        sizes: dict[int, int] = {}
        for index, (target, span) in enumerate(zip(into, self.spans, strict=True)):
            if target is not None:
                sizes[target.data_ptr()] = target.numel()
                starts = range(*span, self.blocks.piece)
                found.setdefault(target.data_ptr(), []).extend((index, start) for start in starts)
        room = sum(len(pieces) * sizes[at] for at, pieces in found.items() if len(pieces) > 1)
        partials = torch.empty(room, dtype=torch.float32, device=self.device)
        rows, totals, free = Rows(), Rows(), partials.data_ptr()
        for at, pieces in found.items():
            if len(pieces) > 1:
                totals.append((at, sizes[at], free, len(pieces)))
                rows += [(*piece, free + 4 * sizes[at] * i, 0) for i, piece in enumerate(pieces)]
                free += 4 * sizes[at] * len(pieces)
            else:
                rows += [(*piece, at, 1) for piece in pieces]
        return rows, totals, partials

    def _add_up(self, totals: torch.Tensor, most: int) -> None:
        programs = len(totals) * -(-most // TOTAL_BLOCK)
        if programs:
            with _current(self.device):
                total_kernel[(programs,)](totals, most, BLOCK=TOTAL_BLOCK, num_warps=4)

    def _launch(self, kernel: Any, programs: int, transposed: bool, add: bool, *args: Any) -> None:
        if programs:
            constexprs = constants(kernel, self.dtype, self.kept, transposed, add)
            with _current(self.device):
                kernel[(programs,)](*args, self.low_width, **constexprs, **options(self.dtype))


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _kept(dtype: torch.dtype, weights: Sequence[torch.Tensor | None]) -> torch.dtype:
    """Return in which dtype the kernels find the weights: float32, rounded there, or as rounded here."""
    plain = all(weight is None or weight.dtype == torch.float32 for weight in weights)
    # The interpreter truncates where it should round, so that there torch has to.
    return torch.float32 if plain and not support.interpreting() else dtype


def _aligned(weight: torch.Tensor, kept: torch.dtype) -> torch.Tensor:
    """Return the weight as the kernels expect it: of this dtype, contiguous, at a multiple of 16 bytes."""
    weight = weight.detach().to(kept).contiguous()
    return weight.clone() if weight.data_ptr() % 16 else weight


def _address(weight: torch.Tensor | None) -> int:
    return 0 if weight is None else weight.data_ptr()


def _bits(scale: float) -> int:
    """Return the bits of a float32 as an integer, to pass among integers."""
    return int(struct.unpack("<i", struct.pack("<f", scale))[0])


def _upload(sections: Sequence[tuple[Sequence[tuple[int, ...]], int]], device: torch.device) -> list[torch.Tensor]:
    """Return lists of rows of so many integers as tensors ``[rows, columns]``, sent as one and without waiting."""
    flat = torch.tensor([value for rows, _ in sections for row in rows for value in row], dtype=torch.int64)
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([len(rows) * columns for rows, columns in sections])
    return [part.view(-1, columns) for part, (_, columns) in zip(parts, sections, strict=True)]
