"""Checks of ``adamw_steps``: what every implementation, named by the caller, must do on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tickwork_kernels.adamw import (
    ADAMW_BLOCK,
    AdamWArena,
    AdamWReport,
    AdamWSettings,
    AdamWState,
    adamw_steps,
    split_master,
)

Check = Callable[[str, torch.device], None]
SIZES = (0, 1, ADAMW_BLOCK - 1, ADAMW_BLOCK, ADAMW_BLOCK + 1, 5 * ADAMW_BLOCK + 16)
USUAL: dict[str, Any] = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def checks() -> list[tuple[str, Check]]:
    """Return the checks by name; each takes an implementation's name and a device and raises an AssertionError."""
    each = (
        sizes_step_as_torchs_optimizer,
        settings_are_each_adapters_own,
        a_master_is_stepped_and_the_param_is_it_rounded,
        a_remainder_is_an_exact_master,
        clipping_scales_by_the_norm_over_the_whole_adapter,
        a_gradient_that_is_not_finite_is_skipped,
        the_gradient_is_kept_unless_zeroed,
        nothing_to_step_is_fine,
        foreign_tensors_step_as_an_arenas,
        company_changes_no_bit,
        repeats_are_equal_in_every_bit,
        padding_is_left_alone,
    )
    return [(check.__name__, check) for check in each]


def randoms(size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return ``[size]`` float32 numbers, the same on every device."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)


def settings(step: int, **changes: Any) -> AdamWSettings:
    """Return usual settings with some changed."""
    return AdamWSettings(step, **{**USUAL, **changes})


def filled(sizes: Sequence[int], device: torch.device, exact: str | None = None, seed: int = 0) -> AdamWArena:
    """Return an arena whose masters are random; adapter ``i`` has the numbers of seed ``seed + i``."""
    dtype = torch.float32 if exact is None else torch.bfloat16
    arena = AdamWArena(sizes, device=device, dtype=dtype, exact=exact)
    for index, state in enumerate(arena.states):
        start(state, randoms(state.param.numel(), seed + index, device))
    return arena


def start(state: AdamWState, master: torch.Tensor) -> None:
    """Set the master that a state begins with."""
    state.write_master(state.read_master().copy_(master))


def give(states: Sequence[AdamWState], seed: int) -> None:
    """Set random gradients, over several orders of magnitude from one adapter to the next."""
    for index, state in enumerate(states):
        grad = randoms(state.grad.numel(), 1000 * seed + index, state.grad.device)
        state.grad.copy_(grad * 10.0 ** (index % 4 - 2))


def copies(state: AdamWState) -> dict[str, torch.Tensor]:
    """Return copies of a state's tensors."""
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def same_bits(label: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Demand that two tensors are equal in every bit."""
    as_int = {2: torch.int16, 4: torch.int32}[found.element_size()]
    differing = (found.view(as_int) != wanted.view(as_int)).nonzero().flatten()
    for at in differing[:1].tolist():
        values = f"first at {at}: {float(found[at])!r}, wanted {float(wanted[at])!r}"
        raise AssertionError(f"{label}: {len(differing)} of {len(found)} differ in their bits, {values}")


def same_state(label: str, found: AdamWState, wanted: dict[str, torch.Tensor], but: Sequence[str] = ()) -> None:
    """Demand that a state's tensors, but some, have the bits of other ones."""
    for name in found.tensors().keys() - but:
        same_bits(f"{label}.{name}", found.tensors()[name], wanted[name])


def demand(fact: bool, message: str) -> None:
    """Raise an AssertionError unless it is a fact."""
    if not fact:
        raise AssertionError(message)


def sizes_step_as_torchs_optimizer(impl: str, device: torch.device) -> None:
    """Twenty steps of each size follow ``torch.optim.AdamW``; those of the reference in every bit."""
    states = filled(SIZES, device).states
    theirs = [torch.nn.Parameter(state.param.clone()) for state in states]
    optimizer = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 21):
        give(states, step)
        for parameter, state in zip(theirs, states, strict=True):
            parameter.grad = state.grad.clone()
        optimizer.step()
        adamw_steps(states, [settings(step)] * len(states), impl=impl)
    for size, state, parameter in zip(SIZES, states, theirs, strict=True):
        torch.testing.assert_close(state.param, parameter.detach(), rtol=1e-5, atol=1e-7)
        if impl == "torch":
            same_bits(f"param of size {size}", state.param, parameter.detach())


def settings_are_each_adapters_own(impl: str, device: torch.device) -> None:
    """Adapters at other steps, with other rates, betas, eps, decay and multipliers, each follow their own."""
    each = [
        settings(1, learning_rate=0.5, beta1=0.0, beta2=0.0, eps=1e-3),
        settings(7, beta1=0.3, weight_decay=0.0),
        settings(100_000, beta2=0.95, eps=1.0, grad_multiplier=0.25),
        settings(2, learning_rate=0.0, grad_multiplier=-3.0),
        settings(3, learning_rate=0.1, weight_decay=5.0, clip_norm=0.5, grad_multiplier=1e-3),
    ] * 5
    ours, theirs = (filled([40 + 8 * index for index in range(len(each))], device).states for _ in range(2))
    for seed in (1, 2):
        for states, name in ((ours, impl), (theirs, "torch")):
            give(states, seed)
            adamw_steps(states, each, impl=name, zero_grad=False)
    same_bits("exp_avg at beta1 0, which is the gradient", ours[0].exp_avg, ours[0].grad)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.tensors(), wanted.tensors(), rtol=1e-5, atol=1e-7)


def _beside_float32(impl: str, device: torch.device, exact: str) -> list[AdamWState]:
    arena, plain = filled(SIZES, device, exact), filled(SIZES, device)
    for steps in range(1, 6):
        for states in (arena.states, plain.states):
            give(states, steps)
            adamw_steps(states, [settings(steps, clip_norm=1.0)] * len(states), impl=impl)
    for size, state, plain_one in zip(SIZES, arena.states, plain.states, strict=True):
        same_bits(f"master of size {size}", state.read_master(), plain_one.param)
        same_state(f"size {size}", plain_one, state.tensors(), but=["param"])
    return arena.states


def a_master_is_stepped_and_the_param_is_it_rounded(impl: str, device: torch.device) -> None:
    """A bfloat16 parameter's master has the bits of a float32 run, and it is that rounded to nearest even."""
    for state in _beside_float32(impl, device, "master"):
        same_bits("param", state.param, state.read_master().to(torch.bfloat16))


def a_remainder_is_an_exact_master(impl: str, device: torch.device) -> None:
    """Parameter and remainder have the bits of a float32 run; so do ties, subnormals, the largest and zeros."""
    for state in _beside_float32(impl, device, "remainder"):
        master = state.read_master()
        tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
        same_bits("param", state.param[~tie], master.to(torch.bfloat16)[~tie])
    ends = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    tops = torch.tensor([0, 1, 0x80, 0x3F80, 0x3F81, 0x7F7F], dtype=torch.int32) << 16
    master = (tops[:, None] + ends).flatten().view(torch.float32)
    master = torch.cat([master, -master]).to(device)
    state = AdamWArena([master.numel()], device=device, dtype=torch.bfloat16, exact="remainder").states[0]
    start(state, master)
    same_bits("master as set", state.read_master(), master)
    adamw_steps([state], [settings(1, learning_rate=0.0)], impl=impl)
    same_bits("master after a step of rate 0", state.read_master(), master)
    same_bits("param after a step of rate 0", state.param, split_master(master)[0])


def clipping_scales_by_the_norm_over_the_whole_adapter(impl: str, device: torch.device) -> None:
    """The norm is that of all blocks, of the multiplied gradient; a larger one is scaled down, a smaller one is not."""
    for limit, multiplier in ((0.5, 1.0), (0.5, 100.0), (1e9, 0.5), (math.inf, 1.0)):
        ours, plain = filled(SIZES, device).states, filled(SIZES, device).states
        give(ours, 1)
        norms = [float(torch.linalg.vector_norm(state.grad.double() * multiplier)) for state in ours]
        for ours_each, plain_each, norm in zip(ours, plain, norms, strict=True):
            plain_each.grad.copy_(ours_each.grad.double() * multiplier * min(1.0, limit / (norm + 1e-6)))
        each = settings(1, eps=1.0, clip_norm=limit, grad_multiplier=multiplier)  # an eps at which the norm matters
        report = adamw_steps(ours, [each] * len(ours), impl=impl)
        adamw_steps(plain, [settings(1, eps=1.0)] * len(plain), impl="torch")
        wanted = torch.tensor(norms, dtype=torch.float32, device=device)
        torch.testing.assert_close(report.norms, wanted, rtol=1e-5, atol=0)
        for found, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(found.exp_avg, other.exp_avg, rtol=2e-5, atol=1e-10)
            torch.testing.assert_close(found.param, other.param, rtol=1e-5, atol=1e-7)


def a_gradient_that_is_not_finite_is_skipped(impl: str, device: torch.device) -> None:
    """An adapter with one bad number, in any block, keeps all but its gradient; its neighbours step."""
    for exact in (None, "master", "remainder"):
        for bad in (math.nan, math.inf, -math.inf):
            states = filled([5 * ADAMW_BLOCK + 3] * 4, device, exact).states
            give(states, 1)
            states[1].grad[-1] = bad
            states[3].grad[ADAMW_BLOCK] = bad
            before = [copies(state) for state in states]
            report = adamw_steps(states, [settings(1, clip_norm=1.0)] * 4, impl=impl)
            demand(report.applied.tolist() == [True, False, True, False], f"applied: {report.applied.tolist()}")
            demand(report.norms.isfinite().tolist() == report.applied.tolist(), f"norms: {report.norms.tolist()}")
            for index, (state, old) in enumerate(zip(states, before, strict=True)):
                demand(not bool(state.grad.any()), f"grad of adapter {index} is not zeroed after {bad}")
                if index % 2:
                    same_state(f"adapter {index} with {bad}", state, old, but=["grad"])
                else:
                    demand(bool(state.exp_avg.all()), f"adapter {index} beside one with {bad} did not step")


def the_gradient_is_kept_unless_zeroed(impl: str, device: torch.device) -> None:
    """``zero_grad`` decides about the gradient, also of a skipped adapter, and about nothing else."""
    kept, zeroed = filled(SIZES, device).states, filled(SIZES, device).states
    for states, zero_grad in ((kept, False), (zeroed, True)):
        give(states, 1)
        states[-1].grad[7] = math.nan
        before = [copies(state) for state in states]
        each = settings(1, clip_norm=0.1, grad_multiplier=2.0)
        adamw_steps(states, [each] * len(states), zero_grad=zero_grad, impl=impl)
        for state, old in zip(states, before, strict=True):
            same_bits("grad", state.grad, torch.zeros_like(state.grad) if zero_grad else old["grad"])
    for found, wanted in zip(kept, zeroed, strict=True):
        same_state("without zero_grad", found, wanted.tensors(), but=["grad"])


def nothing_to_step_is_fine(impl: str, device: torch.device) -> None:
    """No adapters, and only empty ones, give their report."""
    report = adamw_steps([], [], impl=impl)
    demand(report.norms.shape == (0,) and report.norms.dtype == torch.float32, f"norms of none: {report.norms}")
    demand(report.applied.shape == (0,) and report.applied.dtype == torch.bool, f"applied of none: {report.applied}")
    report = adamw_steps(filled([0, 0], device).states, [settings(1), settings(2, clip_norm=1.0)], impl=impl)
    demand(report.norms.tolist() == [0, 0] and report.applied.tolist() == [True, True], f"of empty ones: {report}")


def _run(states: Sequence[AdamWState], impl: str, places: Sequence[int] | None = None) -> AdamWReport:
    # Three steps with clipping, of all states or of those at some places.
    chosen = range(len(states)) if places is None else places
    for step in range(1, 4):
        give(states, step)
        each = [settings(step + index, clip_norm=0.5 + index) for index in chosen]
        report = adamw_steps([states[index] for index in chosen], each, impl=impl)
    return report


def _unaligned(state: AdamWState) -> AdamWState:
    # One element into an allocation: no address is a multiple of 16 bytes.
    return AdamWState(**{name: torch.cat([t[:1], t])[len(t[:1]) :] for name, t in state.tensors().items()})


def foreign_tensors_step_as_an_arenas(impl: str, device: torch.device) -> None:
    """Tensors allocated one by one, unaligned or of other kinds, step in the same call, with the same bits."""
    for exact in (None, "master", "remainder"):
        arena, states = filled(SIZES, device, exact).states, filled(SIZES, device, exact).states
        foreign = [_unaligned(state) for state in states]
        _run(arena, impl)
        _run(foreign, impl)
        for size, found, wanted in zip(SIZES, foreign, arena, strict=True):
            same_state(f"foreign {exact} of size {size}", found, wanted.tensors())


def company_changes_no_bit(impl: str, device: torch.device) -> None:
    """An adapter's result is the same alone, among others, among other kinds, and in another order."""

    def mixed() -> list[AdamWState]:
        parts = [filled(SIZES, device, exact).states for exact in (None, "master", "remainder")]
        return [state for states in zip(*parts, strict=True) for state in states]

    together, alone, backwards = mixed(), mixed(), mixed()
    everyone = range(len(together))
    norms = _run(together, impl).norms
    same_bits("norms in another order", _run(backwards, impl, everyone[::-1]).norms.flip(0), norms)
    for index in everyone:
        same_bits(f"norm of adapter {index} alone", _run(alone, impl, [index]).norms, norms[index : index + 1])
        for label, other in (("alone", alone), ("in another order", backwards)):
            same_state(f"adapter {index} {label}", other[index], together[index].tensors(), but=["grad"])


def repeats_are_equal_in_every_bit(impl: str, device: torch.device) -> None:
    """The same steps from the same start give the same bits, with many adapters too."""
    sizes = [16 * (index % 5) + index for index in range(40)] + [9 * ADAMW_BLOCK]
    first, second = filled(sizes, device).states, filled(sizes, device).states
    same_bits("norms", _run(second, impl).norms, _run(first, impl).norms)
    for index, (found, wanted) in enumerate(zip(second, first, strict=True)):
        same_state(f"adapter {index}", found, wanted.tensors())


def padding_is_left_alone(impl: str, device: torch.device) -> None:
    """What lies in an arena between the adapters is not touched, whatever the settings."""
    for exact in (None, "master", "remainder"):
        arena = filled([3, ADAMW_BLOCK + 1, 0, 5], device, exact)
        between = torch.ones(len(arena.arenas["param"]), dtype=torch.bool, device=device)
        for first, state in zip(arena.starts, arena.states, strict=True):
            between[first : first + state.param.numel()] = False
        for tensor in arena.arenas.values():
            tensor[between] = 7
        _run(arena.states, impl)
        for name, tensor in arena.arenas.items():
            demand(bool((tensor[between] == 7).all()), f"{name} was written outside the adapters")
