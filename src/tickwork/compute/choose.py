"""From logits to tokens: temperature, top-k, top-p, and one uniform number per token."""

from __future__ import annotations

import attrs
import torch


@attrs.frozen
class Recipe:
    """The settings that rows must share to be drawn in one go."""

    temperature: float
    top_k: int
    top_p: float


def choose(logits: torch.Tensor, uniforms: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the distribution function.

    Args:
        logits: ``[S, V]`` float32.
        uniforms: ``[S]`` float64 in [0, 1), one for each row.
        recipe: how to draw.

    Returns:
        ``(tokens [S] int64, logp [S, V] float32)``. ``logp`` is the whole vocabulary's distribution at the
        temperature (at temperature 0 the plain one), not renormalised after top-k and top-p.
    """
    scaled = logits if recipe.temperature in (0.0, 1.0) else logits / recipe.temperature
    logp = torch.log_softmax(scaled, -1)
    if recipe.temperature == 0.0:
        return logits.argmax(-1), logp
    probs = _keep(logp.exp().double(), recipe)
    sums = probs.cumsum(-1)
    drawn = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)[:, 0]
    return drawn.clamp_max(logits.shape[1] - 1), logp


def _keep(probs: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Zero what top-k and top-p leave out; ties go to the lower token id."""
    if recipe.top_k < 0 and recipe.top_p >= 1.0:
        return probs
    ordered, order = probs.sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < recipe.top_p * ordered.sum(-1, keepdim=True)
    kept[:, 0] = True
    if recipe.top_k > 0:
        kept[:, recipe.top_k :] = False
    return torch.zeros_like(probs).scatter_(1, order, ordered * kept)
