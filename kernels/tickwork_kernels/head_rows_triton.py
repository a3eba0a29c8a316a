"""Triton kernels that turn logits into probabilities row by row, in base 2, and finish each row in a fixed order.

A row's logits come in splits of the vocabulary. Of each split there is kept: ``k``, an integer at or above its largest
logit in log2; ``sum`` of ``2**(w - k)`` over all but the targets; and the terms themselves, whose relative precision
does not depend on the logits' size. Powers of two are exact, so merging splits costs no precision.

Source of the scaled exponentials: the epilogue of Dao-AILab's quack, described in its documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from tickwork_kernels.token_losses_triton import ppo

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every float32 logit, but finite: differences of it stay numbers.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def transform(z, bias, multiplier, softcap, inverse_temperature, SOFTCAP: tl.constexpr):
    """``w = softcap((z + bias) * multiplier) / temperature`` in log2, and the softcap's slope."""
    z = (z + bias) * multiplier
    slope = tl.full(z.shape, 1.0, tl.float32)
    if SOFTCAP:
        # 1 - 2 / (1 + exp(2 x)) is tanh; libdevice has one, but not in the interpreter.
        t = 1.0 - 2.0 / (1.0 + tl.exp2(z / softcap * (2.0 * LOG2E)))
        z = t * softcap
        slope = 1.0 - t * t
    return z * inverse_temperature * LOG2E, slope


@triton.jit
def fold(w, slope, axis: tl.constexpr, ENTROPY: tl.constexpr):
    """Of one split: ``(k, sum, weighted sum, terms, terms * (w - k))``; columns at ``LOWEST`` are left out."""
    k = tl.maximum(tl.ceil(tl.max(w, axis)), LOWEST)
    distance = w - tl.expand_dims(k, axis)
    terms = tl.where(w > LOWEST, tl.exp2(distance), 0.0)
    weighted = tl.zeros_like(terms)
    if ENTROPY:
        weighted = tl.where(terms > 0, terms * distance, 0.0)
    return k, tl.sum(terms, axis), tl.sum(weighted, axis), terms * slope, weighted * slope


@triton.jit
def picked(values, columns, y):
    """Return the value of each row in column ``y``."""
    return tl.sum(tl.where(columns[None, :] == y[:, None], values, 0.0), 1)


@triton.jit
def fold_kernel(
    logits, logits_stride, bias, targets, inverse_temperature, terms, weighted, terms_stride,
    split_k, split_sum, split_weighted, split, splits, target_w, target_slope,
    first, rows, width, count, multiplier, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr,
    KEEP: tl.constexpr, KEEP_WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold one split of some rows: ``logits[row, :width]`` are the columns from ``first`` on of the vocabulary."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    here = row < rows
    inside = here[:, None] & (columns < width)[None, :]
    z = tl.load(logits + row[:, None] * logits_stride + columns[None, :], mask=inside, other=0.0)
    shift = tl.zeros((BLOCK,), tl.float32)
    if BIAS:
        shift = tl.load(bias + first + columns, mask=columns < width, other=0.0).to(tl.float32)
    cool = tl.full((ROWS,), 1.0, tl.float32)
    if TEMPERATURE:
        cool = tl.load(inverse_temperature + row, mask=here, other=1.0)
    w, slope = transform(z, shift[None, :], multiplier, softcap, cool[:, None], SOFTCAP)
    w = tl.where(inside, w, LOWEST)
    for j in range(count):
        y = (tl.load(targets + row * count + j, mask=here, other=-1) - first).to(tl.int32)
        own = here & (y >= 0) & (y < width)
        tl.store(target_w + row * count + j, picked(w, columns, y), mask=own)
        if SOFTCAP:
            tl.store(target_slope + row * count + j, picked(slope, columns, y), mask=own)
    for j in range(count):
        y = (tl.load(targets + row * count + j, mask=here, other=-1) - first).to(tl.int32)
        w = tl.where(columns[None, :] == y[:, None], LOWEST, w)
    k, total, spread, kept, kept_weighted = fold(w, slope, 1, ENTROPY)
    place = row * splits + split
    tl.store(split_k + place, k, mask=here)
    tl.store(split_sum + place, total, mask=here)
    if ENTROPY:
        tl.store(split_weighted + place, spread, mask=here)
    at = row[:, None] * terms_stride + first + columns[None, :]
    if KEEP:
        tl.store(terms + at, kept.to(terms.dtype.element_ty), mask=inside)
    if KEEP_WEIGHTED:
        tl.store(weighted + at, kept_weighted.to(weighted.dtype.element_ty), mask=inside)


@triton.jit
def log2_of_one_plus(d):
    """``log2(1 + d)``, exact also where ``1 + d`` rounds to 1 (Goldberg 1991, theorem 4)."""
    u = 1.0 + d
    return tl.where(u == 1.0, d * LOG2E, tl.log2(u) * (d / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def merge(k, total, spread, w, unique, ENTROPY: tl.constexpr):
    """Merge splits ``[R, S]`` and distinct targets ``[R, K]``; return ``(peak, log2 of the sum over it, entropy)``."""
    likely = tl.max(tl.where(unique, w, LOWEST), 1)
    highest = tl.max(tl.where(total > 0, k, LOWEST), 1)
    peak = tl.maximum(likely, highest)
    over = tl.exp2(k - peak[:, None])
    rest = tl.sum(tl.where(total > 0, over * total, 0.0), 1)
    ours = tl.where(unique, tl.exp2(w - peak[:, None]), 0.0)
    # One term that is exactly 1 is left out of the sum: small ones would vanish in it.
    own = tl.arange(0, w.shape[1])[None, :]
    first = tl.min(tl.where(unique & (w == likely[:, None]), own, w.shape[1]), 1)
    others = tl.sum(tl.where(own == first[:, None], 0.0, ours), 1)
    # Rows beyond the last have nothing to sum; the bound keeps their logarithm a number.
    whole = tl.maximum(rest + tl.sum(ours, 1), 1e-38)
    log_total = tl.where(likely >= highest, log2_of_one_plus(rest + others), tl.log2(whole))
    entropy = log_total
    if ENTROPY:
        far = tl.where(total > 0, over * (spread + (k - peak[:, None]) * total), 0.0)
        near = tl.where(ours > 0, ours * (w - peak[:, None]), 0.0)
        entropy = (log_total - (tl.sum(far, 1) + tl.sum(near, 1)) / tl.exp2(log_total)) * LN2
    return peak, log_total, entropy


@triton.jit
def finish_kernel(
    split_k, split_sum, split_weighted, splits, target_w, targets, logprobs, lse, entropy, row_peak, row_total,
    inputs, config, losses, upstream, rows, count,
    ENTROPY: tl.constexpr, LOSS: tl.constexpr, INPUTS: tl.constexpr, SETTINGS: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Finish some rows: logprobs, lse, entropy, and the loss with its derivative where a twin is fused."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here, part, own = row < rows, tl.arange(0, SPLITS), tl.arange(0, COUNT)
    at, there = row[:, None] * splits + part[None, :], here[:, None] & (part < splits)[None, :]
    k = tl.load(split_k + at, mask=there, other=LOWEST)
    total = tl.load(split_sum + at, mask=there, other=0.0)
    spread = tl.zeros_like(total)
    if ENTROPY:
        spread = tl.load(split_weighted + at, mask=there, other=0.0)
    place, mine = row[:, None] * count + own[None, :], here[:, None] & (own < count)[None, :]
    y = tl.load(targets + place, mask=mine, other=-1)
    w = tl.load(target_w + place, mask=mine, other=LOWEST)
    twice = (y[:, :, None] == y[:, None, :]) & (own[None, :, None] > own[None, None, :])
    unique = mine & (tl.max(twice.to(tl.int32), 2) == 0)
    peak, log_total, spread_all = merge(k, total, spread, w, unique, ENTROPY)
    logp = ((w - peak[:, None]) - log_total[:, None]) * LN2
    tl.store(logprobs + place, logp, mask=mine)
    tl.store(lse + row, (peak + log_total) * LN2, mask=here)
    tl.store(row_peak + row, peak, mask=here)
    tl.store(row_total + row, log_total, mask=here)
    if ENTROPY:
        tl.store(entropy + row, spread_all, mask=here)
    if LOSS is not None:
        given = ()
        for j in tl.static_range(INPUTS):
            given = given + (tl.load(inputs + j * rows * count + place, mask=mine, other=0.0),)
        settings = ()
        for j in tl.static_range(SETTINGS):
            settings = settings + (tl.load(config + j),)
        loss, slope = LOSS(logp, given, settings)
        tl.store(losses + place, loss, mask=mine)
        tl.store(upstream + place, slope, mask=mine)


@triton.jit
def probabilities_kernel(
    terms, weighted, terms_stride, out, out_stride, split_k, splits, width, row_peak, row_total, entropy, alpha, beta,
    rows, vocab, BETA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = p * (alpha - beta * (log p + entropy)) * slope`` of one split of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split, here = tl.program_id(1), row < rows
    # The peak is taken off first: of large logits that is exact, and what is left is small.
    k = tl.load(split_k + row * splits + split, mask=here, other=0.0)
    base = (k - tl.load(row_peak + row, mask=here, other=0.0)) - tl.load(row_total + row, mask=here, other=0.0)
    p, a = tl.exp2(base), tl.load(alpha + row, mask=here, other=0.0)
    b, h = a, a
    if BETA:
        b, h = tl.load(beta + row, mask=here, other=0.0), tl.load(entropy + row, mask=here, other=0.0)
    for start in range(0, width, BLOCK):
        columns = split * width + start + tl.arange(0, BLOCK)
        inside = here[:, None] & ((columns < vocab) & (start + tl.arange(0, BLOCK) < width))[None, :]
        at = row[:, None] * terms_stride + columns[None, :]
        kept = tl.load(terms + at, mask=inside, other=0.0).to(tl.float32)
        value = kept * (p * a)[:, None]
        if BETA:
            more = tl.load(weighted + at, mask=inside, other=0.0).to(tl.float32)
            value = p[:, None] * (kept * (a - b * (base * LN2 + h))[:, None] - (b * LN2)[:, None] * more)
            # A split of nothing but targets has the lowest base of all, whose product with 0 may not be 0.
            value = tl.where(kept != 0, value, 0.0)
        tl.store(out + row[:, None] * out_stride + columns[None, :], value.to(out.dtype.element_ty), mask=inside)


def compile_targets() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Return ``(name, kernel, signature, constexprs, options)`` of every variant that the compile gate looks at."""
    targets: list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    for wide in ("bf16", "fp32"):
        flags = {"BIAS": False, "SOFTCAP": False, "TEMPERATURE": False, "ENTROPY": False, "KEEP": True}
        fold_flags = {**flags, "KEEP_WEIGHTED": False, "ROWS": 1, "BLOCK": 8192}
        all_flags = dict.fromkeys(fold_flags, True) | {"ROWS": 1, "BLOCK": 8192}
        for name, constants in (("plain", fold_flags), ("all", all_flags)):
            targets.append((f"fold-{wide}-{name}", fold_kernel, types(fold_kernel, wide, constants), constants, WARPS))
        for name, beta in (("plain", False), ("entropy", True)):
            constants = {"BETA": beta, "ROWS": 1, "BLOCK": 4096}
            signature = types(probabilities_kernel, wide, constants)
            targets.append((f"probabilities-{wide}-{name}", probabilities_kernel, signature, constants, WARPS))
    for name, loss, count in (("plain", None, 1), ("ppo", ppo, 1), ("eight targets", None, 8)):
        finish: dict[str, Any] = {"ENTROPY": True, "LOSS": loss, "INPUTS": 2, "SETTINGS": 2, "ROWS": 1}
        finish |= {"SPLITS": 1024, "COUNT": count}
        targets.append((f"finish-{name}", finish_kernel, types(finish_kernel, "fp32", finish), finish, {}))
    return targets


WARPS = {"num_warps": 8}
INTEGERS = {"logits_stride", "terms_stride", "out_stride", "hidden_stride", "weight_stride", "split", "splits", "first"}
INTEGERS |= {"width", "rows", "count", "vocab", "dim"}
IN_WEIGHT_DTYPE = {"bias", "terms", "weighted", "out", "hidden", "weight"}


def types(kernel: Any, wide: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """Return a kernel's signature; tensors in the weight's dtype are ``wide``."""

    def of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "i32"
        if name in ("multiplier", "softcap"):
            return "fp32"
        return "*i64" if name == "targets" else f"*{wide}" if name in IN_WEIGHT_DTYPE else "*fp32"

    return {name: of(name) for name in kernel.arg_names}
