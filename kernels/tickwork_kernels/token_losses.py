"""Token losses: elementwise in a token's logprob and its inputs, with their derivative.

Each takes ``logp`` (float32, any shape), the loss inputs (tensors of that shape) and its configuration, and
returns ``(loss, d loss / d logp)`` of that shape; the loss of a request is the plain sum. The derivative is written
out because it is needed as soon as a logprob is known, inside the pass over the head, where no autograd runs.

Source: the loss functions documented for the Tinker API; PPO: arXiv 1707.06347; CISPO: MiniMax-M1,
arXiv 2506.13585; DRO: arXiv 2405.19107.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Inputs = Mapping[str, torch.Tensor]
Config = Mapping[str, float]
Pair = tuple[torch.Tensor, torch.Tensor]


def cross_entropy(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-weights * logp``; weights are any finite numbers."""
    weights = inputs["weights"]
    return -weights * logp, -weights


def importance_sampling(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-exp(logp - logprobs) * advantages``."""
    gain = _ratio(logp, inputs) * inputs["advantages"]
    return -gain, -gain


def ppo(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-min(r * A, clamp(r, low, high) * A)`` with ``r = exp(logp - logprobs)``; bounds are ratios, not epsilons."""
    ratio, advantages = _ratio(logp, inputs), inputs["advantages"]
    gain = ratio * advantages
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * advantages
    return -torch.minimum(gain, clipped), torch.where(gain <= clipped, -gain, torch.zeros_like(gain))


def cispo(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-stop_gradient(clamp(r, low, high)) * logp * A`` with ``r = exp(logp - logprobs)``."""
    ratio = _ratio(logp, inputs).clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    weight = ratio * inputs["advantages"]
    return -weight * logp, -weight


def dro(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-(logp * A - beta / 2 * (logp - logprobs) ** 2)``."""
    beta, distance = config["beta"], logp - inputs["logprobs"]
    loss = -(logp * inputs["advantages"] - 0.5 * beta * distance.square())
    return loss, beta * distance - inputs["advantages"]


def _ratio(logp: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    # Where the advantage is 0 the ratio has no say; 1 there keeps an overflow times 0 from becoming NaN.
    ratio = torch.exp(logp - inputs["logprobs"])
    return torch.where(inputs["advantages"] == 0, torch.ones_like(ratio), ratio)
