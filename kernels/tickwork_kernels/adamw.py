"""AdamW on flat arenas: one step of one adapter in plain torch, and of all adapters of a cycle at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch

from tickwork_kernels.adamw_state import (
    ADAMW_BLOCK,
    AdamWArena,
    AdamWSettings,
    AdamWState,
    check_states,
    join_master,
    split_master,
)
from tickwork_kernels.registry import Choice, Implementation, Registry
from tickwork_kernels.support import on_device, why_no_triton

__all__ = [
    "ADAMW",
    "ADAMW_BLOCK",
    "AdamWArena",
    "AdamWCase",
    "AdamWImplementation",
    "AdamWReport",
    "AdamWSettings",
    "AdamWState",
    "adamw_step",
    "adamw_steps",
    "explain_adamw",
    "join_master",
    "split_master",
]

# The small number of torch.nn.utils.clip_grad_norm_.
CLIP_EPS = 1e-6


def adamw_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scratch: torch.Tensor | None = None,
) -> None:
    """Update ``param``, ``exp_avg`` and ``exp_avg_sq`` in place, bit-equal to ``torch.optim.AdamW`` on CPU.

    Semantics: ``torch.optim.AdamW([param], lr, (beta1, beta2), eps, weight_decay).step()``.

    Args:
        param: parameters, ``[P]`` float32.
        grad: their gradient, ``[P]`` float32; read only.
        exp_avg: first moment, ``[P]`` float32.
        exp_avg_sq: second moment, ``[P]`` float32.
        step: number of this step, from 1.
        scratch: ``[P]`` float32 to work in; None takes memory for it before anything changes.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101; the order of the
    operations is that of torch's single-tensor implementation.
    """
    scratch = torch.empty_like(param) if scratch is None else scratch
    param.mul_(1 - learning_rate * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root_correction = (1 - beta2**step) ** 0.5
    denominator = torch.sqrt(exp_avg_sq, out=scratch).div_(root_correction).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-(learning_rate / (1 - beta1**step)))


@dataclass(frozen=True)
class AdamWReport:
    """What a step did, on the device of the states.

    Args:
        norms: ``[T]`` float32, of each adapter's gradient times its multiplier, before clipping.
        applied: ``[T]`` bool, False where the norm is not finite and the adapter was left as it was.
    """

    norms: torch.Tensor
    applied: torch.Tensor


@dataclass(frozen=True)
class AdamWCase:
    """One call of ``adamw_steps``, its arguments checked."""

    states: Sequence[AdamWState]
    settings: Sequence[AdamWSettings]
    zero_grad: bool = True

    @property
    def device(self) -> torch.device:
        """Device of all tensors; the CPU where there are none."""
        return self.states[0].param.device if self.states else torch.device("cpu")


class AdamWImplementation(Implementation[AdamWCase], Protocol):
    """One way to step adapters."""

    def run(self, case: AdamWCase) -> AdamWReport:
        """Do what ``adamw_steps`` says."""


ADAMW: Registry[AdamWImplementation] = Registry("adamw", "tickwork_kernels.adamw")


def adamw_steps(
    states: Sequence[AdamWState], settings: Sequence[AdamWSettings], *, zero_grad: bool = True, impl: str = "auto"
) -> AdamWReport:
    """Apply one AdamW step to every adapter, each with its own settings; in place.

    Semantics, per adapter: with ``g = grad * grad_multiplier`` and ``norm`` its float32 2-norm,
    ``adamw_step(master, g * min(1, clip_norm / (norm + 1e-6)), ...)``, and ``param`` rounded from the master. Where
    ``norm`` is not finite nothing but the gradient changes. An adapter's result never depends on the others.

    Args:
        states: the adapters, all on one device, each with tensors of its own.
        settings: one for each state.
        zero_grad: whether to clear every gradient, also those that were not applied.
        impl: a name in ``ADAMW``, or "auto".

    Raises:
        ValueError: an argument is invalid; names it.
        NotImplementedError: the implementation named can not run this.
    """
    case = _case(states, settings, zero_grad)
    implementation = ADAMW.choose(case, impl).implementation
    with torch.no_grad():
        return implementation.run(case)


def explain_adamw(
    states: Sequence[AdamWState], settings: Sequence[AdamWSettings], impl: str = "auto"
) -> Choice[AdamWImplementation]:
    """Return which implementation ``adamw_steps`` would take for these arguments, and why; raises what it would."""
    return ADAMW.choose(_case(states, settings, True), impl)


def _case(states: Sequence[AdamWState], settings: Sequence[AdamWSettings], zero_grad: bool) -> AdamWCase:
    if len(states) != len(settings):
        raise ValueError(f"settings must be one for each state, not {len(settings)} for {len(states)} states")
    check_states(states)
    return AdamWCase(states, settings, zero_grad)


class _Torch:
    """The reference: one adapter after the other, the only one that runs everywhere."""

    name = "torch"

    def why_not(self, case: AdamWCase) -> str | None:
        return None

    def preference(self, case: AdamWCase) -> int:
        return 0

    def run(self, case: AdamWCase) -> AdamWReport:
        # All that is needed is taken before anything changes: running out half-way would leave some states stepped.
        largest = max((state.param.numel() for state in case.states), default=0)
        scratch = torch.empty(2, largest, dtype=torch.float32, device=case.device)
        norms = [_apply(state, each, scratch) for state, each in zip(case.states, case.settings, strict=True)]
        if case.zero_grad:
            for state in case.states:
                state.grad.zero_()
        stacked = torch.stack(norms) if norms else torch.empty(0, dtype=torch.float32, device=case.device)
        return AdamWReport(stacked, stacked.isfinite())


def _apply(state: AdamWState, settings: AdamWSettings, scratch: torch.Tensor) -> torch.Tensor:
    scaled, rest = scratch[:, : state.grad.numel()]
    grad = state.grad if settings.grad_multiplier == 1 else torch.mul(state.grad, settings.grad_multiplier, out=scaled)
    norm: torch.Tensor = torch.linalg.vector_norm(grad)
    if settings.clip_norm is not None:
        factor = torch.full_like(norm, settings.clip_norm).div_(norm + CLIP_EPS).clamp_(max=1)
        grad = torch.mul(grad, factor, out=scaled)
    _update(state, grad, settings, norm.isfinite(), rest)
    return norm


def _update(
    state: AdamWState, grad: torch.Tensor, settings: AdamWSettings, applied: torch.Tensor, scratch: torch.Tensor
) -> None:
    wait = grad.device.type != "cpu"  # whether looking at ``applied`` would wait for the device
    if not (wait or applied):
        return
    master = state.read_master()
    changed = (master, state.exp_avg, state.exp_avg_sq)
    before = [tensor.clone() for tensor in changed] if wait else []
    adamw_step(master, grad, state.exp_avg, state.exp_avg_sq, **settings.adamw(), scratch=scratch)
    for tensor, old in zip(changed, before, strict=False):
        tensor.copy_(torch.where(applied, tensor, old))
    state.write_master(master)


class _Triton:
    """Two launches for all adapters."""

    name = "triton"

    def why_not(self, case: AdamWCase) -> str | None:
        return why_no_triton(case.device) if case.states else None

    def preference(self, case: AdamWCase) -> int:
        return 10 if case.device.type == "cuda" else -1

    def run(self, case: AdamWCase) -> AdamWReport:
        if not case.states:
            return AdamWReport(torch.empty(0), torch.empty(0, dtype=torch.bool))
        with on_device(case.device):
            return cast("AdamWReport", import_module("tickwork_kernels.adamw_triton").run(case))


ADAMW.register(_Torch())
ADAMW.register(_Triton())
