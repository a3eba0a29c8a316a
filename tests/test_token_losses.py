"""Tests of the token losses: values and hand-written derivatives against autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tickwork_kernels as kernels
from tickwork.compute.losses import TOKEN_LOSSES, settings
from tickwork.requests import ForwardBackward

Formula = Callable[[torch.Tensor, Mapping[str, torch.Tensor], Mapping[str, float]], torch.Tensor]


def clamped(x: torch.Tensor, config: Mapping[str, float]) -> torch.Tensor:
    """Bring into the configured bounds."""
    return torch.clamp(x, config["clip_low_threshold"], config["clip_high_threshold"])


def ratio(lp: torch.Tensor, i: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the importance ratio."""
    return torch.exp(lp - i["logprobs"])


FORMULAS: dict[str, Formula] = {
    "cross_entropy": lambda lp, i, c: -(i["weights"] * lp),
    "importance_sampling": lambda lp, i, c: -(ratio(lp, i) * i["advantages"]),
    "ppo": lambda lp, i, c: -torch.min(ratio(lp, i) * i["advantages"], clamped(ratio(lp, i), c) * i["advantages"]),
    "cispo": lambda lp, i, c: -(clamped(ratio(lp, i), c).detach() * lp * i["advantages"]),
    "dro": lambda lp, i, c: -(lp * i["advantages"] - 0.5 * c["beta"] * (lp - i["logprobs"]) ** 2),
}
CONFIGS: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 4.0},
    "dro": {"beta": 0.05},
}
CLIPPED = ("ppo", "cispo")
RATIOS = ("importance_sampling", *CLIPPED)


def inputs_of(q: list[float], values: list[float]) -> dict[str, torch.Tensor]:
    """Return the inputs of any loss: ``values`` are weights and advantages."""
    given_values = torch.tensor(values)
    return {"logprobs": torch.tensor(q), "advantages": given_values, "weights": given_values}


def ours(
    name: str, lp: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluate the loss under test, with the inputs that it declares and no others."""
    spec = TOKEN_LOSSES[name]
    return spec.evaluate(lp, {key: inputs[key] for key in spec.inputs}, config)


def compare(name: str, lp: torch.Tensor, inputs: Mapping[str, torch.Tensor], config: Mapping[str, float]) -> None:
    """Hold value and derivative to those of the formula in float64."""
    leaf = lp.double().requires_grad_()
    want = FORMULAS[name](leaf, {key: value.double() for key, value in inputs.items()}, config)
    (slope,) = torch.autograd.grad(want.sum(), leaf)
    loss, derivative = ours(name, lp, inputs, config)
    assert loss.dtype == derivative.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(derivative.double(), slope, rtol=1e-5, atol=1e-6)


numbers32 = st.floats(-4, 4, width=32)
logprobs32 = st.floats(-12, 0, width=32)
triples = st.lists(st.tuples(logprobs32, st.floats(-3, 3, width=32), numbers32), min_size=1, max_size=8)


@pytest.mark.parametrize("name", FORMULAS)
@given(rows=triples)
def test_value_and_derivative_are_the_formulas(name: str, rows: list[tuple[float, float, float]]) -> None:
    """For any logprobs, sampler logprobs and advantages the loss and its slope are autograd's of the formula."""
    lp = torch.tensor([row[0] for row in rows])
    inputs = inputs_of([row[0] - row[1] for row in rows], [row[2] for row in rows])
    config = CONFIGS[name]
    for bound in config.values() if name in CLIPPED else ():
        # Within rounding of a bound float32 and float64 may stand on different sides of a jump.
        assume(bool(((ratio(lp.double(), {"logprobs": inputs["logprobs"].double()}) - bound).abs() > 1e-4).all()))
    compare(name, lp, inputs, config)


@pytest.mark.parametrize("name", FORMULAS)
@given(
    low=st.floats(0, 1, width=32),
    high=st.floats(1, 5, width=32),
    beta=st.floats(0, 2, width=32),
    row=st.tuples(logprobs32, st.floats(-2, 2, width=32), numbers32),
)
def test_configuration_is_honoured(
    name: str, low: float, high: float, beta: float, row: tuple[float, float, float]
) -> None:
    """Any bounds and any beta change the loss as the formula says."""
    config = {"clip_low_threshold": low, "clip_high_threshold": high, "beta": beta}
    lp, inputs = torch.tensor([row[0]]), inputs_of([row[0] - row[1]], [row[2]])
    exact = float(ratio(lp.double(), {"logprobs": inputs["logprobs"].double()}))
    assume(all(abs(exact - bound) > 1e-4 for bound in (low, high)) or name not in CLIPPED)
    compare(name, lp, inputs, config)


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("bounds", [(1.0, 1.2), (0.8, 1.0), (1.0, 1.0)])
def test_gradient_flows_at_a_clip_bound(name: str, advantage: float, bounds: tuple[float, float]) -> None:
    """A ratio exactly at a bound is inside it: the slope is that of the unclipped objective."""
    config = dict(zip(("clip_low_threshold", "clip_high_threshold"), bounds, strict=True))
    lp = torch.tensor([-1.5])
    inputs = inputs_of([-1.5], [advantage])
    compare(name, lp, inputs, config)
    assert ours(name, lp, inputs, config)[1].item() == -advantage


@pytest.mark.parametrize(
    ("distance", "advantage", "slope"),
    [
        (1.0, 1.0, 0.0),  # already much likelier, and better: no further
        (1.0, -1.0, math.e),  # likelier though worse: back, at full strength
        (-1.0, 1.0, -math.exp(-1)),  # less likely though better
        (-1.0, -1.0, 0.0),  # less likely and worse: enough
    ],
)
def test_ppo_clips_one_side_only(distance: float, advantage: float, slope: float) -> None:
    """PPO drops the gradient where it would lead further out of the bounds, and only there."""
    _, derivative = ours("ppo", torch.tensor([-2.0 + distance]), inputs_of([-2.0], [advantage]), CONFIGS["ppo"])
    assert derivative.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("distance", [100.0, 1000.0])
def test_zero_advantage_silences_an_overflowing_ratio(name: str, distance: float) -> None:
    """Where the advantage is zero the loss and its slope are zero, even if the ratio is infinite in float32."""
    inputs = inputs_of([-distance, -2.0], [0.0, 1.0])
    lp = torch.tensor([-0.5, -2.0])
    loss, derivative = ours(name, lp, inputs, TOKEN_LOSSES[name].config)
    assert loss[0] == derivative[0] == 0
    assert derivative[1] == -1


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_clipping_bounds_an_overflowing_ratio(advantage: float) -> None:
    """CISPO's weight stays at its bound however large the ratio becomes."""
    _, derivative = ours("cispo", torch.tensor([-0.5]), inputs_of([-1000.0], [advantage]), TOKEN_LOSSES["cispo"].config)
    assert derivative.item() == -4.0 * advantage


@pytest.mark.parametrize("name", FORMULAS)
def test_any_shape_is_elementwise(name: str) -> None:
    """``[N, K]`` values give what their elements give one by one."""
    generator = torch.Generator().manual_seed(0)
    lp, q, values = (torch.randn(3, 4, generator=generator) for _ in range(3))
    inputs = {"logprobs": q, "advantages": values, "weights": values}
    together = ours(name, lp, inputs, CONFIGS[name])
    for row in range(3):
        alone = ours(name, lp[row], {key: value[row] for key, value in inputs.items()}, CONFIGS[name])
        assert all(torch.equal(part[row], other) for part, other in zip(together, alone, strict=True))


def test_losses_by_name_are_the_kernels() -> None:
    """Each name runs the kernel of that name, and no loss is missing."""
    assert {name: spec.evaluate for name, spec in TOKEN_LOSSES.items()} == {
        name: getattr(kernels, name) for name in FORMULAS
    }


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("cross_entropy", {}),
        ("importance_sampling", {}),
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        ("dro", {"beta": 0.05}),
    ],
)
def test_defaults_are_the_documented_ones(name: str, defaults: dict[str, float]) -> None:
    """Without a configuration the documented defaults apply; what is given replaces just that one."""
    assert settings(ForwardBackward("m", (), name, {}, True)) == defaults
    for key in defaults:
        assert settings(ForwardBackward("m", (), name, {key: 7}, True)) == {**defaults, key: 7.0}
