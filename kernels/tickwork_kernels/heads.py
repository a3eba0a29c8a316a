"""The implementations of the head by name, and the choice between them."""

from __future__ import annotations

from dataclasses import replace

from tickwork_kernels.head import NOTHING, HeadCase, HeadKernel, Rows
from tickwork_kernels.head_attention import AttentionHead
from tickwork_kernels.head_cublas import CublasHead
from tickwork_kernels.head_fused import FusedHead
from tickwork_kernels.head_torch import TorchHead
from tickwork_kernels.registry import Choice, Registry
from tickwork_kernels.token_losses import BoundLoss

HEADS: Registry[HeadKernel] = Registry("linear_logprob", "tickwork_kernels.heads")
for _kernel in (TorchHead(), AttentionHead(), CublasHead(), FusedHead()):
    HEADS.register(_kernel)


def register_head_kernel(kernel: HeadKernel) -> HeadKernel:
    """Make an implementation known by its name, to every call, to the conformance suite and to the bench.

    Raises:
        ValueError: the name is taken.
    """
    return HEADS.register(kernel)


def choose_head(case: HeadCase, impl: str = "auto") -> Choice[HeadKernel]:
    """Return the implementation for a case, as ``Registry.choose`` does, with the bytes of its workspace."""
    choice = HEADS.choose(case, impl)
    memory = choice.implementation.workspace(case.rows)
    return Choice(choice.implementation, choice.why, choice.refused, memory)


def choose_both(rows: Rows, loss: BoundLoss | None, impl: str) -> tuple[HeadKernel, HeadKernel]:
    """Return the implementation for rows with a gradient, and the one for rows without."""
    idle = HeadCase(replace(rows, needs=NOTHING), loss)
    return choose_head(HeadCase(rows, loss), impl).implementation, choose_head(idle, impl).implementation
