"""Triton kernels of ``multi_lora``: down to the rank, up from it, and the two gradients of the adapters.

All segments share one launch. A program finds its adapter in a table of int64 rows, where addresses of tensors
stand as integers, and its tokens in a list of tiles; each tile holds tokens of one segment only and is counted
from that segment's own start. Tile sizes depend on the dtype alone and ranks are walked in blocks of a fixed
width, so the bits of a segment depend neither on its neighbours nor on its place in the batch. Nothing is atomic.

Precision: the intermediates of rank width stay in float32. A 16-bit tensor core takes one as the sum of two 16-bit
parts, ``high`` the rounded value and ``low`` what rounding lost, in two products with the same other operand: at
least 16 bits of mantissa for twice a small amount of arithmetic in kernels bound by memory traffic. TF32 would need
the same two products at half the rate. In float32 the products are IEEE ones, as torch's are by default.

The interpreter can not compute in bfloat16: under ``UPCAST`` operands become float32 right after each load.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tickwork_kernels import support

# int64 columns of a table's rows; even, so that every section of one upload is aligned to 16 bytes.
SEGMENT = tl.constexpr(6)  # address of a, of b, rank, bits of the scale, stop, unused
TILE = tl.constexpr(2)  # segment, first token
PIECE = tl.constexpr(4)  # segment, first token, address of the sum, whether to add to what is there
TOTAL = tl.constexpr(4)  # address of the gradient, its elements, address of the first partial, how many
TOTAL_BLOCK = 1024


class Blocks(NamedTuple):
    """Tile sizes: tokens, ranks and features of a tile, tokens of one partial sum, warps and pipeline stages."""

    tokens: int
    ranks: int
    features: int
    piece: int
    warps: int
    stages: int


# The float32 products run without tensor cores and keep whole operands in registers: small tiles avoid spills.
BLOCKS = {
    "16": Blocks(tokens=64, ranks=32, features=128, piece=1024, warps=4, stages=3),
    "32": Blocks(tokens=32, ranks=16, features=64, piece=1024, warps=4, stages=2),
    # Time there goes by inner iterations; these still give the shapes of the tests several tiles of each kind.
    "interpreter": Blocks(tokens=32, ranks=32, features=64, piece=64, warps=4, stages=1),
}


def blocks_of(dtype: torch.dtype) -> Blocks:
    """Return the tile sizes for an input of this dtype."""
    if support.interpreting():
        return BLOCKS["interpreter"]
    return BLOCKS["32" if dtype == torch.float32 else "16"]


@triton.jit
def load_weights(address, r, d, rank, dim, TRANSPOSED: tl.constexpr, KEPT: tl.constexpr, USED: tl.constexpr):
    """Load a tile of ``a`` ``[rank, dim]`` or, transposed, of ``b`` ``[dim, rank]``, rounded to the dtype used."""
    pointer = tl.multiple_of(address.to(tl.pointer_type(KEPT)), 16)
    offsets = d * rank + r if TRANSPOSED else r * dim + d
    return tl.load(pointer + offsets, mask=(r < rank) & (d < dim), other=0.0).to(USED)


@triton.jit
def dot_exact(low, wide, acc):
    """Add the product of a float32 tile with one of the input's dtype, without rounding the former to the latter."""
    if wide.dtype == tl.float32:
        return tl.dot(low, wide, acc, input_precision="ieee")
    high = low.to(wide.dtype)
    rest = (low - high.to(tl.float32)).to(wide.dtype)
    acc = tl.dot(high, wide, acc)
    return tl.dot(rest, wide, acc)


@triton.jit
def down_kernel(
    wide, low, table, tiles, dim, low_width,
    TRANSPOSED: tl.constexpr, KEPT: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """``low = scale * wide @ weight.T``: from ``[T, dim]`` to float32 ``[T, low_width]``, a block of ranks each."""
    USED: tl.constexpr = tl.float32 if UPCAST else wide.dtype.element_ty
    columns = tl.cdiv(low_width, RANKS)
    tile = tiles + (tl.program_id(0) // columns) * TILE
    segment = table + tl.load(tile) * SEGMENT
    address, rank = tl.load(segment + (1 if TRANSPOSED else 0)), tl.load(segment + 2).to(tl.int32)
    r = (tl.program_id(0) % columns) * RANKS + tl.arange(0, RANKS)
    if (tl.program_id(0) % columns) * RANKS >= rank:
        return
    scale = tl.load(segment + 3).to(tl.int32).to(tl.float32, bitcast=True)
    start, t = tl.load(tile + 1), tl.arange(0, TOKENS)
    wide, low = wide + start * dim, low + start * low_width
    inside = t < tl.load(segment + 4) - start
    acc = tl.zeros((TOKENS, RANKS), tl.float32)
    for first in range(0, dim, FEATURES):
        d = first + tl.arange(0, FEATURES)
        mask = inside[:, None] & (d[None, :] < dim)
        left = tl.load(wide + t[:, None] * dim + d[None, :], mask=mask, other=0.0).to(USED)
        right = load_weights(address, r[None, :], d[:, None], rank, dim, TRANSPOSED, KEPT, USED)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    place = low + t[:, None] * low_width + r[None, :]
    # Ranks past the last are zeros: stored, so that the other kernels can load whole blocks in wide steps.
    tl.store(place, acc * scale, mask=inside[:, None])


@triton.jit
def up_kernel(
    low, base, out, table, tiles, dim, low_width,
    TRANSPOSED: tl.constexpr, KEPT: tl.constexpr, UPCAST: tl.constexpr, ADD: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """``out = low @ weight``, plus ``base`` if told: from float32 ``[T, low_width]`` to ``[T, dim]``."""
    USED: tl.constexpr = tl.float32 if UPCAST else base.dtype.element_ty
    columns = tl.cdiv(dim, FEATURES)
    tile = tiles + (tl.program_id(0) // columns) * TILE
    segment = table + tl.load(tile) * SEGMENT
    address, rank = tl.load(segment + (1 if TRANSPOSED else 0)), tl.load(segment + 2).to(tl.int32)
    start, t = tl.load(tile + 1), tl.arange(0, TOKENS)
    low, base, out = low + start * low_width, base + start * dim, out + start * dim
    inside = t < tl.load(segment + 4) - start
    d = (tl.program_id(0) % columns) * FEATURES + tl.arange(0, FEATURES)
    acc = tl.zeros((TOKENS, FEATURES), tl.float32)
    for first in range(0, rank, RANKS):
        r = first + tl.arange(0, RANKS)
        left = tl.load(low + t[:, None] * low_width + r[None, :], mask=inside[:, None], other=0.0)
        right = load_weights(address, r[:, None], d[None, :], rank, dim, TRANSPOSED, KEPT, USED)
        acc = dot_exact(left, right, acc)
    place, mask = t[:, None] * dim + d[None, :], inside[:, None] & (d[None, :] < dim)
    if ADD:
        acc += tl.load(base + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    wide, low, table, pieces, dim, low_width,
    TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, FEATURES: tl.constexpr, PIECE_TOKENS: tl.constexpr,
):  # fmt: skip
    """Sum ``low[t] x wide[t]`` over the tokens of one piece into ``[rank, dim]``, or transposed ``[dim, rank]``.

    Where an adapter has one piece it goes straight into the gradient, added to what is there, else to a partial.
    """
    USED: tl.constexpr = tl.float32 if UPCAST else wide.dtype.element_ty
    columns, rows = tl.cdiv(dim, FEATURES), tl.cdiv(low_width, RANKS)
    piece = pieces + (tl.program_id(0) // (columns * rows)) * PIECE
    segment = table + tl.load(piece) * SEGMENT
    rank = tl.load(segment + 2).to(tl.int32)
    block = (tl.program_id(0) // columns) % rows
    if block * RANKS >= rank:
        return
    start = tl.load(piece + 1)
    wide, low = wide + start * dim, low + start * low_width
    count = tl.minimum(tl.load(segment + 4) - start, PIECE_TOKENS).to(tl.int32)
    r = block * RANKS + tl.arange(0, RANKS)
    d = (tl.program_id(0) % columns) * FEATURES + tl.arange(0, FEATURES)
    acc = tl.zeros((RANKS, FEATURES), tl.float32)
    for first in range(0, count, TOKENS):
        t = first + tl.arange(0, TOKENS)
        left = tl.load(low + t[None, :] * low_width + r[:, None], mask=t[None, :] < count, other=0.0)
        mask = (t[:, None] < count) & (d[None, :] < dim)
        right = tl.load(wide + t[:, None] * dim + d[None, :], mask=mask, other=0.0).to(USED)
        acc = dot_exact(left, right, acc)
    offsets = d[None, :] * rank + r[:, None] if TRANSPOSED else r[:, None] * dim + d[None, :]
    place = tl.load(piece + 2).to(tl.pointer_type(tl.float32)) + offsets
    mask = (r[:, None] < rank) & (d[None, :] < dim)
    if tl.load(piece + 3) != 0:
        acc += tl.load(place, mask=mask, other=0.0)
    tl.store(place, acc, mask=mask)


@triton.jit
def total_kernel(totals, most, BLOCK: tl.constexpr):
    """Add the partials of one gradient, in the order of its tokens, and the sum to what is there."""
    columns = tl.cdiv(most, BLOCK)
    total = totals + (tl.program_id(0) // columns) * TOTAL
    size, count = tl.load(total + 1), tl.load(total + 3).to(tl.int32)
    i = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    partial = tl.load(total + 2).to(tl.pointer_type(tl.float32)) + i
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        acc += tl.load(partial, mask=i < size, other=0.0)
        partial += size
    place = tl.load(total).to(tl.pointer_type(tl.float32)) + i
    tl.store(place, tl.load(place, mask=i < size, other=0.0) + acc, mask=i < size)


def constants(kernel: Any, dtype: torch.dtype, kept: torch.dtype, transposed: bool, add: bool) -> dict[str, Any]:
    """Return the constexprs of one of the first three kernels.

    Args:
        kernel: whose arguments to fill.
        dtype: of the input.
        kept: in which ``a`` and ``b`` lie in memory.
        transposed: whether it reads or makes something of ``b``'s layout rather than ``a``'s.
        add: whether ``up_kernel`` adds the base.
    """
    blocks = blocks_of(dtype)
    every = {
        "TRANSPOSED": transposed,
        "KEPT": getattr(tl, str(kept).removeprefix("torch.")),
        "UPCAST": support.interpreting(),
        "ADD": add,
        "TOKENS": blocks.tokens,
        "RANKS": blocks.ranks,
        "FEATURES": blocks.features,
        "PIECE_TOKENS": blocks.piece,
    }
    return {name: value for name, value in every.items() if name in kernel.arg_names}


def options(dtype: torch.dtype) -> dict[str, int]:
    """Return the warps and pipeline stages of the first three kernels."""
    blocks = blocks_of(dtype)
    return {"num_warps": blocks.warps, "num_stages": blocks.stages}


def compile_targets() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Return what runs on a GPU, to compile without one: name, kernel, signature, constexprs and options of each."""
    signature = {"totals": "*i64", "most": "i32", "BLOCK": "constexpr"}
    targets = [("total", total_kernel, signature, {"BLOCK": TOTAL_BLOCK}, {"num_warps": 4})]
    for dtype, wide in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        types = dict.fromkeys(("wide", "base", "out"), wide) | dict.fromkeys(("table", "tiles", "pieces"), "*i64")
        types |= {"low": "*fp32", "dim": "i32", "low_width": "i32"}
        for kernel, transposed in product((down_kernel, up_kernel, outer_kernel), (False, True)):
            constexprs = constants(kernel, dtype, torch.float32, transposed, add=transposed)
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            name = f"{kernel.__name__}-{'b' if transposed else 'a'}-{wide.removeprefix('*')}"
            targets.append((name, kernel, signature, constexprs, options(dtype)))
    return targets
