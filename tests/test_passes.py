"""Tests of forward and backward passes on a device: gradients of whole models, splitting, failing, neighbours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from models import VOCAB, Bench, Oracle, data_of, datum, numbers, off, step, train
from planning import plan
from tickwork.compute.model import BaseModel
from tickwork.errors import CapacityError, InvalidRequestError, LossError
from tickwork.requests import OptimStep
from tickwork.types import AdamParams, Datum, TensorData
from tickwork_kernels import TokenLoss, register_token_loss
from tickwork_kernels.token_losses import unregister_token_loss

# Relative L2 distance of each tensor's gradient: float32 through two layers, summed in another order (measured: 1e-6).
ROUNDING = 1e-5
LENGTHS = (9, 4, 13, 1, 6)

Live = list[torch.Tensor]


@pytest.fixture
def bench() -> Bench:
    """A device with the models ``a`` and ``b`` on one base."""
    made = Bench()
    made.create("a", rank=4, seed=1)
    made.create("b", rank=2, seed=2)
    return made


def rl_data(lengths: Sequence[int], bench: Bench, seed: int = 0) -> list[Datum]:
    """Return RL datums whose sampler logprobs lie around the model's own, so that some tokens clip."""
    random = numbers(seed)
    plain = data_of(lengths, seed)
    own = bench.one(train("a", plain, backward=False)).loss_fn_outputs
    return [
        datum(
            np.array(d.model_input.to_ints()),
            d.loss_fn_inputs["target_tokens"].to_numpy(),
            logprobs=(out["logprobs"].to_numpy() + random.normal(scale=0.4, size=n)).astype(np.float32),
            advantages=random.normal(size=n).astype(np.float32),
        )
        for d, out, n in zip(plain, own, lengths, strict=True)
    ]


def value(d: Datum, key: str) -> torch.Tensor:
    """Return a loss input as a tensor."""
    return d.loss_fn_inputs[key].to_torch()


def clip_ratio(lp: torch.Tensor, d: Datum, low: float, high: float) -> torch.Tensor:
    """Return the clamped importance ratio."""
    return (lp - value(d, "logprobs")).exp().clamp(low, high)


FORMULAS: dict[str, Callable[[torch.Tensor, Datum], torch.Tensor]] = {
    "cross_entropy": lambda lp, d: -(value(d, "weights") * lp).sum(),
    "importance_sampling": lambda lp, d: -((lp - value(d, "logprobs")).exp() * value(d, "advantages")).sum(),
    "ppo": lambda lp, d: (
        -torch.minimum(
            (lp - value(d, "logprobs")).exp() * value(d, "advantages"),
            clip_ratio(lp, d, 0.8, 1.2) * value(d, "advantages"),
        ).sum()
    ),
    "cispo": lambda lp, d: -(clip_ratio(lp, d, 0.0, 4.0).detach() * lp * value(d, "advantages")).sum(),
    "dro": lambda lp, d: -(lp * value(d, "advantages") - 0.025 * (lp - value(d, "logprobs")) ** 2).sum(),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_built_in_losses_give_the_whole_models_gradient(bench: Bench, name: str) -> None:
    """Loss, logprobs and gradient of a built-in loss are plain autograd's of the whole model."""
    data = data_of(LENGTHS) if name == "cross_entropy" else rl_data(LENGTHS, bench)
    oracle = Oracle("llama", bench.model("a").state.adapter)
    live = oracle.of(data)
    loss = sum(FORMULAS[name](lp, d) for lp, d in zip(live, data, strict=True))
    answer = bench.one(train("a", data, name))
    assert off(bench.gradient("a"), oracle.gradients(loss)) <= ROUNDING
    assert answer.metrics == {"loss:sum": pytest.approx(float(loss.detach()), rel=1e-5), "clock_cycle:unique": 7.0}
    for out, lp in zip(answer.loss_fn_outputs, live, strict=True):
        assert set(out) == {"logprobs"}
        assert out["logprobs"].dtype == "float32"
        torch.testing.assert_close(out["logprobs"].to_torch(), lp.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2", "phi3"])
def test_other_architectures_train_as_well(kind: str) -> None:
    """Tied heads, softcaps, Conv1D and fused projections give plain autograd's gradient through a device."""
    bench, data = Bench(), data_of(LENGTHS)
    oracle = Oracle(kind, bench.create("m", kind).state.adapter)
    bench.one(train("m", data))
    loss = sum(FORMULAS["cross_entropy"](lp, d) for lp, d in zip(oracle.of(data), data, strict=True))
    assert off(bench.gradient("m"), oracle.gradients(loss)) <= ROUNDING


@pytest.mark.parametrize("off_parts", [("train_unembed",), ("train_attn", "train_mlp"), ("train_mlp", "train_unembed")])
def test_partly_adapted_models_train(off_parts: tuple[str, ...]) -> None:
    """With only the head or only parts of the body adapted the gradient is still plain autograd's."""
    bench, data = Bench(), data_of(LENGTHS)
    oracle = Oracle("llama", bench.create("m", **dict.fromkeys(off_parts, False)).state.adapter)
    bench.one(train("m", data))
    loss = sum(FORMULAS["cross_entropy"](lp, d) for lp, d in zip(oracle.of(data), data, strict=True))
    assert off(bench.gradient("m"), oracle.gradients(loss)) <= ROUNDING


def reinforce(data: Sequence[Datum], logprobs: Live) -> tuple[torch.Tensor, dict[str, float]]:
    """REINFORCE with the weights as advantages."""
    loss = -sum((lp * value(d, "weights")).sum() for lp, d in zip(logprobs, data, strict=True))
    return loss, {"tokens:sum": float(sum(lp.numel() for lp in logprobs))}


def dpo(data: Sequence[Datum], logprobs: Live) -> tuple[torch.Tensor, dict[str, Any]]:
    """DPO over pairs of datums, which couples all tokens of a pair."""
    score = torch.stack([(lp - value(d, "weights")).sum() for lp, d in zip(logprobs, data, strict=True)])
    margin = 0.1 * (score[::2] - score[1::2])
    return -logsigmoid(margin).sum(), {"margin:mean": margin.mean()}


CUSTOM = {"reinforce": reinforce, "dpo": dpo}
PAIRS = (9, 4, 13, 1, 6, 8)


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.parametrize("max_tokens", [4096, 10])
def test_custom_losses_give_the_whole_models_gradient(bench: Bench, name: str, max_tokens: int) -> None:
    """A callable's gradient is plain autograd's through loss and model, in one pass or spread over several."""
    data, loss_fn = data_of(PAIRS), CUSTOM[name]
    oracle = Oracle("llama", bench.model("a").state.adapter)
    loss, metrics = loss_fn(data, oracle.of(data))
    answer = bench.one(train("a", data, loss_fn), max_tokens=max_tokens)
    assert off(bench.gradient("a"), oracle.gradients(loss)) <= ROUNDING
    assert answer.metrics == {
        "loss:sum": pytest.approx(float(loss.detach()), rel=1e-5),
        "clock_cycle:unique": 7.0,
        **{key: pytest.approx(float(torch.as_tensor(number).detach()), rel=1e-4) for key, number in metrics.items()},
    }


@pytest.mark.parametrize("name", CUSTOM)
def test_one_pass_and_probe_and_apply_agree(bench: Bench, name: str) -> None:
    """A custom loss too large for one pass is called once, with all logprobs, and gives the same result."""
    data, calls = data_of(PAIRS), []

    def loss_fn(given: Sequence[Datum], logprobs: Live) -> tuple[torch.Tensor, dict[str, Any]]:
        calls.append(([id(d) for d in given], [lp.detach().clone() for lp in logprobs]))
        return CUSTOM[name](given, logprobs)

    request = train("a", data, loss_fn)
    phases = [piece.phase for stage in plan([request], 10) for item in stage.passes for piece in item.pieces]
    assert phases == sorted(phases, reverse=True)
    assert phases.count("probe") == phases.count("apply") > 1
    one = bench.one(train("a", data, loss_fn))
    whole = bench.gradient("a")
    bench.model("a").state.grad.zero_()
    several = bench.one(request, max_tokens=10)
    assert off(bench.gradient("a"), whole) <= 5e-6
    assert len(calls) == 2
    assert calls[0][0] == calls[1][0] == [id(d) for d in data]
    for first, second, out in zip(calls[0][1], calls[1][1], several.loss_fn_outputs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
        assert torch.equal(second, out["logprobs"].to_torch())
    assert several.metrics == pytest.approx(one.metrics, rel=1e-5)


def test_a_custom_loss_sees_live_logprobs_of_its_targets_shape(bench: Bench) -> None:
    """A callable gets float32 leaves that require gradients, shaped as the targets, and the caller's own datums."""
    data = [*data_of((5,)), *data_of((4,), width=3)]
    seen: list[tuple[tuple[int, ...], torch.dtype, bool]] = []

    def loss_fn(given: Sequence[Datum], logprobs: Live) -> tuple[torch.Tensor, dict[str, float]]:
        assert given[0] is data[0]
        seen.extend((tuple(lp.shape), lp.dtype, lp.requires_grad) for lp in logprobs)
        return logprobs[1].sum(), {}

    bench.one(train("a", data, loss_fn))
    assert seen == [((5,), torch.float32, True), ((4, 3), torch.float32, True)]


def test_a_custom_forward_has_no_gradient(bench: Bench) -> None:
    """``forward`` with a callable computes loss and metrics, and adds no gradient."""
    data = data_of(PAIRS)
    for max_tokens in (4096, 10):
        answer = bench.one(train("a", data, dpo, backward=False), max_tokens=max_tokens)
        assert answer.metrics["loss:sum"] > 0
        assert not bench.model("a").state.grad.any()
        assert bench.model("a").state.requests == 0


def raising(data: Sequence[Datum], logprobs: Live) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss with a mistake in it."""
    return logprobs[len(data)].sum(), {}


def leaving(*_: object) -> Any:
    """End the thread, as a script would end itself."""
    sys.exit(1)


class Leaving:
    """A metric that is no number."""

    __float__ = leaving


def hooked(data: Sequence[Datum], logprobs: Live) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss whose backward ends the thread."""
    logprobs[0].register_hook(leaving)
    return logprobs[0].sum(), {}


def shrinking(data: Sequence[Datum], logprobs: Live) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that takes a part of the logprobs away."""
    logprobs[0].data = logprobs[0].data[:2]
    return logprobs[0].sum() + logprobs[1].sum(), {}


BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raising, "IndexError"),
    "not a pair": (lambda data, lp: lp[0].sum(), "must return"),
    "not a scalar": (lambda data, lp: (lp[0], {}), "scalar"),
    "not a tensor": (lambda data, lp: (1.0, {}), "scalar"),
    "detached": (lambda data, lp: (lp[0].detach().sum(), {}), "detached"),
    "infinite gradient": (lambda data, lp: ((lp[0] - lp[0].detach()).abs().sqrt().sum(), {}), "not finite"),
    "metrics": (lambda data, lp: (lp[0].sum(), {"x": "much"}), "numbers"),
    "exits": (leaving, "SystemExit"),
    "exits in its backward": (hooked, "could not be differentiated"),
    "exits in a metric": (lambda data, lp: (lp[0].sum(), {"x": Leaving()}), "numbers"),
    "changes a shape": (shrinking, "changed the shape of the logprobs of data[0]"),
    "changes in place": (lambda data, lp: (lp[0].mul_(2).sum(), {}), "in-place"),
}


@pytest.mark.parametrize("max_tokens", [4096, 10])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_custom_loss_harms_nobody(bench: Bench, case: str, max_tokens: int) -> None:
    """A callable that fails adds nothing to its model's gradient, and its neighbour in the pass is as if alone."""
    loss_fn, words = BROKEN[case]
    first, mine, theirs = data_of((3, 5), 1), data_of((8, 2, 7), 2), data_of((6, 4), 3)
    bench.run(train("a", first))
    before = bench.model("a").state.grad.clone()
    bench.one(train("b", theirs))
    alone = bench.gradient("b")
    bench.model("b").state.grad.zero_()
    requests = [train("a", mine, loss_fn), train("b", theirs)]
    if max_tokens == 4096:
        assert len(plan(requests, max_tokens)) == 1
    failed, fine = bench.run(*requests, max_tokens=max_tokens)
    assert isinstance(failed.error, LossError)
    assert words in str(failed.error)
    assert fine.error is None
    assert torch.equal(bench.model("a").state.grad, before)
    assert bench.model("a").state.requests == 1
    assert off(bench.gradient("b"), alone) <= 2e-6


def test_a_gradient_that_overflows_is_the_requests_error(bench: Bench) -> None:
    """An importance ratio beyond float32 fails its request by name and leaves the gradient as it was."""
    bench.one(train("a", data_of((4,))))
    before = bench.model("a").state.grad.clone()
    data = rl_data((3, 3), bench)
    bad = datum(
        np.array(data[1].model_input.to_ints()),
        data[1].loss_fn_inputs["target_tokens"].to_numpy(),
        logprobs=np.full(3, -500, np.float32),
        advantages=np.ones(3, np.float32),
    )
    with pytest.raises(LossError, match="not finite"):
        bench.one(train("a", [data[0], bad], "importance_sampling"), max_tokens=3)
    assert torch.equal(bench.model("a").state.grad, before)
    bench.one(train("a", [data[0], bad], "ppo"))  # clips it


def test_losses_are_sums(bench: Bench) -> None:
    """The same datum twice doubles loss and gradient: nothing is averaged."""
    data = data_of((7,))
    one = bench.one(train("a", data))
    single = bench.gradient("a")
    two = bench.one(train("a", data * 2))
    both = bench.gradient("a")
    assert off(both, {name: 3 * grad for name, grad in single.items()}) <= 2e-6
    assert two.metrics["loss:sum"] == pytest.approx(2 * one.metrics["loss:sum"], rel=1e-6)


def test_lanes_in_one_pass_equal_each_alone(bench: Bench) -> None:
    """Requests of two models in one pass give each model the gradient it has alone."""
    mine, theirs = data_of(LENGTHS, 1), data_of((2, 11, 5), 2)
    alone = []
    for lane, data in (("a", mine), ("b", theirs)):
        bench.one(train(lane, data))
        alone.append(bench.gradient(lane))
        bench.model(lane).state.grad.zero_()
    requests = [train("a", mine), train("b", theirs)]
    assert len(plan(requests, 4096)) == 1
    bench.run(*requests)
    assert off(bench.gradient("a"), alone[0]) <= 2e-6
    assert off(bench.gradient("b"), alone[1]) <= 2e-6


def test_narrow_and_wide_targets_mix(bench: Bench) -> None:
    """Targets ``[N]`` and ``[N, K]`` of several widths in one request give plain autograd's gradient, each in shape."""
    data = [*data_of((5, 3), 1), *data_of((4,), 2, width=3), *data_of((6,), 3, width=2), *data_of((2,), 4, width=1)]
    oracle = Oracle("llama", bench.model("a").state.adapter)
    live = oracle.of(data)
    loss = sum(FORMULAS["cross_entropy"](lp, d) for lp, d in zip(live, data, strict=True))
    answer = bench.one(train("a", data))
    assert off(bench.gradient("a"), oracle.gradients(loss)) <= ROUNDING
    assert answer.metrics["loss:sum"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for out, lp in zip(answer.loss_fn_outputs, live, strict=True):
        torch.testing.assert_close(out["logprobs"].to_torch(), lp.detach(), rtol=0, atol=2e-5)


def test_sparse_targets_are_the_dense_ones(bench: Bench) -> None:
    """Targets and weights in compressed rows mean token 0 and weight 0 where nothing is listed."""
    tokens = np.array([5, 6, 7])
    rows, columns = [0, 2, 2, 3], [0, 2, 1]
    sparse = datum(
        tokens,
        TensorData([11, 12, 13], "int64", (3, 3), rows, columns),
        weights=TensorData([1.0, -2.0, 0.5], "float32", (3, 3), rows, columns),
    )
    dense = datum(
        tokens,
        np.array([[11, 0, 12], [0, 0, 0], [0, 13, 0]]),
        weights=np.array([[1, 0, -2], [0, 0, 0], [0, 0.5, 0]], dtype=np.float32),
    )
    answers, gradients = [], []
    for each in (sparse, dense):
        answers.append(bench.one(train("a", [each])))
        gradients.append(bench.model("a").state.grad.clone())
        bench.model("a").state.grad.zero_()
    outputs = [answer.loss_fn_outputs[0]["logprobs"].to_numpy() for answer in answers]
    assert outputs[0].shape == (3, 3)
    assert np.array_equal(*outputs)
    assert answers[0].metrics == answers[1].metrics
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_forward_equals_forward_backward_and_adds_nothing(bench: Bench) -> None:
    """``forward`` has the outputs and metrics of ``forward_backward`` and no gradient."""
    data = data_of(LENGTHS)
    forward = bench.one(train("a", data, backward=False))
    assert not bench.model("a").state.grad.any()
    assert bench.model("a").state.requests == 0
    backward = bench.one(train("a", data))
    assert bench.model("a").state.requests == 1
    assert forward.metrics == pytest.approx(backward.metrics, rel=1e-6)
    for one, two in zip(forward.loss_fn_outputs, backward.loss_fn_outputs, strict=True):
        torch.testing.assert_close(one["logprobs"].to_torch(), two["logprobs"].to_torch(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 10, 20])
def test_splitting_a_request_changes_nothing(bench: Bench, max_tokens: int) -> None:
    """A request spread over several passes has the loss, logprobs and gradient of one pass."""
    data = data_of(LENGTHS)
    whole = bench.one(train("a", data))
    want = bench.gradient("a")
    bench.model("a").state.grad.zero_()
    split = bench.one(train("a", data), max_tokens=max_tokens)
    assert off(bench.gradient("a"), want) <= 5e-6
    assert split.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-6)
    for one, two in zip(whole.loss_fn_outputs, split.loss_fn_outputs, strict=True):
        torch.testing.assert_close(one["logprobs"].to_torch(), two["logprobs"].to_torch(), rtol=0, atol=1e-5)


def small_memory(patch: pytest.MonkeyPatch, tokens: int, where: str) -> list[int]:
    """Let forward or backward of more than so many tokens run out of memory; return the sizes that did."""
    failed: list[int] = []

    def fail(size: int) -> None:
        if size > tokens:
            failed.append(size)
            raise torch.OutOfMemoryError("simulated")

    if where == "forward":
        hidden = BaseModel.hidden

        def narrow(self: BaseModel, packed: Any) -> torch.Tensor:
            fail(packed.tokens.shape[1])
            return hidden(self, packed)

        patch.setattr(BaseModel, "hidden", narrow)
    else:
        grad = torch.autograd.grad

        def narrow_grad(outputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if outputs.dim() == 2:  # the model's, not a custom loss's
                fail(outputs.shape[0])
            return grad(outputs, *args, **kwargs)

        patch.setattr(torch.autograd, "grad", narrow_grad)
    return failed


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("loss_fn", ["cross_entropy", dpo], ids=["built-in", "custom"])
def test_running_out_of_memory_halves_the_pass(
    bench: Bench, loss_fn: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass too large for memory is run in smaller ones, with the same losses, logprobs and gradients."""
    mine, theirs = data_of(PAIRS, 1), data_of((7, 2), 2)
    requests = lambda: [train("a", mine, loss_fn), train("b", theirs)]  # noqa: E731
    want = [outcome.value for outcome in bench.run(*requests())]
    gradients = [bench.gradient(lane) for lane in "ab"]
    for lane in "ab":
        bench.model(lane).state.grad.zero_()
    failed = small_memory(monkeypatch, 14, where)
    got = [outcome.value for outcome in bench.run(*requests())]
    assert failed[0] == sum(PAIRS) + 9
    for lane, gradient in zip("ab", gradients, strict=True):
        assert off(bench.gradient(lane), gradient) <= 5e-6
    for one, two in zip(want, got, strict=True):
        assert two.metrics == pytest.approx(one.metrics, rel=1e-5)
        for a, b in zip(one.loss_fn_outputs, two.loss_fn_outputs, strict=True):
            torch.testing.assert_close(a["logprobs"].to_torch(), b["logprobs"].to_torch(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("loss_fn", ["cross_entropy", dpo], ids=["built-in", "custom"])
@pytest.mark.parametrize("max_tokens", [4096, 20])
def test_a_row_too_large_fails_alone_and_takes_back(
    bench: Bench, loss_fn: Any, where: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that does not fit by itself fails its request, which takes back what it had added; others go on."""
    bench.run(train("a", data_of((5,), 1)), train("b", data_of((3,), 1)))
    before = bench.model("a").state.grad.clone()
    theirs = data_of((7, 2), 2)
    bench.one(train("b", theirs))
    want = bench.gradient("b")
    bench.model("b").state.grad.zero_()
    bench.one(train("b", data_of((3,), 1)))
    small_memory(monkeypatch, 14, where)
    failed, fine = bench.run(train("a", data_of((4, 6, 17, 3), 3), loss_fn), train("b", theirs), max_tokens=max_tokens)
    assert isinstance(failed.error, CapacityError)
    assert "data[2] of 17 tokens" in str(failed.error)
    assert torch.equal(bench.model("a").state.grad, before)
    assert bench.model("a").state.requests == 1
    assert fine.error is None
    assert off(bench.gradient("b"), want) <= 5e-6


def test_other_errors_of_the_device_are_not_swallowed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device error that is not a lack of memory goes up to the engine instead of being retried."""

    def broken(self: BaseModel, packed: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(BaseModel, "hidden", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench.one(train("a", data_of((3,))))


def test_requests_of_one_lane_accumulate_until_the_step(bench: Bench) -> None:
    """Two requests and a step planned together: the step applies the sum, a later request counts from zero."""
    one, two = data_of((5,), 1), data_of((6, 2), 2)
    bench.one(train("a", [*one, *two]))
    want = bench.gradient("a")
    norm = float(bench.model("a").state.grad.norm())
    bench.model("a").state.grad.zero_()
    bench.model("a").state.requests = 0
    *_, stepped, after = bench.run(
        train("a", one), train("a", two), step(OptimStep("a", AdamParams(learning_rate=0.0)), "a"), train("a", one)
    )
    assert stepped.value.metrics == {
        "optim/applied": 1.0,
        "optim/grad_norm": pytest.approx(norm, rel=1e-5),
        "optim/step": 1.0,
    }
    bench.one(train("a", two))
    assert after.error is None
    assert off(bench.gradient("a"), want) <= 5e-6


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "token out of range": ({"tokens": [1, VOCAB]}, "model_input"),
    "no tokens": ({"tokens": []}, "model_input"),
    "target out of range": ({"targets": [1, -1]}, "target_tokens"),
    "targets too short": ({"targets": [1]}, "target_tokens"),
    "weights not finite": ({"weights": [1.0, np.nan]}, "weights"),
    "weights of another shape": ({"weights": [1.0]}, "weights"),
    "unknown input": ({"mask": [1.0, 1.0]}, "mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_datum_is_named_and_runs_nothing(bench: Bench, case: str) -> None:
    """A request with one bad datum fails by that datum and field, and none of its rows count; others run."""
    changes, field = BAD[case]
    given = {"tokens": [1, 2], "targets": [3, 4], "weights": [1.0, 1.0], **changes}
    bad = datum(
        np.array(given.pop("tokens"), dtype=np.int64),
        np.array(given.pop("targets"), dtype=np.int64),
        **{key: np.array(item, dtype=np.float32) for key, item in given.items()},
    )
    failed, fine = bench.run(train("a", [*data_of((3,)), bad]), train("b", data_of((3,))))
    assert isinstance(failed.error, InvalidRequestError)
    assert "data[1]" in str(failed.error)
    assert field in str(failed.error)
    assert not bench.model("a").state.grad.any()
    assert fine.error is None
    assert bench.model("b").state.grad.any()


def test_training_with_a_store_folder_writes_nothing_by_itself(tmp_path: Path) -> None:
    """Passes and steps leave the store as it was: only saving writes weights."""
    bench = Bench(tmp_path)
    bench.create("run")
    before = sorted(tmp_path.rglob("*"))
    bench.run(train("run", data_of((3,))), step(OptimStep("run", AdamParams()), "run"))
    assert sorted(tmp_path.rglob("*")) == before


def test_steps_of_several_models_at_once_are_those_of_each() -> None:
    """Optimizers step in one call: every model's weights, metrics and errors are those of steps one by one."""
    benches = []
    for together in (False, True):
        bench = Bench()
        for name, seed in (("a", 1), ("b", 2), ("idle", 3)):
            bench.create(name, rank=4, seed=seed)
        bench.run(*(train(name, data_of(LENGTHS, seed)) for seed, name in enumerate(("a", "b"))))
        asked = {"a": 0.0, "b": 0.5, "idle": 0.0, "nobody": 0.0}
        asks = [OptimStep(name, AdamParams(1e-2, grad_clip_norm=clip)) for name, clip in asked.items()]
        steps = [step(ask, ask.model_id) for ask in asks]
        outcomes = bench.run(*steps) if together else [each for one in steps for each in bench.run(one)]
        benches.append((bench, outcomes))
    (one, found), (other, same) = benches
    by_lane = {outcome.request.lane: outcome for outcome in same}
    for outcome in found:
        twin = by_lane[outcome.request.lane]
        assert (twin.error is None) == (outcome.error is None) == (outcome.request.lane != "nobody")
        assert outcome.error is not None or outcome.value.metrics == twin.value.metrics
    for name in ("a", "b", "idle"):
        assert torch.equal(one.model(name).state.adapter.arena, other.model(name).state.adapter.arena)
    assert one.model("a").state.steps == other.model("b").state.steps == 1
    assert other.model("idle").state.steps == 0


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (AdamParams(learning_rate=1e38), "learning_rate"),
        (AdamParams(learning_rate=1e20, weight_decay=1e20), "weight_decay"),
        (AdamParams(eps=1e39), "eps"),
        (AdamParams(grad_clip_norm=1e39), "clip_norm"),
    ],
)
def test_a_step_that_float32_can_not_hold_is_refused_alone(bench: Bench, params: AdamParams, field: str) -> None:
    """A parameter too large for the step's arithmetic fails its own request; the neighbour's is applied."""
    bench.run(train("a", data_of(LENGTHS)), train("b", data_of(LENGTHS)))
    before = bench.model("a").state.adapter.arena.clone()
    bad, good = bench.run(step(OptimStep("a", params), "a"), step(OptimStep("b", AdamParams()), "b"))
    assert isinstance(bad.error, InvalidRequestError)
    assert field in str(bad.error)
    assert torch.equal(bench.model("a").state.adapter.arena, before)
    assert good.value.metrics["optim/applied"] == 1.0


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        (lambda logp, inputs, config: logp @ logp, "RuntimeError"),
        (lambda logp, inputs, config: (logp.sum(), logp), "its loss must be"),
        (lambda logp, inputs, config: 1 // 0, "ZeroDivisionError"),
        (lambda logp, inputs, config: sys.exit(2), "SystemExit"),
    ],
)
def test_a_registered_loss_fails_its_own_request(bench: Bench, evaluate: Callable[..., Any], says: str) -> None:
    """A user's token loss that raises, or returns what is none, fails by name; the neighbour's request goes through."""
    register_token_loss(TokenLoss("broken", evaluate))
    try:
        plain = data_of((4, 3))
        bare = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in plain]
        bad, good = bench.run(train("a", bare, "broken"), train("b", plain))
    finally:
        unregister_token_loss("broken")
    assert isinstance(bad.error, LossError)
    assert says in str(bad.error)
    assert good.error is None
    assert not any(bool(grad.any()) for grad in bench.gradient("a").values())


@pytest.mark.parametrize("backward", [True, False])
def test_padding_of_narrow_targets_is_no_token(bench: Bench, backward: bool) -> None:
    """Beside wider ones a narrow datum has the loss it has alone, also where a loss of nothing is not nothing."""

    def distance(logp: torch.Tensor, inputs: Any, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return (logp - inputs["ref"]) ** 2, 2 * (logp - inputs["ref"])

    def with_ref(given: list[Datum]) -> list[Datum]:
        return [
            Datum(d.model_input, {"target_tokens": t, "ref": np.full(t.shape, -3, np.float32)})
            for d in given
            for t in [d.loss_fn_inputs["target_tokens"].to_numpy()]
        ]

    narrow, wide = with_ref(data_of((4,), 1)), with_ref(data_of((4,), 2, width=3))
    register_token_loss(TokenLoss("distance", distance, ("ref",)))
    try:
        apart, gradients = 0.0, []
        for data in (narrow, wide):
            apart += bench.one(train("a", data, "distance", backward=backward)).metrics["loss:sum"]
            gradients.append(bench.model("a").state.grad.clone())
            bench.model("a").state.grad.zero_()
        both = bench.one(train("a", narrow + wide, "distance", backward=backward)).metrics["loss:sum"]
    finally:
        unregister_token_loss("distance")
    assert both == pytest.approx(apart, rel=1e-5)
    torch.testing.assert_close(bench.model("a").state.grad, gradients[0] + gradients[1], rtol=1e-3, atol=2e-3)


def test_a_registered_loss_trains_by_its_name(bench: Bench) -> None:
    """A token loss of the user's, registered with the kernels, is a loss by name here, its settings checked."""

    def scaled(logp: torch.Tensor, inputs: Any, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight = inputs["weights"] * config["factor"]
        return -weight * logp, -weight

    register_token_loss(TokenLoss("scaled", scaled, ("weights",), {"factor": 2.0}))
    try:
        data = data_of(LENGTHS)
        for name, loss in (("a", "scaled"), ("b", "cross_entropy")):
            assert bench.one(train(name, data, loss)).metrics["loss:sum"] != 0
        with pytest.raises(InvalidRequestError, match="no such setting"):
            bench.one(train("a", data, "scaled", {"other": 1.0}))
        again = bench.one(train("a", data, "scaled", {"factor": -2.0}))
    finally:
        unregister_token_loss("scaled")
    assert again.loss_fn_outputs
    assert not any(bool(grad.abs().max() > 1e-5) for grad in bench.gradient("a").values())
