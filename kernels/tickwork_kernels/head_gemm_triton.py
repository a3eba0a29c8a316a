"""The fused head in Triton: a tile of logits is folded where it is computed, and never written."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from tickwork_kernels.head_rows_triton import fold, transform


@triton.jit
def gemm_fold_kernel(
    hidden, hidden_stride, weight, weight_stride, bias, targets, inverse_temperature,
    terms, weighted, terms_stride, split_k, split_sum, split_weighted, splits, target_w, target_slope,
    rows, vocab, dim, count, multiplier, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr,
    KEEP: tl.constexpr, KEEP_WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Logits of ``TOKENS`` rows by ``COLUMNS`` of the vocabulary, folded as one split.

    The order of programs keeps ``GROUP`` tiles of rows on one panel of the weight, which stays in the L2 cache.
    """
    pid, tiles = tl.program_id(0), tl.cdiv(rows, TOKENS)
    group = pid // (GROUP * splits)
    height = tl.minimum(tiles - group * GROUP, GROUP)
    tile = group * GROUP + (pid % (GROUP * splits)) % height
    split = (pid % (GROUP * splits)) // height
    row = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = split.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    here, inside = row < rows, column < vocab
    left = hidden + row[:, None] * hidden_stride + depth[None, :]
    right = weight + column[None, :] * weight_stride + depth[:, None]
    z = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, dim, DEPTH):
        a = tl.load(left, mask=here[:, None] & (depth[None, :] < dim - start), other=0.0)
        b = tl.load(right, mask=inside[None, :] & (depth[:, None] < dim - start), other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b, z, input_precision="ieee")
        left += DEPTH
        right += DEPTH
    shift = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    cool = tl.full((TOKENS,), 1.0, tl.float32)
    if TEMPERATURE:
        cool = tl.load(inverse_temperature + row, mask=here, other=1.0)
    w, slope = transform(z, shift[None, :], multiplier, softcap, cool[:, None], SOFTCAP)
    valid = here[:, None] & inside[None, :]
    for j in range(count):
        y = tl.load(targets + row * count + j, mask=here, other=-1)
        hit = column[None, :] == y[:, None]
        valid = valid & (column[None, :] != y[:, None])
        own = here & (y // COLUMNS == split)
        tl.store(target_w + row * count + j, tl.sum(tl.where(hit, w, 0.0), 1), mask=own)
        if SOFTCAP:
            tl.store(target_slope + row * count + j, tl.sum(tl.where(hit, slope, 0.0), 1), mask=own)
    k, total, spread, kept, kept_weighted = fold(w, slope, valid, 1, ENTROPY)
    place = row * splits + split
    tl.store(split_k + place, k, mask=here)
    tl.store(split_sum + place, total, mask=here)
    if ENTROPY:
        tl.store(split_weighted + place, spread, mask=here)
    at = row[:, None] * terms_stride + column[None, :]
    if KEEP:
        tl.store(terms + at, kept.to(terms.dtype.element_ty), mask=here[:, None] & inside[None, :])
    if KEEP_WEIGHTED:
        tl.store(weighted + at, kept_weighted.to(weighted.dtype.element_ty), mask=here[:, None] & inside[None, :])
