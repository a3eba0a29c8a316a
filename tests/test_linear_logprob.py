"""Tests of ``linear_logprob``: values, gradients and what is held, against the plain formula under autograd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from tickwork_kernels import LinearLogprobs, Lora, LoraSegment, head, hold_logprobs, linear_logprob
from tickwork_kernels.head import Head, as_segments

MODES = ("stash", "cache", "recompute")
Leaves = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of a call: ``leaves`` may get gradients, ``spans`` are segments of tokens by number of their adapter."""

    leaves: Leaves
    targets: torch.Tensor
    spans: tuple[tuple[int, int, int | None], ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, leaves: Leaves) -> dict[str, Any]:
        """Return what is given by keyword."""
        lora: Any = None
        if self.spans is not None:
            lora = [
                LoraSegment(start, stop, leaves.get(f"a{number}"), leaves.get(f"b{number}"), 0.5)
                for start, stop, number in self.spans
            ]
        elif "a0" in leaves:
            lora = Lora(leaves["a0"], leaves["b0"], 2.0)
        return {"bias": leaves.get("bias"), "lora": lora, **self.options}

    def run(self, leaves: Leaves | None = None, **options: Any) -> LinearLogprobs:
        """Call the function under test."""
        leaves = leaves or self.leaves
        arguments = {**self.arguments(leaves), **options}
        return linear_logprob(leaves["hidden"], leaves["weight"], self.targets, **arguments)

    def plain(self, leaves: Leaves | None = None) -> LinearLogprobs:
        """Compute the same by the formula, with ``[N, V]`` logits."""
        leaves = leaves or self.leaves
        hidden, weight, arguments = leaves["hidden"], leaves["weight"], self.arguments(leaves)
        parts, end = [], 0
        for each in as_segments(arguments["lora"], len(hidden)):
            part = hidden[each.start : each.stop]
            own = weight if each.a is None else weight + each.scale * each.b @ each.a
            parts += [hidden[end : each.start] @ weight.T, part @ own.T]
            end = each.stop
        logits = torch.cat([*parts, hidden[end:] @ weight.T])
        if arguments["bias"] is not None:
            logits = logits + arguments["bias"]
        logits = logits * arguments.get("multiplier", 1.0)
        if (cap := arguments.get("softcap")) is not None:
            logits = cap * torch.tanh(logits / cap)
        temperature = torch.as_tensor(arguments.get("temperature", 1.0), dtype=logits.dtype)
        logp = (logits / temperature.reshape(-1, 1)).log_softmax(-1)
        wide = self.targets if self.targets.dim() == 2 else self.targets[:, None]
        ignored = wide == arguments.get("ignore_index", -100)
        found = logp.gather(1, wide.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)
        lse = (logits / temperature.reshape(-1, 1)).logsumexp(-1).masked_fill(ignored.all(1), 0.0)
        entropy = -(logp.exp() * logp).sum(-1).masked_fill(ignored.all(1), 0.0)
        return LinearLogprobs(found.view(self.targets.shape), lse, entropy)

    def wanting(self, *names: str) -> Case:
        """Return the case with fresh leaves, of which those named (all, without names) require a gradient."""
        leaves = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        return replace(self, leaves={k: v.requires_grad_(not names or k in names) for k, v in leaves.items()})

    def for_mode(self, memory: str) -> Case:
        """Return the case with all gradients that a mode gives: ``"stash"`` that of hidden, without an adapter."""
        if memory != "stash":
            return self.wanting()
        frozen = {name: leaf for name, leaf in self.leaves.items() if name in ("hidden", "weight", "bias")}
        return replace(self, leaves=frozen, spans=None).wanting("hidden")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def make(
    *, rows: int = 6, vocab: int = 7, dim: int = 4, dtype: torch.dtype = torch.float64, bias: bool = False,
    lora: int = 0, flat: bool = False, targets: torch.Tensor | None = None,
    spans: tuple[tuple[int, int, int | None], ...] | None = None, **options: Any,
) -> Case:  # fmt: skip
    """Return a case of ``lora`` adapters; without ``targets`` there are two of each token, unequal ones mostly."""
    leaves = {"hidden": normal(rows, dim, dtype=dtype), "weight": normal(vocab, dim, seed=1, dtype=dtype)}
    if bias:
        leaves["bias"] = normal(vocab, dtype=dtype)
    for number in range(lora):
        leaves[f"a{number}"] = normal(2 + number, dim, seed=2, dtype=dtype)
        leaves[f"b{number}"] = normal(vocab, 2 + number, seed=3, dtype=dtype)
    if targets is None:
        generator = torch.Generator().manual_seed(rows)
        targets = torch.randint(0, vocab, (rows,) if flat else (rows, 2), generator=generator)
    return Case(leaves, targets, spans, options)


REPEATS = torch.tensor([[1, 1, 1], [0, 6, 0], [2, 3, 3], [4, 4, 5], [6, 6, 6], [0, 1, 2]])
IGNORED = torch.tensor([[1, -100], [-100, -100], [3, 3], [-100, 5], [6, 2], [-100, -100]])
COOL = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0, 1.5], dtype=torch.float64)
SEGMENTS = ((0, 2, 0), (2, 3, None), (4, 5, 1), (5, 5, 1), (5, 6, 0))
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one target": {"flat": True},
    "repeated targets": {"targets": REPEATS},
    "softcap": {"softcap": 1.5},
    "multiplier": {"multiplier": -0.7},
    "temperature": {"temperature": 0.6},
    "temperature of each token": {"temperature": COOL},
    "temperature as a tensor": {"temperature": torch.tensor(2)},
    "bias": {"bias": True},
    "ignored": {"targets": IGNORED, "temperature": COOL},
    "ignored rows": {"targets": torch.tensor([3, -100, 0, -100, -100, 6])},
    "all ignored": {"targets": torch.full((6, 2), -100)},
    "another ignore_index": {"targets": IGNORED.masked_fill(IGNORED < 0, 0), "ignore_index": 0},
    "adapter": {"lora": 1},
    "segments": {"lora": 2, "spans": SEGMENTS, "targets": REPEATS},
    "segments and ignored": {"lora": 2, "spans": SEGMENTS, "targets": IGNORED},
    "no segments": {"spans": ()},
    "all": {
        "lora": 2,
        "spans": SEGMENTS,
        "bias": True,
        "softcap": 2.0,
        "multiplier": 1.3,
        "temperature": COOL,
        "targets": IGNORED,
    },
}


def weighted(found: LinearLogprobs, parts: tuple[str, ...] = ("logprobs", "lse", "entropy")) -> torch.Tensor:
    """Return a sum of some outputs with weights of their own."""
    chosen = [getattr(found, part).double() for part in parts]
    return sum(((each * normal(*each.shape, seed=7)).sum() for each in chosen), torch.zeros(()))


def gradients(case: Case, value: torch.Tensor, **options: Any) -> Leaves:
    """Return the gradients of those that require one."""
    wanted = {name: leaf for name, leaf in case.leaves.items() if leaf.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(value, list(wanted.values()), **options), strict=True))


def assert_as_plain(
    case: Case, rtol: float, parts: tuple[str, ...] = ("logprobs", "lse", "entropy"), **how: Any
) -> None:
    """Hold values, and gradients of some outputs, to those of the plain formula."""
    ours, want = case.run(entropy=True, **how), case.plain()
    for got, value in zip(ours, want, strict=True):
        torch.testing.assert_close(got, value, rtol=rtol, atol=rtol)
    wanted = gradients(case, weighted(want, parts), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(gradients(case, weighted(ours, parts)), wanted, rtol=rtol, atol=4 * rtol)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("feature", FEATURES)
def test_values_and_gradients_are_the_formulas(feature: str, memory: str) -> None:
    """In float64 all outputs and all gradients are those of plain torch, in every mode of memory."""
    case = make(**FEATURES[feature])
    assert_as_plain(case.for_mode(memory), 1e-11, memory=memory)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_differences(feature: str, memory: str) -> None:
    """In float64 all gradients agree with differences of the outputs, for all outputs jointly."""
    case = make(**FEATURES[feature]).for_mode(memory)
    wanted = [name for name, leaf in case.leaves.items() if leaf.requires_grad]

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(case.run({**case.leaves, **dict(zip(wanted, leaves, strict=True))}, entropy=True, memory=memory))

    # What "cache" has held it gives once; a second backward computes it again, and rounds otherwise.
    assert torch.autograd.gradcheck(run, [case.leaves[name] for name in wanted], nondet_tol=1e-12)


@pytest.mark.parametrize("feature", FEATURES)
def test_float32_is_as_plain_torch(feature: str) -> None:
    """In float32 values and gradients are those of plain torch to rounding."""
    assert_as_plain(make(dtype=torch.float32, **FEATURES[feature]).wanting(), 2e-5)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("part", ["logprobs", "lse", "entropy"])
def test_an_output_that_is_not_used_needs_no_upstream(part: str, memory: str) -> None:
    """A loss on one output alone has the gradients of that output alone."""
    case = make(bias=True, lora=1, targets=REPEATS, softcap=2.0)
    assert_as_plain(case.for_mode(memory), 1e-11, (part,), memory=memory)


@pytest.mark.parametrize("memory", MODES)
def test_an_expanded_or_strided_upstream_counts_for_each_token(memory: str) -> None:
    """Upstream gradients without memory of their own, or laid out otherwise, are read right."""
    case = make().wanting("hidden")
    ours, want = case.run(memory=memory, entropy=True), case.plain()
    for reduce in (
        lambda out: out.logprobs.sum() + out.lse.sum() + out.entropy.sum(),
        lambda out: (out.logprobs.T.contiguous() * normal(2, 6)).sum(),
        lambda out: out.logprobs[::2, 1].sum(),
    ):
        got, wanted = (gradients(case, reduce(each), retain_graph=True) for each in (ours, want))
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


HOLDING = [("stash", 0), ("cache", 2**20), ("cache", 2**11), ("cache", 0), ("recompute", 0)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks have eight rows."""
    monkeypatch.setattr(head, "CHUNK_ROWS", (4, 8))


@pytest.mark.parametrize(("memory", "cache_bytes"), HOLDING)
def test_several_chunks_and_a_second_backward(memory: str, cache_bytes: int, small_chunks: None) -> None:
    """Over several chunks, some of them held, a second backward gives what the first gave: the formula's."""
    spans = ((0, 3, 0), (5, 21, 1), (21, 30, None), (30, 43, 0))
    case = make(rows=43, bias=True, lora=2, spans=spans, flat=True, softcap=9.0, entropy=True).for_mode(memory)
    some = torch.arange(43) % 7 > 0
    some[8:16] = False  # a chunk without any upstream
    ours, want = case.run(memory=memory, cache_bytes=cache_bytes), case.plain()
    first, second, wanted = (
        gradients(case, (out.logprobs * some).sum() + out.lse[35] + out.entropy[2:5].sum(), retain_graph=True)
        for out in (ours, ours, want)
    )
    torch.testing.assert_close(first, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wants", ["hidden", "weight", "bias", "a0", "b1"])
@pytest.mark.parametrize("memory", ["auto", "cache", "recompute"])
def test_one_gradient_alone(memory: str, wants: str) -> None:
    """Hidden states or one parameter can be all that requires a gradient; what is frozen still is part of the way."""
    case = make(bias=True, lora=2, spans=SEGMENTS, softcap=3.0).wanting(wants)
    assert_as_plain(case, 1e-11, memory=memory)


def test_the_same_a_with_two_bs() -> None:
    """Adapters that share one of their matrices get the gradient of each matrix, over all their segments."""
    case = make(lora=1).wanting()
    hidden, a, b = (case.leaves[name] for name in ("hidden", "a0", "b0"))
    other = normal(7, 2, seed=9).requires_grad_()
    segments = [LoraSegment(0, 3, a, b, 1.0), LoraSegment(3, 6, a, other, 1.0)]
    ours = linear_logprob(hidden, case.leaves["weight"], case.targets, lora=segments).logprobs
    base = hidden @ case.leaves["weight"].T
    logits = torch.cat([base[:3] + hidden[:3] @ a.T @ b.T, base[3:] + hidden[3:] @ a.T @ other.T])
    leaves = (a, b, other)
    want = torch.autograd.grad(logits.log_softmax(-1).gather(1, case.targets).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), leaves), want)


@pytest.mark.parametrize("memory", MODES)
def test_ignored_rows_have_no_value_and_no_gradient(memory: str) -> None:
    """A row of ignored targets gets exactly 0 everywhere, though an upstream comes in; a single one its logprob."""
    case = make(targets=IGNORED).wanting("hidden")
    found = case.run(memory=memory, entropy=True)
    assert not any(part[[1, 5]].any() for part in found)
    assert found.logprobs[0, 1] == found.logprobs[3, 0] == 0
    assert found.lse[[0, 3]].all()
    grad = gradients(case, found.logprobs.sum() + found.lse.sum() + found.entropy.sum())["hidden"]
    assert not grad[[1, 5]].any()
    assert grad[[0, 2, 3, 4]].any(1).all()


def test_a_detached_entropy_has_a_value_and_no_gradient() -> None:
    """``"detached"`` gives the entropy without a graph, beside logprobs with one; False gives none."""
    case = make().wanting("hidden")
    found = case.run(entropy="detached")
    torch.testing.assert_close(found.entropy, case.plain().entropy.detach())
    assert not found.entropy.requires_grad
    assert found.logprobs.requires_grad and found.lse.requires_grad
    assert case.run().entropy is None
    with pytest.raises(ValueError, match="entropy must be False, True or 'detached', not 'detach'"):
        case.run(entropy="detach")


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("flat", [False, True])
def test_no_tokens_are_an_empty_answer(flat: bool, memory: str) -> None:
    """Without tokens the outputs are empty and the gradients zero, not an error."""
    case = make(rows=0, bias=True, flat=flat).for_mode(memory)
    found = case.run(memory=memory, entropy=True)
    assert found.logprobs.shape == case.targets.shape
    assert found.lse.shape == found.entropy.shape == (0,)
    grads = gradients(case, found.logprobs.sum() + found.lse.sum() + found.entropy.sum())
    assert all(torch.equal(grad, torch.zeros_like(case.leaves[name])) for name, grad in grads.items())


@pytest.mark.parametrize("memory", MODES)
def test_bfloat16_inputs_get_bfloat16_gradients_and_float32_values(memory: str) -> None:
    """Values are float32 and exact for the rounded inputs; each gradient has the dtype of what it is for."""
    wide = make(dtype=torch.bfloat16, bias=True, lora=1, targets=REPEATS, dim=16, vocab=32)
    adapters = {name: wide.leaves[name].float() for name in ("a0", "b0")}
    wide = replace(wide, leaves={**wide.leaves, **adapters}).for_mode(memory)
    exact = replace(wide, leaves={k: v.detach().double() for k, v in wide.leaves.items()})
    exact = exact.for_mode(memory)
    ours, want = wide.run(memory=memory, entropy=True), exact.plain()
    for got, value in zip(ours, want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-5)
    wanted = gradients(exact, weighted(want))
    for name, grad in gradients(wide, weighted(ours)).items():
        assert grad.dtype == wide.leaves[name].dtype
        assert float((grad.double() - wanted[name]).norm() / wanted[name].norm()) <= 2**-7


@pytest.mark.parametrize("memory", MODES)
def test_autocast_changes_nothing(memory: str) -> None:
    """Under autocast, forward and backward, the values and gradients are those without, in every bit."""
    case = make(dtype=torch.float32).wanting("hidden")
    without = case.run(memory=memory, entropy=True)
    want = gradients(case, weighted(without))["hidden"]
    with torch.autocast("cpu", torch.bfloat16):
        within = case.run(memory=memory, entropy=True)
        got = torch.autograd.grad(within, case.leaves["hidden"], [normal(*x.shape, seed=7).float() for x in within])[0]
    assert all(torch.equal(one, other) for one, other in zip(without, within, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", MODES)
def test_inputs_are_only_read(memory: str) -> None:
    """No argument and no upstream is written to, and no ``.grad`` but autograd's."""
    case = make(bias=True, lora=1, targets=IGNORED, temperature=COOL.clone(), softcap=2.0)
    case = case.for_mode(memory)
    upstream = [normal(6, 2), normal(6), normal(6)]
    tensors = [*case.leaves.values(), case.targets, case.options["temperature"], *upstream]
    before = [tensor.detach().clone() for tensor in tensors]
    torch.autograd.grad(case.run(memory=memory, entropy=True), case.leaves["hidden"], upstream)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    assert all(leaf.grad is None for leaf in case.leaves.values())


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("name", ["weight", "targets"])
def test_an_input_changed_between_the_passes_is_an_error(name: str, memory: str) -> None:
    """The backward reads its inputs again, so that a change in between is not silent."""
    case = make().wanting("hidden")
    out = case.run(memory=memory).logprobs.sum()
    {**case.leaves, "targets": case.targets}[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_second_derivatives_are_refused() -> None:
    """A gradient that is to be differentiated again is refused by name, not returned without that part."""
    case = make().wanting("hidden")
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(case.run().logprobs.sum(), case.leaves["hidden"], create_graph=True)


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_graph(region: Any) -> None:
    """Under ``no_grad``, or where nothing requires a gradient, the values are the same and need none."""
    case = make(bias=True, lora=1).wanting()
    with region():
        found = case.run(entropy=True)
    torch.testing.assert_close(tuple(found), tuple(part.detach() for part in case.plain()))
    assert not any(part.requires_grad for part in found)
    assert not any(part.requires_grad for part in case.wanting("none of them").run(entropy=True))


def test_auto_holds_rows_where_the_head_is_frozen_and_chunks_where_not(small_chunks: None) -> None:
    """``"auto"`` is ``"stash"`` for a frozen head, else ``"cache"``; each holds what it says, and no more."""
    rows, vocab, dim = 20, 7, 4

    def held(case: Case, **options: Any) -> tuple[int, list[int]]:
        keeper = case.run(**options).lse.grad_fn.held
        stashed = [*keeper._mean, *keeper._spread]
        assert all(part.shape[1] == dim for part in stashed)
        return sum(map(len, stashed)), sorted(keeper._kept)

    case = make(rows=rows, vocab=vocab, dim=dim, flat=True, dtype=torch.float32)
    frozen, trained = case.wanting("hidden"), case.wanting("hidden", "weight")
    whole = rows * vocab * 4
    assert held(frozen, impl="torch") == (rows, [])
    assert held(frozen, impl="torch", entropy=True) == (2 * rows, [])
    assert held(frozen, impl="torch", entropy="detached") == (rows, [])
    assert held(trained) == held(trained, memory="cache") == (0, [0, 8, 16])
    assert held(trained, cache_bytes=whole) == (0, [0, 8, 16])
    assert held(trained, cache_bytes=whole - 1) == (0, [0, 8])
    assert held(trained, cache_bytes=0) == held(trained, memory="recompute") == (0, [])
    without = hold_logprobs(case.leaves["hidden"], case.targets[:, None], Head(case.leaves["weight"]))
    assert (without._kept, without._mean, without._spread) == ({}, [], [])
