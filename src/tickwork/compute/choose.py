"""From logits to tokens: temperature, top-k, top-p, and one uniform number per token."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch


@attrs.frozen
class Recipe:
    """How one row is drawn: temperature 0 is greedy, ``top_k`` -1 and ``top_p`` 1 keep all."""

    temperature: float
    top_k: int
    top_p: float

    @property
    def cuts(self) -> bool:
        """Whether it leaves tokens out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)


def choose(
    logits: torch.Tensor, uniforms: torch.Tensor, recipes: Sequence[Recipe]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the distribution function.

    Args:
        logits: ``[S, V]`` float32.
        uniforms: ``[S]`` float64 in [0, 1), one for each row.
        recipes: how to draw each row.

    Returns:
        ``(tokens [S] int64, logp [S, V] float32)``. ``logp`` is the whole vocabulary's distribution at the
        temperature (at temperature 0 the plain one), not renormalised after top-k and top-p. Where a row's logits
        are not finite it is NaN, and the token means nothing.
    """
    logp = torch.log_softmax(logits / _column([recipe.temperature or 1.0 for recipe in recipes], logits), -1)
    greedy = [recipe.temperature == 0.0 for recipe in recipes]
    if all(greedy):
        return logits.argmax(-1), logp
    probs = logp.exp().double()
    cut = [row for row, recipe in enumerate(recipes) if recipe.cuts]
    if cut:
        rows = torch.tensor(cut, device=logits.device)
        probs[rows] = _keep(probs[rows], [recipes[row] for row in cut])
    sums = probs.cumsum(-1)
    drawn = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)[:, 0]
    drawn = drawn.clamp_max_(logits.shape[1] - 1)
    if any(greedy):
        drawn = torch.where(torch.tensor(greedy, device=logits.device), logits.argmax(-1), drawn)
    return drawn, logp


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _keep(probs: torch.Tensor, recipes: Sequence[Recipe]) -> torch.Tensor:
    """Zero what top-k and top-p leave out; ties go to the lower token id."""
    ordered, order = probs.sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < _column([recipe.top_p for recipe in recipes], probs) * ordered.sum(-1, keepdim=True)
    most = [recipe.top_k if recipe.top_k > 0 else probs.shape[1] for recipe in recipes]
    kept &= torch.arange(probs.shape[1], device=probs.device) < torch.tensor(most, device=probs.device)[:, None]
    kept[:, 0] = True
    return torch.zeros_like(probs).scatter_(1, order, ordered * kept)
