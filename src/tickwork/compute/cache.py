"""``KVPool``: keys and values of the sequences being sampled."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

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
            added = max(1, self.slots)
            self._free = list(range(self.slots, self.slots + added))
            self.slots += added
        return heapq.heappop(self._free)

    def reserve(self, length: int) -> None:
        """Let every slot hold at least ``length`` positions from the next write on."""
        if length > self.capacity:
            self.capacity = max(-(-length // 64) * 64, 2 * self.capacity)

    def release(self, slots: Sequence[int], length: int) -> None:
        """Give slots back; the lowest are handed out first, so that live ones stay close together.

        Args:
            slots: the slots.
            length: how many positions of them may have been written. They are cleared: attention gives the weight 0
                to what lies past a sequence's end, and 0 times the NaN of the sequence before would be NaN.
        """
        for slot in slots:
            heapq.heappush(self._free, slot)
        if len(self._free) == self.slots:
            self.keys, self.values, self.slots, self.capacity, self._free = {}, {}, 0, 0, []
        for held in (*self.keys.values(), *self.values.values()):
            written = [slot for slot in slots if slot < len(held)]
            if written:
                held[_places(written, held.device), :, :length] = 0

    def shrink(self, length: int) -> None:
        """Keep no more than the slots up to the highest in use, and ``length`` positions of them."""
        free = set(self._free)
        self.slots = 1 + max((slot for slot in range(self.slots) if slot not in free), default=-1)
        self._free = sorted(slot for slot in free if slot < self.slots)
        self.capacity = 0  # grows with the next write again
        for store in (self.keys, self.values):
            for layer, held in store.items():
                if held.shape[0] > self.slots or held.shape[2] > length:
                    store[layer] = held[: self.slots, :, :length].clone()

    def fork(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of one slot to others."""
        if not targets:
            return
        for store in (self.keys, self.values):
            for layer in store:
                held = store[layer] = self._grown(store[layer])
                held[_places(targets, held.device), :, :length] = held[source, :, :length]

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


def _places(slots: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Return an index of slots: a slice where they are consecutive, which needs no copy to the device."""
    if list(slots) == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, device=device)
