"""AdamW: a step of many adapters of many small tensors, in one arena, against torch's fused AdamW one by one.

The floor counts each byte once: parameter, both moments and gradient read, all four written, the gradient as zeros.
The anchor leaves its gradients as they are, which is less work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.kernels import oracle
from bench.kernels.cases import Case
from bench.kernels.job import ANCHOR, FULL, NAIVE, REGISTERED, Candidate, Errors, Floor, Job, Limits, Mark, Run
from tickwork_kernels.adamw import ADAMW, AdamWArena, AdamWCase, AdamWSettings, AdamWState, adamw_step, adamw_steps
from tickwork_kernels.adamw import explain_adamw as explain
from tickwork_kernels.conformance import adamw as conformance

USUAL = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01}
SETTINGS = AdamWSettings(1, **USUAL)
FLOPS_PER_PARAMETER = 16
LIMITS = Limits(1e-3, 1e-3)

Apply = Callable[[], object]


def build(case: Case, device: torch.device) -> Job:
    """Return the job of a case."""
    sizes = tensors(case)
    arena = AdamWArena([sum(sizes)] * case.n, device=device)
    fill(arena, case.seed)
    grad = arena.arenas["grad"].clone()
    candidates = _registered(arena, grad, case)
    candidates += [
        _torch("torch-fused", ANCHOR, arena, grad, case, fused=True),
        _torch("torch-foreach", NAIVE, arena, grad, case, foreach=True),
    ]
    count = sum(sizes) * case.n
    floors = {FULL: Floor(FLOPS_PER_PARAMETER * count, 8 * arena.arenas["param"].element_size() * count)}
    return Job(case, candidates, floors, conformance.checks(), LIMITS)


def tensors(case: Case) -> list[int]:
    """Return the sizes of an adapter's tensors, small and large in turn, as those of A and B are."""
    return [case.v // 2 if index % 2 else case.v + case.v // 2 for index in range(case.d)]


def fill(arena: AdamWArena, seed: int) -> None:
    """Draw parameters and gradients; moments are zeros, as before a first step."""
    param = arena.arenas["param"]
    draw = torch.Generator(param.device).manual_seed(seed)
    param.normal_(generator=draw)
    arena.arenas["grad"].normal_(generator=draw)


def _registered(arena: AdamWArena, grad: torch.Tensor, case: Case) -> list[Candidate]:
    def prepare() -> None:
        arena.arenas["grad"].copy_(grad)

    found, settings = [], [SETTINGS] * len(arena.states)
    auto = explain(arena.states, settings).name
    for each in ADAMW.all():
        why = each.why_not(AdamWCase(arena.states, settings))
        apply = partial(adamw_steps, arena.states, settings, impl=each.name)
        runs: dict[str, Run] = {FULL: _run(apply)}
        errors = partial(_errors, partial(_few_ours, each.name), case, grad.device)
        status = why and f"refused: {why}"
        chosen = (FULL,) if each.name == auto else ()
        found.append(Candidate(each.name, REGISTERED, runs, errors, prepare, status=status, chosen=chosen))
    return found


def _torch(name: str, kind: str, arena: AdamWArena, grad: torch.Tensor, case: Case, **how: bool) -> Candidate:
    optimizers: list[torch.optim.Optimizer] = []

    def prepare() -> None:
        if not optimizers:
            optimizers.extend(_optimizers(arena.states, tensors(case), how))
            step()  # makes the moments, which an arena has from the start
        arena.arenas["grad"].copy_(grad)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    errors = partial(_errors, partial(_few_theirs, how), case, grad.device)
    return Candidate(name, kind, {FULL: _run(step)}, errors, prepare)


def _optimizers(
    states: Sequence[AdamWState], sizes: Sequence[int], how: dict[str, bool]
) -> list[torch.optim.Optimizer]:
    """Return one optimizer for each adapter over views of the arena's parameters, tensor by tensor."""
    found: list[torch.optim.Optimizer] = []
    betas = (USUAL["beta1"], USUAL["beta2"])
    for state in states:
        parameters = [torch.nn.Parameter(part) for part in state.param.split(list(sizes))]
        for parameter, part in zip(parameters, state.grad.split(list(sizes)), strict=True):
            parameter.grad = part
        rest = {"lr": USUAL["learning_rate"], "eps": USUAL["eps"], "weight_decay": USUAL["weight_decay"]}
        found.append(torch.optim.AdamW(parameters, betas=betas, **rest, **how))  # type: ignore[arg-type]
    return found


def _run(apply: Apply) -> Run:
    def run(mark: Mark) -> object:
        return apply()

    return run


def _few_ours(name: str, arena: AdamWArena) -> None:
    adamw_steps(arena.states, [SETTINGS] * len(arena.states), impl=name)


def _few_theirs(how: dict[str, bool], arena: AdamWArena) -> None:
    for optimizer in _optimizers(arena.states, [state_size(arena)], how):
        optimizer.step()


def state_size(arena: AdamWArena) -> int:
    """Return the parameters of an adapter."""
    return arena.states[0].param.numel()


def _errors(step: Callable[[AdamWArena], None], case: Case, device: torch.device) -> Errors:
    """Compare the first update of a few adapters with float64's, and a repeat with the first."""
    updates = []
    for _ in range(2):
        arena = AdamWArena([sum(tensors(case)[:4])] * 2, device=device)
        fill(arena, case.seed)
        before = [state.param.double() for state in arena.states]
        wanted = [_exact(state) - old for state, old in zip(arena.states, before, strict=True)]
        step(arena)
        updates.append([state.param.double() - old for state, old in zip(arena.states, before, strict=True)])
    error = max(oracle.error(*pair) for pair in zip(updates[0], wanted, strict=True))
    same = all(torch.equal(one, other) for one, other in zip(*updates, strict=True))
    return Errors(gradient=error, deterministic=same)


def _exact(state: AdamWState) -> torch.Tensor:
    param, grad = state.param.double(), state.grad.double()
    adamw_step(param, grad, torch.zeros_like(grad), torch.zeros_like(grad), step=1, **USUAL, scratch=None)
    return param
