"""The head without autograd: what an engine calls that keeps its own gradients. Nothing is checked here."""

from __future__ import annotations

import torch

from tickwork_kernels.head import NOTHING, Adapters, Chunk, Head, HeadCase, Needs, Rows, as_segments
from tickwork_kernels.head_held import HeldLogprobs
from tickwork_kernels.head_sweep import HeadGradients, evaluate
from tickwork_kernels.head_targets import Upstream
from tickwork_kernels.heads import choose_both, choose_head
from tickwork_kernels.token_losses import BoundLoss


@torch.no_grad()
def head_gradients(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    source: BoundLoss | torch.Tensor,
    adapters: Adapters = None,
    *,
    impl: str = "auto",
) -> tuple[Chunk, HeadGradients]:
    """Logprobs and gradients of a frozen head in one sweep.

    Args:
        hidden: ``[N, D]`` in the weight's dtype.
        targets: ``[N, K]`` int64, within the vocabulary.
        head: the head; weight and bias are frozen.
        source: a loss with inputs ``[N, K]``, or d loss / d logprobs ``[N, K]``.
        adapters: of the head; they get gradients.

    Returns:
        ``(chunk, gradients)``: ``chunk`` holds logprobs, and of a loss ``losses`` and ``upstream`` too, ``[N, K]``.
    """
    rows = _rows(hidden, targets, head, adapters, Needs())
    if isinstance(source, BoundLoss):
        return evaluate(*choose_both(rows, source, impl), rows, source)
    return evaluate(*choose_both(rows, None, impl), rows, Upstream(source.to(head.dtype)))


def hold_logprobs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    adapters: Adapters = None,
    *,
    cache_bytes: int | None = None,
    impl: str = "auto",
) -> HeldLogprobs:
    """Logprobs, and what their backward needs, if there will be one.

    Args:
        cache_bytes: what may be kept for the gradient of an adapter; None where there will be no backward.

    Returns:
        ``HeldLogprobs``; its ``backward`` gives gradients of ``hidden`` and of the adapters.
    """
    rows = _rows(hidden, targets, head, adapters, NOTHING if cache_bytes is None else Needs())
    kernel = choose_head(HeadCase(rows), impl).implementation
    return HeldLogprobs(kernel, rows, "cache" if rows.adapters else "stash", cache_bytes or 0)


def _rows(hidden: torch.Tensor, targets: torch.Tensor, head: Head, adapters: Adapters, needs: Needs) -> Rows:
    segments = [each for each in as_segments(adapters, len(hidden)) if each.a is not None]
    if needs.hidden and segments:
        needs = Needs(adapters=True)
    return Rows(hidden, targets, head, segments, needs=needs)
