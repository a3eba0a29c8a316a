"""Tests of the fused head: logprobs and gradients against a float64 oracle under plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from tickwork_kernels import Head, HeadGradients, Lora, TargetLogprobs, head_logits, linear_token_loss

EPSILON = 2.0**-24


@dataclass(frozen=True)
class Case:
    """Inputs of one call, and the upstream gradient of its logprobs."""

    hidden: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor
    head: Head
    lora: Lora | None = None


@dataclass(frozen=True)
class Answer:
    """Logprobs and gradients; ``a`` and ``b`` are None without an adapter."""

    logp: torch.Tensor
    hidden: torch.Tensor
    a: torch.Tensor | None
    b: torch.Tensor | None


def make(
    rows: int = 37,
    width: int = 3,
    *,
    vocab: int = 101,
    dim: int = 20,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    softcap: float | None = None,
    multiplier: float = 1.0,
    rank: int = 0,
    seed: int = 0,
) -> Case:
    """Return random inputs with logits as far apart as a trained model's; each row targets the last token too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    head = Head(
        weight=normal(vocab, dim, scale=3 * dim**-0.5).to(dtype),
        bias=normal(vocab).to(dtype) if bias else None,
        softcap=softcap,
        multiplier=multiplier,
    )
    lora = Lora(normal(rank, dim, scale=dim**-0.5), normal(vocab, rank, scale=0.3), 32 / rank) if rank else None
    targets = torch.randint(0, vocab, (rows, width), generator=generator)
    targets[:, 0] = vocab - 1
    return Case(normal(rows, dim).to(dtype), targets, normal(rows, width), head, lora)


def reference(case: Case, dtype: torch.dtype) -> Answer:
    """Compute everything by the plain formula and autograd, from the same rounded inputs."""
    head, lora = case.head, case.lora
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
    logp = logits.log_softmax(-1).gather(1, case.targets)
    grads = torch.autograd.grad(logp, leaves, case.upstream.to(dtype))
    return Answer(logp.detach(), grads[0], *(grads[1:] if lora is not None else (None, None)))


def in_one_sweep(case: Case) -> Answer:
    """Run ``linear_token_loss``."""
    logp, found = linear_token_loss(
        case.hidden, case.targets, case.head, case.lora, lambda logp, start, stop: case.upstream[start:stop]
    )
    return Answer(logp, found.hidden, found.a, found.b)


def afterwards(keep_bytes: int) -> Callable[[Case], Answer]:
    """Return a run of ``TargetLogprobs`` that may keep so much."""

    def run(case: Case) -> Answer:
        held = TargetLogprobs(case.hidden, case.targets, case.head, case.lora, keep_bytes)
        found: HeadGradients = held.backward(case.upstream)
        return Answer(held.logprobs, found.hidden, found.a, found.b)

    return run


WAYS = {"one sweep": in_one_sweep, "recomputed": afterwards(0), "kept": afterwards(2**30)}


def assert_in_budget(case: Case, ours: Answer) -> None:
    """Hold our error below twice that of plain float32, plus a few roundings of the largest value."""
    exact, rounded = reference(case, torch.float64), reference(case, torch.float32)
    size = float(case.hidden.double().square().mean().sqrt() * case.head.weight.double().square().mean().sqrt())
    logp_atol = 8 * EPSILON * case.hidden.shape[1] * size * case.head.multiplier
    for name in ("logp", "hidden", "a", "b"):
        want, plain, got = (getattr(answer, name) for answer in (exact, rounded, ours))
        if want is None:
            assert got is None
            continue
        assert got.dtype == torch.float32
        assert got.shape == want.shape
        atol = logp_atol if name == "logp" else 4 * EPSILON * float(want.abs().max())
        error, allowed = float((got - want).abs().max()), 2 * float((plain - want).abs().max()) + atol
        assert error <= allowed, f"{name}: off by {error:.3g}, {allowed:.3g} allowed"


FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "multiplier": {"multiplier": 0.3},
    "adapter": {"rank": 4},
    "adapter of rank 1": {"rank": 1},
    "all": {"bias": True, "softcap": 6.0, "multiplier": 1.7, "rank": 8},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("feature", FEATURES)
def test_logprobs_and_gradients_stay_in_the_error_budget(feature: str, way: str) -> None:
    """Every feature's logprobs and gradients are as exact as twice plain float32's."""
    case = make(**FEATURES[feature])
    assert_in_budget(case, WAYS[way](case))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "width", "vocab", "dim"), [(1, 1, 2, 1), (1, 5, 7, 3), (63, 1, 257, 17)])
def test_awkward_sizes_stay_in_the_error_budget(way: str, rows: int, width: int, vocab: int, dim: int) -> None:
    """One row, one dimension, more targets than tokens in the vocabulary: all are ordinary cases."""
    case = make(rows, width, vocab=vocab, dim=dim, rank=2)
    assert_in_budget(case, WAYS[way](case))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("chunks_kept", [None, 0, 1, 9])
def test_rows_over_several_chunks_equal_the_oracle(chunks_kept: int | None, rank: int) -> None:
    """However many chunks the rows take and however many are kept, the sums are the oracle's."""
    chunk = make().head.chunk_rows
    case = make(2 * chunk + 3, 2, dim=8, rank=rank)
    way = in_one_sweep if chunks_kept is None else afterwards(chunks_kept * chunk * 101 * 4)
    assert_in_budget(case, way(case))


@pytest.mark.parametrize("kept", [0, 2**30])
def test_backward_equals_the_one_sweep(kept: int) -> None:
    """The same upstream gives the same gradients whether it is known at once or later."""
    case = make(50, 2, bias=True, softcap=5.0, rank=4)
    one, later = in_one_sweep(case), afterwards(kept)(case)
    for name in ("logp", "hidden", "a", "b"):
        torch.testing.assert_close(getattr(later, name), getattr(one, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_repeated_targets_add_up(way: str) -> None:
    """A token that stands several times in one row receives the sum of its upstream gradients."""
    case = make(24, 4, rank=2)
    targets = case.targets[:, :1].expand(-1, 4).contiguous()
    targets[::2, 3] = 5
    case = replace(case, targets=targets)
    assert_in_budget(case, WAYS[way](case))


@pytest.mark.parametrize("way", WAYS)
def test_rows_without_upstream_have_no_gradient(way: str) -> None:
    """A row whose upstream is zero gets exactly zero and leaves the other rows as they are."""
    case = make(40, 2, rank=3)
    case.upstream[::3] = 0
    case.upstream[1, 0] = 0
    answer = WAYS[way](case)
    assert not answer.hidden[::3].any()
    assert answer.hidden[1].any()
    assert_in_budget(case, answer)


@pytest.mark.parametrize("way", WAYS)
def test_no_upstream_at_all_gives_zeros(way: str) -> None:
    """Where nothing has an upstream all gradients are exactly zero, and the logprobs are there."""
    case = make(9, 2, rank=3)
    case.upstream.zero_()
    answer = WAYS[way](case)
    assert not any(bool(tensor.any()) for tensor in (answer.hidden, answer.a, answer.b))
    assert_in_budget(case, answer)


@pytest.mark.parametrize("way", WAYS)
def test_strided_upstream_is_read_right(way: str) -> None:
    """An expanded upstream, which has no memory of its own for each row, counts for each row."""
    case = make(11, 2)
    case = replace(case, upstream=case.upstream[:1].expand(11, 2))
    assert_in_budget(case, WAYS[way](case))


@pytest.mark.parametrize("way", WAYS)
def test_no_rows_give_empty_answers(way: str) -> None:
    """No rows are an empty answer with zero gradients of the adapter, not an error."""
    case = make(0, 3, rank=2)
    answer = WAYS[way](case)
    assert answer.logp.shape == (0, 3)
    assert answer.hidden.shape == (0, 20)
    assert torch.equal(answer.a, torch.zeros(2, 20))
    assert torch.equal(answer.b, torch.zeros(101, 2))


def with_logits(logits: torch.Tensor, targets: torch.Tensor, **features: object) -> Case:
    """Return a case whose logits are given: the head is the identity."""
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    return Case(logits, targets, torch.full(targets.shape, -1.0), Head(eye, **features))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rest", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_confident_tokens_keep_their_gradient(way: str, rest: float) -> None:
    """A token of probability 1 - rest keeps the small gradient that plain float32 gives it."""
    vocab = 64
    logits = torch.zeros(6, vocab)
    targets = torch.tensor([[0], [7], [63], [20], [21], [22]])
    peak = torch.logit(torch.tensor(1 - rest, dtype=torch.float64)) + torch.log(torch.tensor(vocab - 1.0))
    logits.scatter_(1, targets, float(peak))
    case = with_logits(logits, targets)
    answer = WAYS[way](case)
    exact = reference(case, torch.float64)
    assert exact.logp[0, 0].exp() == pytest.approx(1 - rest, abs=rest * 1e-2)
    assert_in_budget(case, answer)
    wanted = exact.hidden.gather(1, targets)
    assert float((answer.hidden.gather(1, targets) - wanted).abs().max()) <= 2 * EPSILON


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", [-1e30, -1e4, -100.0, 100.0, 1e4, 1e30])
def test_far_away_logits_stay_finite(way: str, level: float) -> None:
    """Where all logits lie far below or above zero the result is finite and exact: a softmax has no origin."""
    logits = torch.full((4, 32), level)
    logits[1, 3] = level * (1 + 2**-20)
    logits[2, :2] = level * (1 + 2**-18)  # two equal extremes
    case = with_logits(logits, torch.tensor([[0], [3], [1], [31]]))
    answer = WAYS[way](case)
    assert torch.isfinite(answer.logp[0]).all()
    assert torch.isfinite(answer.hidden).all()
    assert answer.logp[0, 0] == pytest.approx(-math.log(32), abs=1e-6)
    exact = reference(case, torch.float64)
    torch.testing.assert_close(answer.logp.double(), exact.logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(answer.hidden.double(), exact.hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_hopeless_targets_stay_finite(way: str) -> None:
    """A target a thousand nats below the best token has its logprob, and the gradient that lifts it."""
    logits = torch.zeros(2, 16)
    logits[:, 4] = 1000.0
    case = with_logits(logits, torch.tensor([[0], [4]]))
    answer = WAYS[way](case)
    assert answer.logp[:, 0].tolist() == [-1000.0, 0.0]
    assert answer.hidden[0, 0] == -1.0
    assert answer.hidden[0, 4] == 1.0
    assert not answer.hidden[1].any()


def assert_rows_close(got: torch.Tensor, want: torch.Tensor, allowed: float) -> None:
    """Hold each row's relative L2 error below a bound."""
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.max()) <= allowed, f"a row is off by {float(error.max()):.3g}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", [{}, {"rank": 4}, {"bias": True, "softcap": 6.0, "multiplier": 1.7, "rank": 4}])
def test_bfloat16_weights_accumulate_in_float32(way: str, features: dict[str, object]) -> None:
    """With a bfloat16 head logprobs are float32-exact for the rounded weights; d hidden is exact to bfloat16."""
    case = make(33, 3, dtype=torch.bfloat16, **features)
    answer, exact, rounded = WAYS[way](case), reference(case, torch.float64), reference(case, torch.float32)
    allowed = 2 * float((rounded.logp - exact.logp).abs().max()) + 1e-6
    assert float((answer.logp - exact.logp).abs().max()) <= allowed
    assert_rows_close(answer.hidden, exact.hidden, 2**-8)
    if exact.a is not None:
        assert_rows_close(answer.a, exact.a, 1e-5)
        assert_rows_close(answer.b, exact.b, 1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rest", [1e-1, 1e-3, 1e-5])
def test_confident_tokens_survive_bfloat16_weights(way: str, rest: float) -> None:
    """Rounding to bfloat16 does not blur a confident token: each row is as exact as bfloat16 allows."""
    case = make(16, 1, vocab=64, dim=16, dtype=torch.bfloat16)
    wide = case.head.weight.float()
    aim = torch.log(torch.tensor((1 - rest) / rest)) + 5
    hidden = wide[case.targets[:, 0]]
    hidden = (hidden / hidden.square().sum(1, keepdim=True) * aim).to(torch.bfloat16)
    case = replace(case, hidden=hidden, upstream=-torch.ones(16, 1))
    exact = reference(case, torch.float64)
    assert float(exact.logp.exp().min()) > 0.5
    assert_rows_close(WAYS[way](case).hidden, exact.hidden, max(2**-8, 4 * EPSILON / float(-exact.logp.max().expm1())))


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_finite_differences(feature: str) -> None:
    """Along random directions the gradients equal the float64 slope of the formula, without any autograd."""
    case = make(**FEATURES[feature])
    answer = in_one_sweep(case)
    generator = torch.Generator().manual_seed(9)

    def value(hidden: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> float:
        head = case.head
        logits = hidden @ head.weight.double().T
        if a is not None and b is not None and case.lora is not None:
            logits = logits + case.lora.scale * (hidden @ a.T @ b.T)
        logits = (logits + (0 if head.bias is None else head.bias.double())) * head.multiplier
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        logp = logits.gather(1, case.targets) - logits.logsumexp(1, keepdim=True)
        return float((case.upstream.double() * logp).sum())

    start = [case.hidden.double(), *((case.lora.a.double(), case.lora.b.double()) if case.lora else (None, None))]
    for place, grad in enumerate((answer.hidden, answer.a, answer.b)):
        if grad is None:
            continue
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1e-5, -1e-5):
            moved = list(start)
            moved[place] = start[place] + sign * direction
            ends.append(value(*moved))
        slope = (ends[0] - ends[1]) / 2e-5
        scale = float(grad.double().norm() * direction.norm()) / grad.numel() ** 0.5
        assert float((grad.double() * direction).sum()) == pytest.approx(slope, abs=1e-5 * scale)


def test_the_loss_sees_each_chunk_once_with_its_place() -> None:
    """The gradient callable is called once for each chunk, in order, with the logprobs that are returned."""
    chunk = make().head.chunk_rows
    case = make(2 * chunk + 1, 1, dim=4)
    seen: list[tuple[int, int, torch.Tensor]] = []

    def gradient(logp: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        seen.append((start, stop, logp.clone()))
        return case.upstream[start:stop]

    logp, _ = linear_token_loss(case.hidden, case.targets, case.head, None, gradient)
    assert [stop for _, stop, _ in seen][-1] == len(case.hidden)
    assert [start for start, _, _ in seen] == [0, *[stop for _, stop, _ in seen][:-1]]
    assert torch.equal(torch.cat([part for _, _, part in seen]), logp)


def test_head_logits_give_the_same_logprobs() -> None:
    """The logits used for sampling and the fused logprobs are the same distribution."""
    case = make(13, 2, bias=True, softcap=3.0, multiplier=0.7, rank=2)
    logits = head_logits(case.hidden, case.head, case.lora)
    assert logits.dtype == torch.float32
    want = logits.log_softmax(-1).gather(1, case.targets)
    torch.testing.assert_close(in_one_sweep(case).logp, want, rtol=0, atol=1e-6)


def test_inputs_are_left_as_they_were() -> None:
    """Hidden states, targets, weights, adapter and upstream are read, never written."""
    case = make(20, 2, bias=True, softcap=3.0, rank=2)
    tensors = [case.hidden, case.targets, case.upstream, case.head.weight, case.head.bias, case.lora.a, case.lora.b]
    before = [tensor.clone() for tensor in tensors]
    for way in WAYS.values():
        way(case)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
