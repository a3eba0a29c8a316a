"""Losses, each against its formula: its value, and its gradient as weights of a cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tickwork.conformance.probe import differs, probe, refused, require, same
from tickwork.conformance.target import Target

ADVANTAGES = np.linspace(-1.0, 1.0, 10, dtype=np.float32)
# Sampled logprobs around the learner's, so that ratios fall below, within and above the clips.
SHIFT = np.array([-0.5, 0.4, -0.1, 0.1, 0.5, -0.4, 0.05, -0.05, 0.3, -0.3], dtype=np.float32)

# (learner's logprobs, sampled ones, advantages) -> (loss of each token, its derivative by the learner's logprob)
Formula = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _check(target: Target, name: str, config: Any, formula: Formula) -> str:
    [lp] = target.look(target.client(), [target.datum()])[1]
    q = lp + SHIFT
    datum = target.datum(logprobs=q.tolist(), advantages=ADVANTAGES.tolist())
    loss, slope = formula(lp, q, ADVANTAGES)
    found = target.look(target.client(), [datum], name, config)[0]
    same(found, loss.sum(), f"{name} {config or ''}", tolerance=1e-3)
    linear = target.datum(weights=(-slope).tolist())
    by_loss, by_weights = target.effect(([datum], name, config)), target.effect(([linear],))
    same(by_loss, by_weights, f"the gradient of {name}", tolerance=0.02 * float(np.abs(by_weights).max()) + 1e-5)
    return f"value {found:.4f} and gradient as documented"


def _importance(lp: np.ndarray, q: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ratio = np.exp(lp - q)
    return -ratio * a, -ratio * a


def _ppo(low: float, high: float) -> Formula:
    def formula(lp: np.ndarray, q: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ratio = np.exp(lp - q)
        clipped = np.clip(ratio, low, high)
        live = ratio * a <= clipped * a
        return -np.minimum(ratio * a, clipped * a), np.where(live, -ratio * a, 0.0)

    return formula


def _cispo(low: float, high: float) -> Formula:
    def formula(lp: np.ndarray, q: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        clipped = np.clip(np.exp(lp - q), low, high)
        return -clipped * lp * a, -clipped * a

    return formula


@probe
def importance_sampling(target: Target) -> str:
    """-sum r A."""
    return _check(target, "importance_sampling", None, _importance)


@probe
def ppo(target: Target) -> str:
    """-sum min(r A, clip(r) A), clipped to 0.8 and 1.2 unless told otherwise."""
    return _check(target, "ppo", None, _ppo(0.8, 1.2))


@probe
def ppo_thresholds(target: Target) -> str:
    """The clips are absolute bounds of the ratio, and honoured."""
    low = {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}
    return _check(target, "ppo", low, _ppo(0.95, 1.05))


@probe
def cispo(target: Target) -> str:
    """-sum stop(clip(r)) lp A."""
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    return _check(target, "cispo", config, _cispo(0.9, 1.1))


@probe
def dro(target: Target) -> str:
    """-sum (lp A - beta / 2 (lp - q)^2)."""
    return _check(
        target,
        "dro",
        {"beta": 0.5},
        lambda lp, q, a: (-(lp * a - 0.25 * (lp - q) ** 2), -(a - 0.5 * (lp - q))),
    )


@probe
def dro_beta(target: Target) -> str:
    """The strength of its pull is honoured."""
    [lp] = target.look(target.client(), [target.datum()])[1]
    datum = target.datum(logprobs=(lp + SHIFT).tolist(), advantages=ADVANTAGES.tolist())
    client = target.client()
    weak, strong = (target.look(client, [datum], "dro", {"beta": beta})[0] for beta in (0.1, 1.0))
    differs(weak, strong, "beta has no effect")
    return "honoured"


@probe
def unknown_losses_are_refused(target: Target) -> str:
    """A loss that is not there is not replaced by another."""
    with refused(target, "loss 'no_such_loss'"):
        target.look(target.client(), [target.datum()], "no_such_loss")
    return "refused"


@probe
def unknown_loss_settings_are_refused(target: Target) -> str:
    """A setting that is not there is not ignored."""
    datum = target.datum(logprobs=[-1.0] * 10, advantages=[1.0] * 10)
    with refused(target, "ppo's setting 'epsilon'"):
        target.look(target.client(), [datum], "ppo", {"epsilon": 0.2})
    return "refused"


@probe
def custom_loss_of_the_client(target: Target) -> str:
    """A Python loss trains as the same built-in one does."""
    client = target.client()
    before = target.scores(client)
    target.wait(client.forward_backward_custom([target.datum()], lambda _, lps: (-lps[0].sum(), {})))
    target.step(client)
    same(target.scores(client) - before, target.effect(), "a custom loss against cross_entropy", tolerance=1e-3)
    return "as the same built-in one"


@probe
def custom_loss_of_the_server(target: Target) -> str:
    """A loss sent as a graph trains as the same built-in one does."""
    import warnings  # noqa: PLC0415

    def negative(logprobs: Any, weights: Any) -> Any:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/negative:sum": loss}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = target.wait(target.service.create_custom_loss(negative, {"logprobs": 1, "weights": 1}))
    client = target.client()
    before = target.scores(client)
    out = target.wait(client.forward_backward_custom([target.datum()], handle))
    target.step(client)
    same(target.scores(client) - before, target.effect(), "a custom loss against cross_entropy", tolerance=1e-3)
    require("custom/negative:sum" in out.metrics, "its metric is missing")
    return "one pass" if handle.loss_id else "run by the client"
