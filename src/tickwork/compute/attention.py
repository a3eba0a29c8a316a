"""Attention over packed rows, as an attention implementation of transformers.

transformers hands the keyword arguments of the model's call down to every attention layer; ours is ``packed``.
Rows of one block attend in one call, as a rectangle; a row that continues a cached sequence attends to its slot.
Causality keeps the padding of a rectangle out of the rows: padded keys come after every real query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from tickwork.compute.rows import Block, Packed


class _Gather(torch.autograd.Function):
    """``x[places]`` for places without repeats; torch's own backward adds where copying is enough."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.rows = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        return grads[0].new_zeros((ctx.rows, *grads[0].shape[1:])).index_copy_(0, places, grads[0]), None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row of a packed batch.

    Args:
        module: the attention layer; ``layer_idx`` names its cache.
        query: ``[1, heads, T, head_dim]``.
        key: ``[1, kv_heads, T, head_dim]``.
        value: ``[1, kv_heads, T, head_dim]``.
        attention_mask: always None; the rows are the mask.
        scaling: factor of the scores; None means ``head_dim ** -0.5``.
        dropout: not supported; the base is frozen and in eval mode.
        sliding_window: positions that a query sees, itself included; None sees all before it.
        softcap: bound of the scores, or None.
        packed: the rows.

    Returns:
        ``([1, T, heads, head_dim], None)``.
    """
    if packed is None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("packed attention needs packed rows and has no attention sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # [T, heads, head_dim]
    layer = int(getattr(module, "layer_idx", 0))
    if packed.pool is not None and packed.slots is not None:
        packed.pool.append(layer, k, v, packed.slots, packed.positions[0])
    if packed.order is not None:
        q, k, v = (_Gather.apply(t, packed.order[0]) for t in (q, k, v))  # type: ignore[no-untyped-call]
    parts = [
        _fresh(own_q, own_k, own_v, block, scale, sliding_window, softcap)
        if block.slots is None
        else _cached(own_q, packed, layer, block, scale, sliding_window, softcap)
        for own_q, own_k, own_v, block in zip(*(_by_block(t, packed) for t in (q, k, v)), packed.blocks, strict=True)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if packed.order is not None:
        out = _Gather.apply(out, packed.order[1])  # type: ignore[no-untyped-call]
    return out[None], None


def _by_block(x: torch.Tensor, packed: Packed) -> Sequence[torch.Tensor]:
    """Cut into the blocks' tokens; not by slices, whose backward fills a tensor of the whole batch with zeros."""
    sizes = [block.stop - block.start for block in packed.blocks]
    return (x,) if len(sizes) == 1 else x.split(sizes)


def _fresh(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, scale: float, window: int | None, cap: float | None
) -> torch.Tensor:
    square = [_rectangle(t, block) for t in (q, k, v)]
    mask = None
    if window is not None and window < block.length:
        where = torch.arange(block.length, device=q.device)
        mask = _visible(where[:, None], where[None, :], window)
    out = _attend(square[0], square[1], square[2], scale, mask, cap)
    flat = out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3])
    if block.places is None:
        return flat
    rows: torch.Tensor = _Gather.apply(flat, block.places)  # type: ignore[no-untyped-call]
    return rows


def _rectangle(x: torch.Tensor, block: Block) -> torch.Tensor:
    """``[tokens, heads, dim]`` to ``[rows, heads, length, dim]``, padded with zeros."""
    if block.places is not None:
        x = x.new_zeros((block.count * block.length, *x.shape[1:])).index_copy(0, block.places, x)
    return x.reshape(block.count, block.length, *x.shape[1:]).transpose(1, 2)


def _cached(
    q: torch.Tensor, packed: Packed, layer: int, block: Block, scale: float, window: int | None, cap: float | None
) -> torch.Tensor:
    assert packed.pool is not None
    assert block.ends is not None
    pool = packed.pool
    keys, values = (store[layer][:, :, : block.longest][block.slots] for store in (pool.keys, pool.values))
    here = torch.arange(block.longest, device=q.device)
    if block.length == 1:
        query = q[:, :, None]
        mask = _visible(block.ends[:, None] - 1, here[None, :], window)[:, None, None]
    else:
        query = q.transpose(0, 1)[None]
        mask = _visible(block.offset + torch.arange(block.length, device=q.device)[:, None], here[None, :], window)
    out = _attend(query, keys, values, scale, mask, cap)
    return out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3])


def _visible(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None, cap: float | None
) -> torch.Tensor:
    """Attention of ``[rows, heads, length, dim]``, causal where there is no mask."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if cap is None:
        return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * (scale / cap))
    return torch.softmax(scores.masked_fill(~mask, -math.inf), -1, dtype=torch.float32).to(q.dtype) @ v


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The rows say what a token sees, so that no ``[T, T]`` mask is ever built."""


def register() -> str:
    """Make the attention known to transformers and return the name that ``set_attn_implementation`` takes."""
    AttentionInterface.register("tickwork", packed_attention)
    AttentionMaskInterface.register("tickwork", _no_mask)
    return "tickwork"
