"""``Budget``: how many tokens go through a base model at once, found from the memory that is free."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from tickwork.compute.failure import out_of_memory
from tickwork.compute.lora import Adapter
from tickwork.compute.memory import free_bytes
from tickwork.compute.rows import Row, pack
from tickwork.types import LoraConfig
from tickwork_kernels import explain

if TYPE_CHECKING:
    from tickwork.compute.model import BaseModel

# Of passes whose size is not found from free memory.
DEFAULT = 4096
# Smaller passes do not fit sooner; larger ones gain nothing, and on CPU whoever waits for one waits long.
LEAST, MOST_CPU, MOST_CUDA = 64, 4096, 65536
# Passes without a failure after which a budget that shrank is doubled.
PATIENCE = 100
# What is measured: rows of so many tokens, of an adapter of the default rank on all projections.
ROW, RANK = 32, 32
# Float32 vectors of hidden size that a pass holds for each token besides: its gradient at the head, twice, and a copy.
AT_THE_HEAD = 3

log = logging.getLogger("tickwork")


class Budget:
    """Tokens that one pass may hold: fewer after running out of memory, in time as many as at first again.

    Args:
        first: the most there ever are.
        fixed: whether they stay as many, so that where requests are cut does not depend on memory.

    Room: the device thread; ``tokens`` may be read by any.
    """

    def __init__(self, first: int, *, fixed: bool = False) -> None:
        self.tokens = self._first = first
        self._fixed = fixed
        self._passed = 0

    def failed(self, tokens: int) -> None:
        """Shrink to three quarters of a pass that ran out of memory."""
        self._passed = 0
        if not self._fixed:
            self.tokens = min(self.tokens, max(LEAST, tokens * 3 // 4))

    def passed(self) -> None:
        """Note a pass that had memory enough; after many of them a budget that shrank is doubled."""
        self._passed += 1
        if self._passed >= PATIENCE:
            self._passed = 0
            self.tokens = min(self._first, 2 * self.tokens)


def most(device: torch.device) -> int:
    """Return the greatest budget that is ever found for a device."""
    return MOST_CUDA if device.type == "cuda" else MOST_CPU


def find_budget(base: BaseModel) -> Budget:
    """Measure what a token needs and return how many fit into half of the memory that is free."""
    try:
        needed, constant = token_bytes(base), head_bytes(base)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return Budget(LEAST)
    tokens = fit(free_bytes(base.device), needed, constant, most(base.device))
    log.info("%s: %d bytes for each token of a pass, up to %d tokens at once", base.name, needed, tokens)
    return Budget(tokens)


def fit(free: int, needed: int, constant: int, cap: int) -> int:
    """Return how many tokens fit into half of what is free: a multiple of 64, at least 64, at most ``cap``.

    Args:
        free: bytes.
        needed: bytes for each token.
        constant: bytes for any number of tokens.
    """
    tokens = (free // 2 - constant) // needed // LEAST * LEAST
    return max(LEAST, min(cap, tokens))


def token_bytes(base: BaseModel) -> int:
    """Return the bytes that a pass with gradients holds for each token, in rows of 32 tokens with a rank of 32."""
    needed = saved_bytes(base)
    if base.recompute is not None:
        with base.recompute.off():  # the backward holds one layer at a time in full
            needed += saved_bytes(base) // base.recompute.layers
    return needed + AT_THE_HEAD * base.head.weight.shape[1] * 4


def saved_bytes(base: BaseModel) -> int:
    """Return the bytes that a forward keeps for the backward, for each token: what a second row adds."""
    adapter = Adapter(base.shapes, LoraConfig(rank=RANK, seed=0), 0, base.device)
    return (_saved(base, adapter, 2) - _saved(base, adapter, 1)) // ROW


def _saved(base: BaseModel, adapter: Adapter, rows: int) -> int:
    row = Row(np.arange(ROW, dtype=np.int64) % base.vocab_size, adapter)
    constants = {tensor.untyped_storage().data_ptr() for tensor in (*base.tensors(), adapter.arena)}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constants:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # holds the storage, so that its address stays its own; not the graph that holds it

    with torch.enable_grad(), saved_tensors_hooks(note, lambda kept: kept):
        hidden = base.hidden(pack([row] * rows, base.device, gradient=True))
    del hidden
    return sum(found.values())


def head_bytes(base: BaseModel) -> int:
    """Return the bytes of the head's largest buffers, which it fills chunk by chunk."""
    weight = base.head.weight
    hidden = weight.new_zeros((1, weight.shape[1])).requires_grad_()
    return explain(hidden, weight, torch.zeros((1, 1), dtype=torch.int64, device=weight.device)).memory or 0
