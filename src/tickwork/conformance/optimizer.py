"""Every parameter of AdamW: accepted is not enough, it has to act."""

from __future__ import annotations

import numpy as np

from tickwork.conformance.probe import Verdict, differs, probe, refused, require, same
from tickwork.conformance.target import OTHER, Target


def _acts(target: Target, name: str, first: float, second: float, *, steps: int = 1) -> str:
    data = ([target.datum()],), ([target.datum(OTHER, weights=[3.0] * 5)],)
    effects = []
    for value in (first, second):
        client = target.client()
        before = target.scores(client)
        for step in range(steps):
            target.learn(client, *data[step % 2])
            target.step(client, **{name: value})
        effects.append(target.scores(client) - before)
    differs(effects[0], effects[1], f"{name} {first:g} and {second:g} have the same effect", least=1e-5)
    return f"{first:g} and {second:g} differ"


@probe
def learning_rate(target: Target) -> str:
    """The step's size; 0 changes nothing."""
    still = target.effect(learning_rate=0.0)
    same(still, np.zeros_like(still), "a step of size 0")
    half, whole = target.effect(learning_rate=5e-4), target.effect(learning_rate=1e-3)
    same(2 * half, whole, "half a step, doubled", tolerance=0.15 * float(np.abs(whole).max()))
    return "0 changes nothing, the rest in proportion"


@probe
def beta1(target: Target) -> str:
    """Decay of the first moment."""
    return _acts(target, "beta1", 0.0, 0.95, steps=3)


@probe
def beta2(target: Target) -> str:
    """Decay of the second moment."""
    effects = []
    for value in (0.1, 0.999):
        client = target.client()
        before = target.scores(client)
        for weight in (5.0, 0.2):
            target.learn(client, [target.datum(weights=[weight] * 10)])
            target.step(client, beta2=value, eps=1e-8, learning_rate=1e-3)
        effects.append(target.scores(client) - before)
    differs(effects[0], effects[1], "beta2 0.1 and 0.999 have the same effect", least=1e-5)
    return "0.1 and 0.999 differ"


@probe
def eps(target: Target) -> str:
    """What is added to the root of the second moment."""
    return _acts(target, "eps", 1.0, 1e-8)


@probe
def weight_decay(target: Target) -> str:
    """Decoupled decay, in proportion to the learning rate."""
    return _acts(target, "weight_decay", 0.0, 5.0)


@probe
def grad_clip_norm(target: Target) -> str:
    """The global norm's bound; 0 is off, and one that is never reached changes nothing."""
    free, loose, tight = (target.effect(grad_clip_norm=norm) for norm in (0.0, 1e6, 1e-2))
    same(loose, free, "a bound that is never reached", tolerance=1e-3 * float(np.abs(free).max()) + 1e-7)
    differs(tight, free, "a bound of 0.01 has no effect", least=1e-5)
    require(float(np.abs(tight).max()) < float(np.abs(free).max()), "a tight bound makes the step larger")
    return "off at 0, acts when reached"


@probe
def parameters_out_of_range_are_refused(target: Target) -> str:
    """Nonsense is not trained with."""
    for name, value in (("learning_rate", -1.0), ("beta1", 1.5), ("beta2", -0.1), ("eps", -1.0)):
        client = target.client()
        target.learn(client, [target.datum()])
        with refused(target, f"{name} {value:g}"):
            target.step(client, **{name: value})
    return "refused"


@probe
def learning_rate_is_per_step(target: Target) -> str:
    """Each step has its own parameters."""
    client = target.client()
    target.learn(client, [target.datum()])
    before = target.scores(client)
    target.step(client, learning_rate=0.0)
    same(target.scores(client), before, "a first step of size 0")
    target.learn(client, [target.datum()])
    target.step(client, learning_rate=0.05)
    differs(target.scores(client), before, "a later step's own size has no effect", Verdict.IGNORED)
    return "each step has its own"
