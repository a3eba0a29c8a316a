"""``Residency``: which adapters lie on the device, and which wait in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch

from tickwork.compute.failure import out_of_memory
from tickwork.compute.memory import is_there
from tickwork.errors import CapacityError


class Movable(Protocol):
    """An adapter, or one with its gradient and moments: tensors that move together."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""

    def move(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Lie in copies from now on; where making one fails, nothing has changed."""


class Residency:
    """Keeps a bound on what lies on a device: what was unused for longest goes to host memory, and comes back.

    What is in use stays, even where it is more than the bound. Whoever lets go of an item need not say so.

    Args:
        bound: bytes; None means a quarter of the device on CUDA, and none on CPU, which is the host itself.
        device: where items lie while they are used.

    Room: the device thread.
    """

    def __init__(self, bound: int | None, device: torch.device) -> None:
        self._bound = _default(device) if bound is None else bound
        self._device = device
        # Whether an item lies on the device; least recently used first.
        self._here: WeakKeyDictionary[Movable, bool] = WeakKeyDictionary()
        self._in_use: WeakSet[Movable] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes that lie on the device."""
        return sum(item.nbytes for item, here in self._here.items() if here)

    def use(self, item: Movable | None) -> None:
        """Have an item on the device until ``settle``, in place of others if need be.

        Args:
            item: None, for a bare base model, is always there.

        Raises:
            CapacityError: it does not fit; it is in host memory still.
        """
        if item is None:
            return
        here = self._here.pop(item, True)
        self._here[item] = here
        self._in_use.add(item)
        self._make_room(0 if here else item.nbytes)
        if here:
            return
        try:
            item.move(self._to_device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise CapacityError(
                f"an adapter of {item.nbytes / 2**20:.3g} MiB, with its gradient and moments, does not fit into the "
                f"memory left on {self._device}; lower adapter_memory or the rank, or free other models"
            ) from error
        self._here[item] = True

    def settle(self, in_use: Iterable[Movable | None]) -> None:
        """End a stage: keep to the bound, with nothing in use but what is given."""
        self._in_use = WeakSet(item for item in in_use if item is not None)
        self._make_room(0)

    def _make_room(self, wanted: int) -> None:
        """Move what is not in use to the host, until so many bytes more are within the bound."""
        if self._bound is None:
            return
        for item in [item for item, here in self._here.items() if here and item not in self._in_use]:
            if self.nbytes + wanted <= self._bound:
                return
            try:
                item.move(self._to_host)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                return  # too much on the device is better than failing a request over another's adapter
            self._here[item] = False

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=self._device.type == "cuda").copy_(tensor)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=self._device).copy_(tensor)


def _default(device: torch.device) -> int | None:
    if device.type == "cpu" or not is_there(device):
        return None
    return torch.cuda.mem_get_info(device)[1] // 4
