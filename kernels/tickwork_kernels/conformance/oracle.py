"""The head in float64 under plain autograd, and the rule by which an implementation's error is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tickwork_kernels.head import Head, HeadCase, Lora, Needs, Rows, as_segments
from tickwork_kernels.head_held import HeldLogprobs, Memory
from tickwork_kernels.head_sweep import HeadGradients, evaluate
from tickwork_kernels.head_targets import Upstream
from tickwork_kernels.heads import choose_both
from tickwork_kernels.registry import RefusedError

EPSILON = 2.0**-24


@dataclass(frozen=True)
class Case:
    """Inputs of one call, and what comes in for logprobs, lse and entropy."""

    hidden: torch.Tensor
    targets: torch.Tensor
    head: Head
    upstream: Upstream
    lora: Lora | None = None
    temperature: torch.Tensor | None = None

    @property
    def rows(self) -> Rows:
        """What an implementation is given."""
        entropy, adapters = self.upstream.entropy is not None, self.lora is not None
        needs = Needs(adapters=adapters, entropy=entropy)
        segments = as_segments(self.lora, len(self.hidden))
        return Rows(self.hidden, self.targets, self.head, segments, self.temperature, entropy, needs)


@dataclass(frozen=True)
class Answer:
    """Results and gradients; None where there is none."""

    logprobs: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
    hidden: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None


NAMES = ("logprobs", "lse", "entropy", "hidden", "a", "b")


def make(
    rows: int = 37,
    width: int = 3,
    *,
    device: torch.device,
    vocab: int = 101,
    dim: int = 24,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    softcap: float | None = None,
    multiplier: float = 1.0,
    temperature: bool = False,
    rank: int = 0,
    lse: bool = False,
    entropy: bool = False,
    seed: int = 0,
) -> Case:
    """Return random inputs with logits as far apart as a trained model's; each row targets the last token too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device)

    head = Head(
        normal(vocab, dim, scale=3 * dim**-0.5).to(dtype),
        normal(vocab).to(dtype) if bias else None,
        softcap,
        multiplier,
    )
    lora = Lora(normal(rank, dim, scale=dim**-0.5), normal(vocab, rank, scale=0.3), 32 / rank) if rank else None
    targets = torch.randint(0, vocab, (rows, width), generator=generator).to(device)
    targets[:, 0] = vocab - 1
    upstream = Upstream(normal(rows, width), normal(rows) if lse else None, normal(rows) if entropy else None)
    hidden = normal(rows, dim).to(dtype)
    return Case(hidden, targets, head, upstream, lora, normal(rows).abs() + 0.5 if temperature else None)


def reference(case: Case, dtype: torch.dtype) -> Answer:
    """Compute everything by the plain formula and autograd, from the same rounded inputs."""
    head, lora, upstream = case.head, case.lora, case.upstream
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    leaves = [hidden]
    logits = hidden @ head.weight.to(dtype).T
    if lora is not None:
        a, b = (t.detach().to(dtype).requires_grad_() for t in (lora.a, lora.b))
        leaves += [a, b]
        logits = logits + lora.scale * (hidden @ a.T @ b.T)
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    logits = logits * head.multiplier
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if case.temperature is not None:
        logits = logits / case.temperature.to(dtype)[:, None]
    logp = logits.log_softmax(-1)
    values = [logp.gather(1, case.targets), logits.logsumexp(-1), -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)]
    given = [upstream.logprobs, upstream.lse, upstream.entropy]
    pairs = [(value, grad.to(dtype)) for value, grad in zip(values, given, strict=True) if grad is not None]
    grads = torch.autograd.grad([value for value, _ in pairs], leaves, [grad for _, grad in pairs])
    found = [value.detach() for value in values]
    entropy = found[2] if upstream.entropy is not None else None
    return Answer(found[0], found[1], entropy, grads[0], *(grads[1:] if lora is not None else (None, None)))


def in_one_sweep(impl: str, case: Case) -> Answer:
    """Run forward and backward chunk by chunk, the gradient known."""
    kernel, idle = choose_both(case.rows, None, impl)
    chunk, found = evaluate(kernel, idle, case.rows, case.upstream)
    return _answer(chunk.logprobs, chunk.lse, chunk.entropy, found)


def afterwards(impl: str, case: Case, memory: Memory, cache_bytes: int) -> Answer:
    """Run the backward later, from what was held."""
    kernel, _ = choose_both(case.rows, None, impl)
    held = HeldLogprobs(kernel, case.rows, memory, cache_bytes)
    found = held.backward(case.upstream)
    return _answer(held.logprobs, held.lse, held.entropy, found)


def ways(impl: str, case: Case) -> dict[str, Answer]:
    """Return the answers of every way there is to run a case."""
    answers = {
        "one sweep": in_one_sweep(impl, case),
        "recompute": afterwards(impl, case, "recompute", 0),
        "cache": afterwards(impl, case, "cache", 2**30),
    }
    if case.lora is None:
        answers["stash"] = afterwards(impl, case, "stash", 0)
    return answers


def _answer(logprobs: torch.Tensor, lse: torch.Tensor, entropy: torch.Tensor | None, found: HeadGradients) -> Answer:
    a, b = found.adapters[0] if found.adapters else (None, None)
    return Answer(logprobs, lse, entropy, found.hidden, a, b)


def hold_to_budget(case: Case, answers: dict[str, Answer]) -> None:
    """Hold each error below twice that of plain float32, plus a few roundings of the largest value."""
    exact, rounded = reference(case, torch.float64), reference(case, torch.float32)
    size = float(case.hidden.double().square().mean().sqrt() * case.head.weight.double().square().mean().sqrt())
    cool = 1.0 if case.temperature is None else float(case.temperature.min())
    atol = 8 * EPSILON * case.hidden.shape[1] * size * max(1.0, case.head.multiplier / cool)
    for way, answer in answers.items():
        for name in NAMES:
            want, plain, got = (getattr(each, name) for each in (exact, rounded, answer))
            if want is None:
                continue
            assert got is not None, f"{way}: {name} is missing"
            assert got.dtype == torch.float32, f"{way}: {name} is {got.dtype}"
            assert got.shape == want.shape, f"{way}: {name} is {list(got.shape)}, not {list(want.shape)}"
            if not want.numel():
                continue
            slack = atol + 4 * EPSILON * float(want.abs().max())
            error, allowed = float((got - want).abs().max()), 2 * float((plain - want).abs().max()) + slack
            assert error <= allowed, f"{way}: {name} is off by {error:.3g}, {allowed:.3g} allowed"


def hold_to_rows(got: torch.Tensor | None, want: torch.Tensor | None, allowed: float, what: str) -> None:
    """Hold each row's relative L2 error below a bound."""
    assert got is not None
    assert want is not None
    error = float(((got - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-30)).max())
    assert error <= allowed, f"{what}: a row is off by {error:.3g}, {allowed:.3g} allowed"


def with_logits(logits: torch.Tensor, targets: torch.Tensor, device: torch.device) -> Case:
    """Return a case whose logits are given: the head is the identity."""
    head = Head(torch.eye(logits.shape[1], dtype=logits.dtype).to(device))
    upstream = Upstream(torch.full(targets.shape, -1.0, device=device))
    return Case(logits.to(device), targets.to(device), head, upstream)


def changed(case: Case, **changes: Any) -> Case:
    """Return a case with other fields."""
    return replace(case, **changes)


def runs(impl: str, case: Case) -> str | None:
    """Return why an implementation refuses a case; None if it runs it."""
    try:
        choose_both(case.rows, None, impl)
    except RefusedError as refusal:
        return str(refusal)
    assert HeadCase(case.rows)
    return None
