"""Tests of independence: a client's numbers do not depend on who shares its pass, whatever the others do there."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Bench, data_of, datum, numbers, train
from tickwork.engine.plan import Pass, Piece, Stage
from tickwork.engine.request import Outcome, Request
from tickwork.errors import LossError
from tickwork.results import ForwardBackwardOutput
from tickwork.types import Datum

# Relative: float32, products of other shapes.
SAME = 1e-6
RANKS = {"a": 4, "b": 4, "c": 2, "d": 4}
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "wide", "custom", "forward")
BROKEN = ("raises", "overflows", "diverged")


@functools.cache
def bench() -> Bench:
    """A device with four clients on one base, one of them of another rank, one without the head."""
    made = Bench()
    for seed, (name, rank) in enumerate(RANKS.items()):
        made.create(name, rank=rank, seed=seed, train_unembed=name != "d")
    return made


def rl(lengths: list[int], seed: int, far: float) -> list[Datum]:
    """RL datums; the sampler's logprobs lie ``far`` away from the model's."""
    random = numbers(seed)
    return [
        datum(
            random.integers(0, 64, n),
            random.integers(0, 64, n),
            logprobs=(random.normal(size=n) - 4 + far).astype(np.float32),
            advantages=random.normal(size=n).astype(np.float32),
        )
        for n in lengths
    ]


def spread(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A custom loss that mixes its datums."""
    total = torch.cat(logprobs)
    return total.square().sum() - total.sum() ** 2 / len(total), {"rows:sum": float(len(logprobs))}


def raises(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A custom loss with an error in it."""
    raise ZeroDivisionError("nothing to divide by")


def request(name: str, kind: str, lengths: list[int], seed: int) -> Request:
    """Build what a client asks for."""
    if kind == "wide":
        return train(name, data_of(lengths, seed, width=3))
    if kind in ("cross_entropy", "diverged"):
        return train(name, data_of(lengths, seed))
    if kind == "forward":
        return train(name, data_of(lengths, seed), backward=False)
    if kind in ("custom", "raises"):
        return train(name, data_of(lengths, seed), spread if kind == "custom" else raises)
    if kind == "overflows":
        return train(name, rl(lengths, seed, -300.0), "importance_sampling")
    return train(name, rl(lengths, seed, 0.0), kind)


def together(*requests: Request) -> list[Outcome]:
    """Run requests in one pass."""
    item = Pass(tuple(Piece(each, 0, len(each.rows)) for each in requests))
    found = {outcome.request: outcome for outcome in bench().device.run(Stage((item,)), 7, lambda: False)}
    return [found[each] for each in requests]


def taken(name: str) -> dict[str, torch.Tensor]:
    """Take a client's accumulated gradient away."""
    gradient = bench().gradient(name)
    bench().model(name).state.grad.zero_()
    return gradient


def start_afresh() -> None:
    """Take away what a failed example has left behind."""
    for name in RANKS:
        taken(name)


asks = st.dictionaries(
    st.sampled_from(sorted(RANKS)),
    st.tuples(st.sampled_from(LOSSES), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 99)),
    min_size=2,
)


@given(asks)
@settings(max_examples=60, deadline=None)
def test_company_changes_nothing(asks: dict[str, tuple[str, list[int], int]]) -> None:
    """Losses, logprobs, metrics and gradients of each client are those it has alone, to 1e-6."""
    alone: dict[str, tuple[ForwardBackwardOutput, dict[str, torch.Tensor]]] = {}
    start_afresh()
    for name, ask in asks.items():
        (outcome,) = together(request(name, *ask))
        assert outcome.error is None
        alone[name] = outcome.value, taken(name)
    for name, outcome in zip(asks, together(*(request(name, *ask) for name, ask in asks.items())), strict=True):
        assert outcome.error is None
        same_outputs(alone[name][0], outcome.value)
        same_gradients(alone[name][1], taken(name))


def same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Assert that every tensor agrees; one that is zero but for rounding is measured by the whole gradient."""
    whole = float(torch.cat([grad.flatten() for grad in one.values()]).norm())
    for key, grad in one.items():
        assert float((other[key] - grad).norm()) <= 3 * SAME * float(grad.norm()) + 0.3 * SAME * whole, key


def same_outputs(one: ForwardBackwardOutput, other: ForwardBackwardOutput) -> None:
    """Assert that loss, metrics and logprobs agree."""
    assert other.metrics == pytest.approx(one.metrics, rel=10 * SAME, abs=10 * SAME)
    for mine, wanted in zip(other.loss_fn_outputs, one.loss_fn_outputs, strict=True):
        got, want = (each["logprobs"].to_numpy() for each in (mine, wanted))
        np.testing.assert_allclose(got, want, rtol=SAME, atol=2 * SAME)


@given(asks, st.sampled_from(BROKEN), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_sick_client_stays_alone(asks: dict[str, tuple[str, list[int], int]], how: str, seed: int) -> None:
    """Beside a callable that raises, a ratio that overflows or weights that are NaN, others get what they get alone."""
    sick, *others = asks
    start_afresh()
    adapter = bench().model(sick).state.adapter
    kept = adapter.arena.clone()
    mine = {name: request(name, *asks[name]) for name in others}
    alone = {name: (together(request(name, *asks[name]))[0].value, taken(name)) for name in others}
    if how == "diverged":
        with torch.no_grad():
            adapter.arena.fill_(torch.nan)
    outcomes = together(request(sick, how, [3, 5], seed), *mine.values())
    with torch.no_grad():
        adapter.arena.copy_(kept)
    assert isinstance(outcomes[0].error, LossError) or how == "diverged"
    broken = taken(sick)
    assert how == "diverged" or not any(bool(grad.any()) for grad in broken.values())
    for name, outcome in zip(others, outcomes[1:], strict=True):
        assert outcome.error is None
        same_outputs(alone[name][0], outcome.value)
        same_gradients(alone[name][1], taken(name))
