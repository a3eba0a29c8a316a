"""The fused head in Triton: a tile of logits is folded where it is computed, and never written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from tickwork_kernels.head_rows_triton import LOWEST, fold, picked, transform, types


@triton.jit
def fold_tile(
    z, split, above, rows, vocab, count, multiplier, softcap, bias, targets, inverse_temperature,
    terms, weighted, terms_stride, split_k, split_sum, split_weighted, splits, target_w, target_slope,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr,
    KEEP: tl.constexpr, KEEP_WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Fold a tile of logits as one split; its rows begin at ``above``."""
    # Offsets within a tile take 32 bits; only the tile's own address takes 64, once and not for each element.
    before = split.to(tl.int64) * z.shape[1]
    local, aside = tl.arange(0, z.shape[0]), tl.arange(0, z.shape[1])
    here, inside = local < rows - above, aside < vocab - before
    shift = tl.zeros((z.shape[1],), tl.float32)
    if BIAS:
        shift = tl.load(bias + before + aside, mask=inside, other=0.0).to(tl.float32)
    cool = tl.full((z.shape[0],), 1.0, tl.float32)
    if TEMPERATURE:
        cool = tl.load(inverse_temperature + above + local, mask=here, other=1.0)
    w, slope = transform(z, shift[None, :], multiplier, softcap, cool[:, None], SOFTCAP)
    w = tl.where(inside[None, :], w, LOWEST)
    for j in range(count):
        at = above * count + local * count + j
        y = (tl.load(targets + at, mask=here, other=-1) - before).to(tl.int32)
        own = here & (y >= 0) & (y < z.shape[1]) & (y < vocab - before)
        tl.store(target_w + at, picked(w, aside, y), mask=own)
        if SOFTCAP:
            tl.store(target_slope + at, picked(slope, aside, y), mask=own)
    for j in range(count):
        y = (tl.load(targets + above * count + local * count + j, mask=here, other=-1) - before).to(tl.int32)
        w = tl.where(aside[None, :] == y[:, None], LOWEST, w)
    k, total, spread, kept, kept_weighted = fold(w, slope, 1, ENTROPY)
    place = (above + local) * splits + split
    tl.store(split_k + place, k, mask=here)
    tl.store(split_sum + place, total, mask=here)
    if ENTROPY:
        tl.store(split_weighted + place, spread, mask=here)
    first = above * terms_stride + before
    offset, both = local[:, None] * terms_stride + aside[None, :], here[:, None] & inside[None, :]
    if KEEP:
        tl.store(terms + first + offset, kept.to(terms.dtype.element_ty), mask=both)
    if KEEP_WEIGHTED:
        tl.store(weighted + first + offset, kept_weighted.to(weighted.dtype.element_ty), mask=both)


@triton.jit
def gemm_fold_kernel(
    hidden, weight, bias, targets, inverse_temperature,
    terms, weighted, terms_stride, split_k, split_sum, split_weighted, splits, target_w, target_slope,
    rows, vocab, dim, count, multiplier, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr,
    KEEP: tl.constexpr, KEEP_WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Logits of ``TOKENS`` rows by ``COLUMNS`` of the vocabulary, folded where they are.

    ``hidden`` and ``weight`` are tensor descriptors, which read zeros beyond the end. The order of programs keeps
    ``GROUP`` tiles of rows on one panel of the weight, which stays in the L2 cache.
    """
    pid, tiles, panels = tl.program_id(0), tl.cdiv(rows, TOKENS), tl.cdiv(vocab, COLUMNS)
    group = pid // (GROUP * panels)
    height = tl.minimum(tiles - group * GROUP, GROUP)
    tile = group * GROUP + (pid % (GROUP * panels)) % height
    panel = (pid % (GROUP * panels)) // height
    z = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, dim, DEPTH):
        a = hidden.load([tile * TOKENS, start])
        b = weight.load([panel * COLUMNS, start])
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b.T, z, input_precision="ieee")
    above = tile.to(tl.int64) * TOKENS
    fold_tile(
        z, panel, above, rows, vocab, count, multiplier, softcap, bias, targets, inverse_temperature,
        terms, weighted, terms_stride, split_k, split_sum, split_weighted, splits, target_w, target_slope,
        BIAS, SOFTCAP, TEMPERATURE, ENTROPY, KEEP, KEEP_WEIGHTED,
    )  # fmt: skip


def compile_targets() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Return ``(name, kernel, signature, constexprs, options)`` of every tile that ``tiles.json`` ships."""
    table = json.loads(Path(__file__).with_name("tiles.json").read_text())["gemm_fold"]
    flags = {"BIAS": False, "SOFTCAP": False, "TEMPERATURE": False, "ENTROPY": False, "KEEP": True}
    plain = {**flags, "KEEP_WEIGHTED": False}
    targets = []
    for kind, rows in table.items():
        if kind == "interpreter":
            continue
        short = "bf16" if kind.startswith("bfloat16") else "fp32"
        for row in rows:
            options = {name: row["tile"][name] for name in ("num_warps", "num_stages")}
            tile = {name: value for name, value in row["tile"].items() if name not in options}
            constants = {**(dict.fromkeys(plain, True) if "wide" in kind else plain), "UPCAST": False, **tile}
            signature = types(gemm_fold_kernel, short, constants)
            signature["hidden"] = f"tensordesc<{short}[{tile['TOKENS']}, {tile['DEPTH']}]>"
            signature["weight"] = f"tensordesc<{short}[{tile['COLUMNS']}, {tile['DEPTH']}]>"
            targets.append((f"gemm_fold-{kind}-{row['dim']}", gemm_fold_kernel, signature, constants, options))
    return targets
