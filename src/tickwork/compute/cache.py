"""``KVPool``: keys and values of the sequences being sampled."""

from __future__ import annotations

import heapq

import torch


class KVPool:
    """Slots of equal capacity, one sequence each, grown by doubling when more or longer sequences come.

    ``keys[layer]`` and ``values[layer]`` are ``[slots, kv_heads, capacity, head_dim]`` in the model's dtype,
    made when the layer first writes, since layers may differ in heads.

    Room: the device thread.
    """

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.slots = 0
        self.capacity = 0
        self._free: list[int] = []

    def acquire(self) -> int:
        """Take a slot."""
        if not self._free:
            added = max(16, self.slots)
            self._free = list(range(self.slots, self.slots + added))
            self.slots += added
        return heapq.heappop(self._free)

    def reserve(self, length: int) -> None:
        """Let every slot hold at least ``length`` positions from the next write on."""
        if length > self.capacity:
            self.capacity = max(-(-length // 64) * 64, 2 * self.capacity)

    def release(self, slot: int) -> None:
        """Give a slot back; lowest slots are handed out first, so that live ones stay close together."""
        heapq.heappush(self._free, slot)
        if len(self._free) == self.slots:
            self.keys, self.values, self.slots, self.capacity, self._free = {}, {}, 0, 0, []

    def fork(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = self._grown(store[layer])
                store[layer][target, :, :length] = store[layer][source, :, :length]

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Write one position per token.

        Args:
            keys: ``[T, kv_heads, head_dim]``.
            values: ``[T, kv_heads, head_dim]``.
            slots: ``[T]`` int64.
            positions: ``[T]`` int64.
        """
        for store, new in ((self.keys, keys), (self.values, values)):
            held = store.get(layer)
            held = new.new_zeros((0, new.shape[1], 0, new.shape[2])) if held is None else held
            store[layer] = self._grown(held)
            store[layer][slots, :, positions] = new

    def _grown(self, held: torch.Tensor) -> torch.Tensor:
        if held.shape[0] >= self.slots and held.shape[2] >= self.capacity:
            return held
        slots, capacity = max(held.shape[0], self.slots), max(held.shape[2], self.capacity)
        grown = held.new_zeros((slots, held.shape[1], capacity, held.shape[3]))
        grown[: held.shape[0], :, : held.shape[2]] = held
        return grown
