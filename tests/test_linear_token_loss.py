"""Tests of ``linear_token_loss``: the loss on top of ``linear_logprob``, in one sweep, and how to bring one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from tickwork_kernels import (
    LoraSegment,
    TokenLoss,
    TokenLossResult,
    bind,
    cross_entropy,
    head,
    linear_logprob,
    linear_token_loss,
    register_token_loss,
    token_losses,
)
from tickwork_kernels.conformance.losses import checks
from tickwork_kernels.head_torch import TorchHead
from tickwork_kernels.token_losses import unregister_token_loss

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
SETTINGS = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05},
    "cispo": {"clip_high_threshold": 1.1},
    "dro": {"beta": 0.7},
}
ROWS, VOCAB, DIM = 21, 9, 4
Leaves = dict[str, torch.Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def make_leaves(dtype: torch.dtype = torch.float64) -> Leaves:
    """Return a head with two adapters, all of which require gradients."""
    shapes = {"hidden": (ROWS, DIM), "weight": (VOCAB, DIM), "bias": (VOCAB,)}
    shapes |= {"a0": (2, DIM), "b0": (VOCAB, 2), "a1": (3, DIM), "b1": (VOCAB, 3)}
    found = {name: normal(*shape, seed=n, dtype=dtype) for n, (name, shape) in enumerate(shapes.items())}
    return {name: leaf.requires_grad_() for name, leaf in found.items()}


def arguments(leaves: Leaves) -> dict[str, Any]:
    """Return what is given by keyword: everything that a head can have."""
    spans = ((0, 5, "0"), (7, 15, "1"), (15, ROWS, "0"))
    lora = [LoraSegment(start, stop, leaves["a" + n], leaves["b" + n], 0.5) for start, stop, n in spans]
    return {"bias": leaves["bias"], "softcap": 3.0, "multiplier": 1.2, "temperature": 0.8, "lora": lora}


def make_targets(count: int | None) -> torch.Tensor:
    """Return targets, with ignored ones and, where there are several, repeated ones and rows of ignored ones."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, VOCAB, (ROWS,) if count is None else (ROWS, count), generator=generator)
    targets[::5] = -100
    if count is not None and count > 1:
        targets[1, 0] = -100
        targets[2:4, 1] = targets[2:4, 0]
    return targets


def make_inputs(loss: TokenLoss, targets: torch.Tensor, near: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return inputs of which some silence their token; sampled logprobs lie close to the present ones."""
    inputs = {name: normal(*targets.shape, seed=n) for n, name in enumerate(loss.inputs)}
    for name, values in inputs.items():
        if name == "logprobs":
            inputs[name] = near.detach().double() + 0.2 * values
        else:
            values[targets % 4 == 1] = 0.0
            values[6] = 0.0
    return inputs


def on_top(
    leaves: Leaves, targets: torch.Tensor, loss: TokenLoss, inputs: Any, config: Any
) -> tuple[torch.Tensor, ...]:
    """Return total, losses and logprobs of the loss on top of ``linear_logprob``."""
    logprobs = linear_logprob(leaves["hidden"], leaves["weight"], targets, **arguments(leaves)).logprobs
    settings = {**loss.config, **(config or {})}
    losses = loss.evaluate(logprobs, inputs, settings)[0].masked_fill(targets == -100, 0.0)
    return losses.sum(), losses, logprobs


def compare(
    loss: str | TokenLoss, count: int | None, config: Mapping[str, float] | None, scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> TokenLossResult:  # fmt: skip
    """Hold value and all gradients to those of the loss on top of ``linear_logprob``."""
    spec = token_losses()[loss] if isinstance(loss, str) else loss
    leaves, targets = make_leaves(dtype), make_targets(count)
    near = linear_logprob(leaves["hidden"], leaves["weight"], targets, **arguments(leaves)).logprobs
    inputs = make_inputs(spec, targets, near)
    ours = linear_token_loss(leaves["hidden"], leaves["weight"], targets, loss, inputs, config, **arguments(leaves))
    total, losses, logprobs = on_top(leaves, targets, spec, {k: v.to(dtype) for k, v in inputs.items()}, config)
    rtol = 1e-10 if dtype == torch.float64 else 3e-5
    assert losses.ne(0).any()
    torch.testing.assert_close(ours.loss, total, rtol=rtol, atol=rtol)
    torch.testing.assert_close(ours.losses, losses.detach(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(ours.logprobs, logprobs.detach(), rtol=rtol, atol=rtol)
    assert ours.losses.shape == ours.logprobs.shape == targets.shape
    got = torch.autograd.grad(scale * ours.loss, list(leaves.values()))
    want = torch.autograd.grad(scale * total, list(leaves.values()))
    torch.testing.assert_close(got, want, rtol=rtol, atol=4 * rtol)
    return ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_loss_on_top(name: str, count: int | None, dtype: torch.dtype) -> None:
    """Each built-in loss has the value and all gradients of the same loss on top of ``linear_logprob``."""
    compare(name, count, None, dtype=dtype)


@pytest.mark.parametrize("name", ["ppo", "cispo", "dro"])
def test_settings_replace_the_defaults(name: str) -> None:
    """What ``config`` names is replaced, what it does not name keeps its default; an upstream scales all gradients."""
    changed, usual = compare(name, None, SETTINGS[name], scale=3.0), compare(name, None, {}, scale=-0.5)
    assert abs(changed.loss.item() - usual.loss.item()) > 1e-3


def test_every_built_in_loss_is_compared() -> None:
    """No loss is left out above."""
    assert set(LOSSES) == set(token_losses())


@pytest.mark.parametrize("name", LOSSES)
def test_several_chunks_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks the rows take, value and gradients are the same."""
    monkeypatch.setattr(head, "CHUNK_ROWS", (2, 4))
    compare(name, 2, None)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dro"])
def test_leaving_silent_rows_out_changes_nothing(name: str) -> None:
    """Rows of silent tokens, which ``zero_when`` leaves out of the backward, change neither value nor gradient."""
    spec = token_losses()[name]
    kept, left_out = (compare(each, 2, None) for each in (replace(spec, zero_when=None), spec))
    torch.testing.assert_close(tuple(left_out)[:4], tuple(kept)[:4])
    leaves, targets = make_leaves(), make_targets(2)
    inputs = {key: torch.zeros(ROWS, 2) for key in spec.inputs}
    silent = linear_token_loss(leaves["hidden"], leaves["weight"], targets, name, inputs, **arguments(leaves))
    assert not silent.losses.any()
    assert not any(grad.any() for grad in torch.autograd.grad(silent.loss, list(leaves.values())))
    torch.testing.assert_close(silent.logprobs, kept.logprobs)


def test_rows_that_are_left_out_cost_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows in which a token counts are asked for a gradient; the others for their logprobs."""
    seen = []
    forward = TorchHead.forward

    def spy(self: TorchHead, rows: Any, loss: Any) -> Any:
        seen.append((len(rows.hidden), rows.needs.any))
        return forward(self, rows, loss)

    monkeypatch.setattr(TorchHead, "forward", spy)
    leaves, weights = make_leaves(), torch.zeros(ROWS, 2)
    weights[3, 1] = weights[9, 0] = weights[9, 1] = 1.0
    targets = make_targets(2).clamp(min=0)
    linear_token_loss(leaves["hidden"], leaves["weight"], targets, "cross_entropy", {"weights": weights}, impl="torch")
    assert seen == [(2, True), (ROWS - 2, False)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [0, ROWS])
def test_nothing_but_ignored_tokens_is_no_loss(rows: int, name: str) -> None:
    """Without a token to count, and without rows, the loss and all gradients are zero."""
    leaves = make_leaves()
    leaves["hidden"] = leaves["hidden"].detach()[:rows].requires_grad_()
    targets = torch.full((rows, 2), -100)
    inputs = {key: torch.ones(rows, 2) for key in token_losses()[name].inputs}
    found = linear_token_loss(
        leaves["hidden"], leaves["weight"], targets, name, inputs, bias=leaves["bias"], entropy=True
    )
    assert found.loss.item() == 0.0
    assert found.losses.shape == found.logprobs.shape == (rows, 2)
    assert found.lse.shape == found.entropy.shape == (rows,)
    assert not any(part.any() for part in found[1:])
    wanted = [leaves[key] for key in ("hidden", "weight", "bias")]
    grads = torch.autograd.grad(found.loss, wanted)
    assert all(torch.equal(grad, torch.zeros_like(leaf)) for grad, leaf in zip(grads, wanted, strict=True))


def test_only_the_sum_has_a_gradient() -> None:
    """Losses, logprobs, lse and entropy are values; the entropy comes when asked for."""
    leaves, targets = make_leaves(), make_targets(None)
    inputs = {"weights": torch.ones(ROWS)}
    call = (leaves["hidden"], leaves["weight"], targets, "cross_entropy", inputs)
    found = linear_token_loss(*call, entropy=True)
    assert found.loss.requires_grad
    assert not any(part.requires_grad for part in found[1:])
    want = linear_logprob(leaves["hidden"], leaves["weight"], targets, entropy=True)
    torch.testing.assert_close(found.entropy, want.entropy.detach())
    torch.testing.assert_close(found.lse, want.lse.detach())
    assert linear_token_loss(*call).entropy is None
    with torch.no_grad():
        assert not linear_token_loss(*call).loss.requires_grad


def test_backward_scales_gradients_that_exist_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the call the head is not run again, however often the loss is differentiated, and nothing is consumed."""
    leaves, targets = make_leaves(), make_targets(None)
    inputs = {"weights": torch.ones(ROWS)}
    loss = linear_token_loss(leaves["hidden"], leaves["weight"], targets, "cross_entropy", inputs).loss
    monkeypatch.delattr(TorchHead, "forward")
    monkeypatch.delattr(TorchHead, "bulk")
    pair = (leaves["hidden"], leaves["weight"])
    once, thrice, again = (torch.autograd.grad(k * loss, pair, retain_graph=True) for k in (1, 3, 1))
    torch.testing.assert_close(thrice, tuple(3 * grad for grad in once))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@pytest.mark.parametrize("impl", ["torch", "attention"])
def test_bfloat16_gets_bfloat16_gradients_under_autocast_too(impl: str) -> None:
    """A bfloat16 head gives float32 losses and bfloat16 gradients, the same with autocast as without."""
    leaves, targets = make_leaves(torch.bfloat16), make_targets(None)
    inputs, hidden = {"weights": torch.ones(ROWS)}, leaves["hidden"]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        found = linear_token_loss(hidden, leaves["weight"].detach(), targets, "cross_entropy", inputs, impl=impl)
        return found.loss, torch.autograd.grad(found.loss, hidden)[0]

    without = run()
    with torch.autocast("cpu", torch.bfloat16):
        within = run()
    assert [part.dtype for part in without] == [torch.float32, torch.bfloat16]
    assert all(torch.equal(one, other) for one, other in zip(without, within, strict=True))


def focal(logp: torch.Tensor, inputs: Any, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``-weights * (1 - p) ** gamma * logp``: what is likely already counts less."""
    p, gamma, weights = logp.exp(), config["gamma"], inputs["weights"]
    rest = 1 - p
    slope = gamma * rest ** (gamma - 1) * p * logp - rest**gamma
    return -weights * rest**gamma * logp, weights * slope


FOCAL = TokenLoss("focal", focal, ("weights",), {"gamma": 2.0}, zero_when="weights")


@pytest.fixture
def registered() -> Iterator[None]:
    """``focal`` is known by its name."""
    assert register_token_loss(FOCAL) is FOCAL
    yield
    unregister_token_loss("focal")


@pytest.mark.parametrize("loss", ["focal", FOCAL], ids=["by name", "as an object"])
def test_a_loss_of_ones_own(loss: str | TokenLoss, registered: None) -> None:
    """A registered function is a loss like the built-in ones, with its settings; unregistered it can be handed over."""
    first, other = compare(loss, None, None), compare(loss, 2, {"gamma": 3.0}, scale=2.0)
    assert first.loss.ne(other.loss)


@pytest.mark.parametrize(("name", "check"), checks(), ids=[name for name, _ in checks()])
def test_a_loss_of_ones_own_is_held_to_the_same_checks(name: str, check: Any, registered: None) -> None:
    """The conformance suite takes a registered loss by its name; only the twin, which it has not, is left out."""
    refusal = check("focal", torch.device("cpu"))
    assert refusal == "has no twin" if name == "the twin agrees" else "FAILED" not in (refusal or "")


@pytest.mark.parametrize(
    ("wrong", "failing"),
    [
        (lambda logp, i, c: (focal(logp, i, c)[0], -focal(logp, i, c)[1]), "the derivative is autograds"),
        (lambda logp, i, c: (-logp + logp.roll(1, 0).detach(), -torch.ones_like(logp)), "a token is judged alone"),
        (lambda logp, i, c: (-logp, -torch.ones_like(logp)), "a silenced token has no loss"),
    ],
)
def test_a_wrong_loss_fails_the_check_of_its_mistake(wrong: Any, failing: str) -> None:
    """A wrong sign, a look at other tokens, a silent token that speaks: each fails the check that is about it."""
    register_token_loss(replace(FOCAL, evaluate=wrong))
    try:
        with pytest.raises(AssertionError):
            dict(checks())[failing]("focal", torch.device("cpu"))
    finally:
        unregister_token_loss("focal")


def test_a_loss_is_registered_once_and_names_its_own_input(registered: None) -> None:
    """A taken name, and a ``zero_when`` that is no input, are refused by name; a forgotten loss is unknown."""
    with pytest.raises(ValueError, match="token loss 'focal' exists already; take another name"):
        register_token_loss(FOCAL)
    with pytest.raises(ValueError, match=r"zero_when='mask' is not among the inputs .*'weights'.* of 'other'"):
        register_token_loss(replace(FOCAL, name="other", zero_when="mask"))
    assert "other" not in token_losses()


ONES = torch.ones(3)
BAD: dict[str, tuple[Any, Any, Any, str]] = {
    "unknown loss": ("hinge", {}, None, "loss must be one of .*'cispo', 'cross_entropy'.* not 'hinge'"),
    "a bare function": (cross_entropy, {"weights": ONES}, None, "loss must be one of .* or a TokenLoss, not <function"),
    "missing input": ("ppo", {"logprobs": ONES}, None, r"inputs \['advantages'\] of 'ppo' are missing"),
    "unknown input": ("cross_entropy", {"weights": ONES, "w": ONES}, None, r"inputs \['w'\] are not those of"),
    "unknown setting": ("dro", {"logprobs": ONES, "advantages": ONES}, {"b": 1}, r"config \['b'\] .*takes \['beta'\]"),
    "input of another shape": (
        "cross_entropy",
        {"weights": torch.ones(3, 1)},
        None,
        r"inputs\['weights'\] must be \[3\]",
    ),
    "input on another device": ("cross_entropy", {"weights": ONES.to("meta")}, None, r"inputs\['weights'\] .*on meta"),
    "no tensor": ("cross_entropy", {"weights": [1, 1, 1]}, None, r"inputs\['weights'\] must be a tensor, not list"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_losses_and_inputs_are_named(bad: str) -> None:
    """The error says which argument is wrong, what it is and what it must be."""
    loss, inputs, config, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        linear_token_loss(torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 4]), loss, inputs, config)


def test_binding_fills_in_the_defaults() -> None:
    """``bind`` returns the loss with all its settings, and leaves what was given as it was."""
    config = {"clip_low_threshold": 0.5}
    bound = bind("ppo", {"logprobs": ONES, "advantages": ONES}, config)
    assert bound.config == {"clip_low_threshold": 0.5, "clip_high_threshold": 1.2}
    assert config == {"clip_low_threshold": 0.5}
    assert bound.loss is token_losses()["ppo"]
