"""The built-in token losses under ``triton.jit``; each is held to its torch function by the conformance suite."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ratio(logp, sampled, advantages):
    return tl.where(advantages == 0, 1.0, tl.exp(logp - sampled))


@triton.jit
def cross_entropy(logp, inputs, config):
    """See ``token_losses.cross_entropy``."""
    return -inputs[0] * logp, -inputs[0]


@triton.jit
def importance_sampling(logp, inputs, config):
    """See ``token_losses.importance_sampling``."""
    gain = _ratio(logp, inputs[0], inputs[1]) * inputs[1]
    return -gain, -gain


@triton.jit
def ppo(logp, inputs, config):
    """See ``token_losses.ppo``."""
    ratio = _ratio(logp, inputs[0], inputs[1])
    gain = ratio * inputs[1]
    clipped = tl.minimum(tl.maximum(ratio, config[0]), config[1]) * inputs[1]
    return -tl.minimum(gain, clipped), tl.where(gain <= clipped, -gain, 0.0)


@triton.jit
def cispo(logp, inputs, config):
    """See ``token_losses.cispo``."""
    ratio = _ratio(logp, inputs[0], inputs[1])
    weight = tl.minimum(tl.maximum(ratio, config[0]), config[1]) * inputs[1]
    return -weight * logp, -weight


@triton.jit
def dro(logp, inputs, config):
    """See ``token_losses.dro``."""
    distance = logp - inputs[0]
    loss = -(logp * inputs[1] - 0.5 * config[0] * distance * distance)
    return loss, config[0] * distance - inputs[1]


@triton.jit
def apply_kernel(
    logp, inputs, config, losses, upstream, count,
    LOSS: tl.constexpr, INPUTS: tl.constexpr, SETTINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Evaluate a twin on ``[count]`` logprobs and ``[INPUTS, count]`` inputs, alone; for the conformance suite."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    given = ()
    for j in tl.static_range(INPUTS):
        given = given + (tl.load(inputs + j * count + at, mask=inside, other=0.0),)
    settings = ()
    for j in tl.static_range(SETTINGS):
        settings = settings + (tl.load(config + j),)
    loss, slope = LOSS(tl.load(logp + at, mask=inside, other=0.0), given, settings)
    tl.store(losses + at, loss, mask=inside)
    tl.store(upstream + at, slope, mask=inside)
