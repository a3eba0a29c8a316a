"""Packed rows: sequences of any lengths laid end to end, as one batch of one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from tickwork.compute.cache import KVPool
from tickwork.compute.lora import Adapter
from tickwork.compute.stacks import Stack, stacks_of
from tickwork_kernels import LoraStack

# Attention pads rows of similar length to a rectangle; it may hold this many times the cells the rows need.
PADDING = 1.5


@attrs.define(eq=False)
class Row:
    """One sequence, or the next part of one.

    Args:
        tokens: ``[L]`` int64.
        adapter: whose weights it goes through; None for the bare base model.
        start: position of its first token; more than 0 only with a slot.
        slot: cache slot its keys and values are appended to, or None.
    """

    tokens: np.ndarray
    adapter: Adapter | None = None
    start: int = 0
    slot: int | None = None


@attrs.frozen
class Block:
    """Rows that attend in one call: a rectangle of ``count`` rows of up to ``length`` tokens.

    Args:
        start: first packed token.
        stop: one past the last.
        places: ``[stop - start]`` int64, where each token lies in the padded rectangle; None without padding.
        slots: cache slots, for rows that continue a cached sequence: a slice where they are consecutive.
        offset: positions before the row, where the block is one chunk of a prefill.
        ends: ``[count]`` int64, cached positions of each row once its own are appended.
        longest: the greatest of them.
    """

    start: int
    stop: int
    count: int
    length: int
    places: torch.Tensor | None = None
    slots: slice | torch.Tensor | None = None
    offset: int = 0
    ends: torch.Tensor | None = None
    longest: int = 0


@attrs.frozen(eq=False)
class Packed:
    """Rows in packed order, with what the layers need to tell them apart.

    Args:
        tokens: ``[1, T]`` int64.
        positions: ``[1, T]`` int64.
        spans: packed ``(start, stop)`` of each row, in the order the rows were given.
        stacks: the adapters that they go through.
        blocks: what attends together.
        order: two ``[T]`` int64: the packed token at each place of the blocks, and the place of each packed token; None
            where blocks lie in packed order.
        pool: the cache, where rows have slots.
        slots: ``[T]`` cache slot of each token, with a pool.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    spans: list[tuple[int, int]]
    stacks: list[Stack]
    blocks: list[Block]
    order: tuple[torch.Tensor, torch.Tensor] | None = None
    pool: KVPool | None = None
    slots: torch.Tensor | None = None

    def lora(self, path: str) -> list[LoraStack]:
        """Return what ``lora_linear`` needs for the projection at ``path``."""
        return [part for stack in self.stacks if (part := stack.at(path)) is not None]


def pack(rows: Sequence[Row], device: torch.device, pool: KVPool | None = None, *, gradient: bool = False) -> Packed:
    """Lay rows end to end, sorted by adapter and then by kind and length, so that like attends with like.

    Adapters of equal rank and equally many tokens lie side by side: their products run as one.

    Args:
        pool: the cache of rows with a slot.
        gradient: whether there will be a backward.
    """
    places = _places(rows)
    order = sorted(
        range(len(rows)), key=lambda i: (places[id(rows[i].adapter)], rows[i].start > 0, len(rows[i].tokens))
    )
    ordered = [rows[i] for i in order]
    lengths = [len(row.tokens) for row in ordered]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    spans: list[tuple[int, int]] = [(0, 0)] * len(rows)
    for place, index in enumerate(order):
        spans[index] = (int(starts[place]), int(starts[place + 1]))
    positions = np.concatenate([np.arange(row.start, row.start + len(row.tokens)) for row in ordered])
    slots = None if pool is None else np.repeat([-1 if row.slot is None else row.slot for row in ordered], lengths)
    attention = _attention(ordered, starts, device)
    return Packed(
        tokens=_tensor(np.concatenate([row.tokens for row in ordered]), device)[None],
        positions=_tensor(positions, device)[None],
        spans=spans,
        stacks=stacks_of(_segments(ordered, starts), gradient),
        blocks=attention[0],
        order=attention[1],
        pool=pool,
        slots=None if slots is None else _tensor(slots, device),
    )


def _places(rows: Sequence[Row]) -> dict[int, tuple[int, int, int]]:
    """Return where each adapter's rows belong: by its rank, their tokens, and whose row comes first."""
    places: dict[int, tuple[int, int, int]] = {}
    for index, row in enumerate(rows):
        rank = 0 if row.adapter is None else row.adapter.config.rank
        _, tokens, first = places.get(id(row.adapter), (rank, 0, index))
        places[id(row.adapter)] = (rank, tokens + len(row.tokens), first)
    return places


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)


def _segments(rows: Sequence[Row], starts: np.ndarray) -> list[tuple[Adapter | None, int, int]]:
    segments: list[tuple[Adapter | None, int, int]] = []
    for index, row in enumerate(rows):
        begin = int(starts[index])
        if segments and segments[-1][0] is row.adapter:
            begin = segments.pop()[1]
        segments.append((row.adapter, begin, int(starts[index + 1])))
    return segments


def _attention(
    rows: Sequence[Row], starts: np.ndarray, device: torch.device
) -> tuple[list[Block], tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the blocks, and their order where rows of several adapters attend together in fewer of them."""
    blocks = _blocks(rows, starts, device)
    if len(blocks) == 1 or any(row.slot is not None for row in rows):
        return blocks, None
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    lengths = [len(rows[i].tokens) for i in order]
    fewer = _blocks([rows[i] for i in order], np.concatenate(([0], np.cumsum(lengths))), device)
    if len(fewer) == len(blocks):
        return blocks, None
    tokens = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    return fewer, (_tensor(tokens, device), _tensor(np.argsort(tokens), device))


def _blocks(rows: Sequence[Row], starts: np.ndarray, device: torch.device) -> list[Block]:
    blocks: list[Block] = []
    first = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or not _fits(rows[first:index], rows[index]):
            blocks.append(_block(rows[first:index], int(starts[first]), int(starts[index]), device))
            first = index
    return blocks


def _fits(block: Sequence[Row], row: Row) -> bool:
    """Whether one attention call may serve ``row`` with the rows of ``block``, which are no longer than it."""
    if (row.start > 0) != (block[0].start > 0):
        return False
    if row.start > 0:
        return len(row.tokens) == len(block[0].tokens) == 1
    length = len(row.tokens)
    needed = sum(len(r.tokens) ** 2 for r in block) + length**2
    return (len(block) + 1) * length**2 <= PADDING * needed


def _block(rows: Sequence[Row], start: int, stop: int, device: torch.device) -> Block:
    lengths = np.array([len(row.tokens) for row in rows])
    longest = int(lengths.max())
    if rows[0].start > 0:
        return _cached_block(rows, start, stop, longest, device)
    places = None
    if (lengths != longest).any():
        places = _tensor(np.concatenate([i * longest + np.arange(n) for i, n in enumerate(lengths)]), device)
    return Block(start, stop, len(rows), longest, places)


def _cached_block(rows: Sequence[Row], start: int, stop: int, length: int, device: torch.device) -> Block:
    ends = np.array([row.start + len(row.tokens) for row in rows])
    slots = np.array([row.slot for row in rows])
    run = bool((np.diff(slots) == 1).all())
    return Block(
        start,
        stop,
        len(rows),
        length,
        slots=slice(int(slots[0]), int(slots[-1]) + 1) if run else _tensor(slots, device),
        offset=rows[0].start,
        ends=_tensor(ends, device),
        longest=int(ends.max()),
    )
