"""Tests of AdamW on a flat arena against torch's, and of the training state around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import pytest
import torch

from models import CPU
from tickwork.compute.lora import Adapter
from tickwork.compute.optimizer import Trainable
from tickwork.types import AdamParams, LoraConfig
from tickwork_kernels import adamw_step

SIZES = (1, 7, 64, 33, 1, 129, 16, 1023)
SHAPES = {"model.a": (5, 7), "model.b": (3, 2), "lm_head": (4, 11)}


def schedule(step: int) -> AdamParams:
    """Return parameters that differ at every step."""
    return AdamParams(
        learning_rate=1e-3 * (1 + math.sin(step)),
        beta1=0.9 if step % 3 else 0.5,
        beta2=0.999 if step % 2 else 0.95,
        eps=1e-8 if step % 5 else 1e-12,
        weight_decay=0.1 * (step % 4),
    )


def gradients(step: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Return one step's gradients, of sizes over many orders of magnitude, some of them zero."""
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(size, generator=generator) * 10.0 ** (index - 4) * (step % 7 != index)
        for index, size in enumerate(sizes)
    ]


def apply(group: dict[str, object], params: AdamParams) -> None:
    """Give a torch optimizer other settings."""
    group |= {
        "lr": params.learning_rate,
        "betas": (params.beta1, params.beta2),
        "eps": params.eps,
        "weight_decay": params.weight_decay,
    }


@pytest.mark.parametrize("foreach", [False, True])
def test_flat_steps_are_torchs_bit_for_bit(foreach: bool) -> None:
    """A hundred steps on one arena equal torch's AdamW on separate tensors, in every bit, whatever changes."""
    start = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0))
    theirs = [torch.nn.Parameter(part.clone()) for part in start.split(SIZES)]
    optimizer = torch.optim.AdamW(theirs, foreach=foreach)
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for number in range(1, 101):
        params, grads = schedule(number), gradients(number, SIZES)
        apply(optimizer.param_groups[0], params)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        settings = attrs.asdict(params)
        del settings["grad_clip_norm"]
        flat = torch.cat(grads)
        before = flat.clone()
        adamw_step(ours, flat, exp_avg, exp_avg_sq, step=number, **settings)
        assert torch.equal(flat, before)
        assert torch.equal(ours, torch.cat([p.detach() for p in theirs])), f"step {number}"
    for name, mine in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        assert torch.equal(mine, torch.cat([optimizer.state[p][name] for p in theirs]))
    assert not torch.equal(ours, start)


def make() -> Trainable:
    """Return a training state of a small adapter with some weights."""
    adapter = Adapter(SHAPES, LoraConfig(rank=2), 0, CPU)
    adapter.arena.copy_(torch.randn(adapter.arena.shape, generator=torch.Generator().manual_seed(1)))
    return Trainable(adapter)


def give(state: Trainable, scale: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    """Accumulate random gradients as a request does; return them in the order of the arena."""
    generator = torch.Generator().manual_seed(seed)
    grads = [scale * torch.randn(t.shape, generator=generator) for pair in state.adapter.tensors.values() for t in pair]
    state.accumulate(torch.cat([grad.flatten() for grad in grads]))
    state.requests += 1
    return grads


def everything(state: Trainable) -> list[torch.Tensor]:
    """Return copies of the weights and moments."""
    held = [state.adapter.arena, state.exp_avg, state.exp_avg_sq]
    return [tensor.clone() for tensor in held if tensor is not None]


def test_several_models_steps_are_torchs() -> None:
    """A training state stepped by requests follows torch's AdamW on the adapter's own tensors, bit for bit."""
    state = make()
    theirs = [torch.nn.Parameter(t.detach().clone()) for pair in state.adapter.tensors.values() for t in pair]
    optimizer = torch.optim.AdamW(theirs, foreach=False)
    for number in range(1, 21):
        apply(optimizer.param_groups[0], schedule(number))
        for parameter, grad in zip(theirs, give(state, seed=number), strict=True):
            parameter.grad = grad
        optimizer.step()
        metrics = state.step(schedule(number))
        assert metrics["optim/step"] == number
    mine = [t for pair in state.adapter.tensors.values() for t in pair]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("scale", "limit"), [(1.0, 0.5), (1.0, 1e6), (1e-3, 1e-4), (1e4, 1.0), (0.0, 1.0)])
def test_clipping_is_torchs(scale: float, limit: float) -> None:
    """The global norm is reported before clipping, and the step is that of torch's clipped gradient."""
    state = make()
    theirs = [torch.nn.Parameter(t.detach().clone()) for pair in state.adapter.tensors.values() for t in pair]
    for parameter, grad in zip(theirs, give(state, scale), strict=True):
        parameter.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
    params = AdamParams(learning_rate=0.1, eps=1e-3, grad_clip_norm=limit)  # an eps at which the norm matters
    optimizer = torch.optim.AdamW(theirs, foreach=False)
    apply(optimizer.param_groups[0], params)
    optimizer.step()
    metrics = state.step(params)
    assert metrics["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    mine = torch.cat([t.detach().flatten() for pair in state.adapter.tensors.values() for t in pair])
    want = torch.cat([p.detach().flatten() for p in theirs])
    torch.testing.assert_close(mine, want, rtol=0, atol=1e-6)


def test_no_clipping_at_zero() -> None:
    """``grad_clip_norm=0`` turns clipping off instead of stopping all movement."""
    clipped, free = make(), make()
    for state in (clipped, free):
        give(state, 1e3)
    clipped.step(AdamParams(learning_rate=0.1, eps=1.0, grad_clip_norm=1e-3))
    free.step(AdamParams(learning_rate=0.1, eps=1.0, grad_clip_norm=0.0))
    start = make().adapter.arena
    assert (free.adapter.arena - start).norm() > 100 * (clipped.adapter.arena - start).norm() > 0


def test_a_step_without_gradients_changes_nothing_and_says_so() -> None:
    """Without a backward request a step applies nothing, not even decay or momentum, and reports so."""
    state = make()
    give(state)
    state.step(AdamParams(weight_decay=0.1))
    before = everything(state)
    metrics = state.step(AdamParams(learning_rate=1.0, weight_decay=0.1))
    assert metrics == {"optim/applied": 0.0, "optim/grad_norm": 0.0, "optim/step": 1.0}
    assert all(torch.equal(a, b) for a, b in zip(everything(state), before, strict=True))
    assert len(before) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_dropped(bad: float) -> None:
    """A gradient with one bad number changes no weight and no moment; the next step goes on as if it had not been."""
    state, twin = make(), make()
    for each in (state, twin):
        give(each)
        each.step(AdamParams())
    give(state, seed=1)
    state.grad[3] = bad
    metrics = state.step(AdamParams())
    assert metrics["optim/applied"] == 0.0
    assert metrics["optim/step"] == 1.0
    assert not math.isfinite(metrics["optim/grad_norm"])
    for each in (state, twin):
        give(each, seed=2)
        assert each.step(AdamParams())["optim/applied"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(everything(state), everything(twin), strict=True))


def test_gradients_add_up_until_the_step_clears_them() -> None:
    """Requests add to the gradient; a step uses the sum and leaves zero."""
    state = make()
    first, second = give(state, seed=1), give(state, seed=2)
    total = torch.cat([(a + b).flatten() for a, b in zip(first, second, strict=True)])
    assert torch.equal(state.grad, total)
    metrics = state.step(AdamParams())
    assert metrics["optim/grad_norm"] == pytest.approx(float(total.norm()), rel=1e-6)
    assert not state.grad.any()
    assert state.requests == 0


def test_the_heads_gradients_find_their_place() -> None:
    """Gradients of the head's pair are added at the end of an arena, and nowhere else."""
    state = make()
    flat = torch.zeros_like(state.grad)
    for _ in range(2):
        state.adapter.add_head(flat, (torch.ones(2, 4), torch.full((11, 2), 2.0)))
    named = state.adapter.named(flat)
    touched = {name for name, view in named.items() if view.any()}
    assert touched == {"base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"}
    assert bool((named["base_model.model.lm_head.lora_A.weight"] == 2).all())
    assert bool((named["base_model.model.lm_head.lora_B.weight"] == 4).all())
