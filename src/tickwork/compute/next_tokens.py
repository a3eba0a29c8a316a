"""``next_tokens``: the next token of every sequence of a forward, for all adapters and settings in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from tickwork.compute.choose import choose
from tickwork.compute.draw import Draw, Strand
from tickwork.compute.prompt import Ranked, rank
from tickwork_kernels import Head, LoraSegment, head_logits

# Logits that are drawn from at once.
DRAWN_LOGITS = 2**26
# A sequence whose next token can be drawn, and where in the packed forward its hidden state lies.
Ready = tuple[Draw, Strand, int]
# A token, its logprob, and the most likely tokens in its place, where asked for.
Drawn = tuple[int, float, Ranked | None]


def next_tokens(ready: Sequence[Ready], hidden: torch.Tensor, head: Head) -> list[Drawn]:
    """Draw one token for each sequence.

    Args:
        ready: the sequences; those of one adapter best side by side.
        hidden: ``[T, D]`` of the packed forward.
        head: the base model's.

    Returns:
        what was drawn, in the order of ``ready``.

    Room: the device thread.
    """
    size = max(1, DRAWN_LOGITS // head.weight.shape[0])
    return [drawn for at in range(0, len(ready), size) for drawn in _some(ready[at : at + size], hidden, head)]


def _some(ready: Sequence[Ready], hidden: torch.Tensor, head: Head) -> Iterator[Drawn]:
    draws = [draw for draw, _, _ in ready]
    places = torch.tensor([place for _, _, place in ready], device=hidden.device)
    uniforms = torch.tensor([strand.uniform() for _, strand, _ in ready], dtype=torch.float64, device=hidden.device)
    logits = head_logits(hidden[places], head, _segments(draws))
    return _describe(draws, *choose(logits, uniforms, [draw.recipe for draw in draws]))


def _segments(draws: Sequence[Draw]) -> list[LoraSegment]:
    """Return the adapters' parts of the head."""
    segments: list[LoraSegment] = []
    for _, run in groupby(draws, key=lambda draw: id(draw.adapter)):
        head, *rest = [draw.head for draw in run]
        start = segments[-1].stop if segments else 0
        a, b, scale = (None, None, 1.0) if head is None else (head.a, head.b, head.scale)
        segments.append(LoraSegment(start, start + 1 + len(rest), a, b, scale))
    return segments


def _describe(draws: Sequence[Draw], tokens: torch.Tensor, logp: torch.Tensor) -> Iterator[Drawn]:
    """Yield each row's token, logprob and, where asked for, most likely tokens."""
    logprobs = logp.gather(1, tokens[:, None])[:, 0].tolist()
    counts = [draw.payload.topk_sample_logprobs for draw in draws]
    rows = [row for row, count in enumerate(counts) if count]
    ranked = dict(zip(rows, rank(logp[rows], max(counts)) if rows else (), strict=True))
    for row, (token, logprob, count) in enumerate(zip(tokens.tolist(), logprobs, counts, strict=True)):
        yield token, logprob, ranked[row][:count] if count else None
