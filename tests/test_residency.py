"""Tests of adapters in host memory: what moves, what may not, and that nobody's numbers show it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import tickwork
from models import CPU, Bench, base, data_of, sample, step, stir, train
from planning import plan
from tickwork import cli_server
from tickwork.compute.lora import Adapter
from tickwork.compute.optimizer import Trainable
from tickwork.compute.residency import Residency
from tickwork.engine.plan import Stage
from tickwork.errors import CapacityError
from tickwork.requests import CreateModel, Load, OpenSampler, OptimStep, Release, Save
from tickwork.server import serve
from tickwork.types import AdamParams, LoraConfig, SamplingParams

ADAM = AdamParams(learning_rate=1e-2)
PROMPT = (5, 9, 2, 40)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what lies in host memory be twice as large, so that whoever uses it there computes something else."""
    to_host, to_device = Residency._to_host, Residency._to_device
    monkeypatch.setattr(Residency, "_to_host", lambda self, tensor: to_host(self, tensor).mul_(2))
    monkeypatch.setattr(Residency, "_to_device", lambda self, tensor: to_device(self, tensor).div_(2))


def adapter_bytes() -> int:
    """Bytes of an adapter of rank 4 of the smallest model; so many again a gradient, and each of two moments."""
    return Adapter(base("llama").shapes, LoraConfig(rank=4, seed=0), 0, CPU).nbytes


def state_of(bench: Bench, name: str) -> list[torch.Tensor]:
    """Return all that training changes, brought to the device first."""
    state = bench.device._model(name).state
    assert state.exp_avg is not None
    assert state.exp_avg_sq is not None
    return [state.adapter.arena, state.grad, state.exp_avg, state.exp_avg_sq]


def drawn(answer: Any) -> list[Any]:
    """Return the tokens and logprobs of an answer, if it has any."""
    return [(each.tokens, each.logprobs) for each in getattr(answer, "sequences", ())]


def plan_stages(request: Any, max_tokens: int) -> list[Stage]:
    """Plan a request and return its stages of one pass each, as the engine runs them."""
    return plan([request], max_tokens)


def alternate(bench: Bench, bound: int | None) -> list[Any]:
    """Train two models in turns, save, load, snapshot and sample; return all that a client sees of it."""
    for name, seed in (("a", 1), ("b", 2)):
        bench.create(name, seed=seed, stirred=False)
        stir(bench.device._model(name).state.adapter, seed)
    seen: list[Any] = []

    def run(*requests: Any) -> None:
        for outcome in bench.run(*requests):
            assert outcome.error is None
            seen.append(getattr(outcome.value, "metrics", None) or drawn(outcome.value))
        assert bound is None or bench.device.adapter_bytes <= bound

    for turn in range(3):
        for name in "ab":
            run(train(name, data_of((5, 3), turn)))
            for part in plan_stages(train(name, data_of((4,) * 4, 10 + turn)), 8):
                seen += [outcome.value.metrics for outcome in bench.device.run(part, 7, lambda: False)]
                assert bound is None or bench.device.adapter_bytes <= bound
        for name in "ab":
            run(step(OptimStep(name, ADAM), name), train(name, data_of((6,), 20 + turn)))
    run(step(Save("a", "weights", "kept"), "a"), step(OpenSampler("s", model_id="b"), "b"))
    run(step(OptimStep("a", ADAM), "a"), step(OptimStep("b", ADAM), "b"))
    run(sample(PROMPT, SamplingParams(max_tokens=4, seed=3, stop=[]), key="s"))
    run(step(Load("a", "tinker://a/weights/kept", True), "a"))
    run(train("a", data_of((7,), 30)), train("b", data_of((7,), 31)))
    return seen


@pytest.mark.parametrize("fits", [0.1, 1, 2])
def test_two_clients_under_a_bound_see_what_they_see_without(fits: float, elsewhere: None) -> None:
    """Losses, metrics, samples, weights, gradients and moments are the same to the bit, within the bound or below."""
    bound = int(fits * 4 * adapter_bytes())
    free, bound_bench = Bench(), Bench(adapter_memory=bound)
    assert alternate(bound_bench, bound) == alternate(free, None)
    for name in "ab":
        for one, two in zip(state_of(free, name), state_of(bound_bench, name), strict=True):
            assert torch.equal(one, two)
            assert bool(one.any())
    assert free.device.adapter_bytes == 9 * adapter_bytes()


def test_without_a_bound_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which is its own host, everything stays unless a bound is given."""
    monkeypatch.delattr(Residency, "_to_host")
    alternate(Bench(), None)


def test_what_was_unused_for_longest_goes_first() -> None:
    """Of three models the one whose last request is the oldest makes room."""
    each = adapter_bytes()
    bench = Bench(adapter_memory=2 * each)
    for name in "abc":
        bench.create(name)
    assert here(bench) == {"b", "c"}
    arena = bench.model("b").state.adapter.arena
    for name in "ba":
        bench.one(step(Save(name, "sampler_weights", "one"), name))
    assert here(bench) == {"a", "b"}
    assert bench.model("b").state.adapter.arena is arena


def here(bench: Bench) -> set[str]:
    """Return the models that lie on the device."""
    places = bench.device._residency._here
    return {name for name in bench.device._models if places[bench.model(name).state]}


def test_parameters_that_came_back_are_those_of_their_arena() -> None:
    """After moving, the tensors of the projections are the new arena's own memory, all of it."""
    bench = Bench(adapter_memory=1)
    bench.create("a")
    adapter = bench.device._model("a").state.adapter
    start, end = adapter.arena.data_ptr(), adapter.arena.data_ptr() + adapter.arena.nbytes
    for pair in adapter.tensors.values():
        for tensor in pair:
            assert start <= tensor.data_ptr() < end
    assert sum(t.numel() for pair in adapter.tensors.values() for t in pair) == adapter.arena.numel()


def test_an_idle_model_is_its_adapter_alone() -> None:
    """A gradient takes memory from the first backward on; one of zeros, and moments not made yet, take none parked."""
    each = adapter_bytes()
    bench = Bench(adapter_memory=1)
    bench.create("a")
    state = bench.model("a").state
    assert state.nbytes == each
    bench.one(train("a", data_of((3,)), backward=False))
    assert state.nbytes == each
    bench.one(train("a", data_of((3,))))
    assert state.nbytes == 2 * each
    bench.one(step(OptimStep("a", ADAM), "a"))
    assert state.nbytes == 3 * each
    assert not bool(state.grad.any())


def test_what_one_stage_needs_may_exceed_the_bound() -> None:
    """Two models of one pass are both there, however small the bound, and move apart once it is through."""
    bench = Bench(adapter_memory=1)
    for name in "ab":
        bench.create(name)
    for outcome in bench.run(train("a", data_of((3,), 1)), train("b", data_of((3,), 2))):
        assert outcome.error is None
    assert bench.device.adapter_bytes == 0
    assert here(bench) == set()


def test_what_is_sampled_from_stays_until_it_is_done(elsewhere: None) -> None:
    """A sampler's adapter is in use between the turns of decoding; a model trained meanwhile does not push it out."""
    bench = Bench(adapter_memory=1)
    bench.create("a")
    bench.one(step(OpenSampler("s", model_id="a"), "a"))
    adapter = bench.device._weights["s"].adapter
    assert adapter is not None
    places = bench.device._residency._here
    request = sample(PROMPT, SamplingParams(max_tokens=3, seed=1, stop=[]), key="s")
    assert not places[adapter]
    bench.device.run(Stage(samples=(request,)), 1, lambda: False)
    assert places[adapter]
    bench.device.run(Stage(decode=1e-9), 1, lambda: True)
    assert bench.device.sampling
    (stage,) = plan([train("a", data_of((3,)))], 64)
    assert bench.device.run(stage, 1, lambda: False)[0].error is None
    assert places[adapter]
    assert bench.device.adapter_bytes == adapter.nbytes
    while bench.device.sampling:
        bench.device.run(Stage(decode=1e-9), 1, lambda: True)
    assert not places[adapter]
    assert bench.device.adapter_bytes == 0


def test_a_sampler_that_follows_a_model_follows_it_in_host_memory() -> None:
    """New weights reach a snapshot that is not on the device as they reach one that is."""
    params = SamplingParams(max_tokens=6, seed=1, stop=[])
    found = []
    for bound in (None, 1):
        bench = Bench(adapter_memory=bound)
        bench.create("a")
        bench.one(step(OpenSampler("s", model_id="a", inflight=True), "a"))
        bench.run(train("a", data_of((9,))), step(OptimStep("a", AdamParams(learning_rate=0.5)), "a"))
        before = bench.one(sample(PROMPT, params, key="s"))
        bench.one(step(OpenSampler("t", model_id="a", inflight=True), "a"))
        found.append((drawn(before), drawn(bench.one(sample(PROMPT, params, key="s")))))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_what_is_released_counts_no_more() -> None:
    """A model whose client has let go of it takes nothing, wherever it lay."""
    bench = Bench(adapter_memory=adapter_bytes())
    for name in "ab":
        bench.create(name)
    assert here(bench) == {"b"}
    for name in "ab":
        bench.one(step(Release(name), name))
    gc.collect()
    assert bench.device.adapter_bytes == 0
    assert len(bench.device._residency._here) == 0


def short(self: Residency, tensor: torch.Tensor) -> torch.Tensor:
    """Run out of memory."""
    raise torch.OutOfMemoryError("simulated")


def test_what_does_not_come_back_fails_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory for an adapter its pass, step and save fail by name, its neighbour's run; later it is whole."""
    bench = Bench(adapter_memory=1)
    for name, rank in (("a", 4), ("b", 2)):
        bench.create(name, rank=rank)
    to_device = Residency._to_device
    large = adapter_bytes()
    want = bench.model("a").state.adapter.arena.clone()
    asks = [train("a", data_of((3,))), step(OptimStep("a", ADAM), "a"), step(Save("a", "weights", "n"), "a")]
    with monkeypatch.context() as patch:
        patch.setattr(
            Residency, "_to_device", lambda self, t: short(self, t) if t.nbytes == large else to_device(self, t)
        )
        for ask in asks:
            failed, fine = bench.run(ask, train("b", data_of((3,))))
            assert isinstance(failed.error, CapacityError)
            assert "MiB" in str(failed.error)
            assert "adapter_memory" in str(failed.error)
            assert fine.error is None
    assert torch.equal(bench.device._model("a").state.adapter.arena, want)
    assert bench.one(train("a", data_of((3,)))).metrics


def test_a_request_of_several_passes_takes_back_what_it_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """When its model does not come back between two passes, what the first one added is gone all the same."""
    bench = Bench(adapter_memory=1)
    bench.create("a")
    bench.one(train("a", data_of((5,), 1)))
    want = bench.device._model("a").state.grad.clone()
    bench.device._residency.settle(())
    copies = 0
    to_device = Residency._to_device

    def fail_later(self: Residency, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal copies
        copies += 1
        return to_device(self, tensor) if copies <= 2 else short(self, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Residency, "_to_device", fail_later)
        one, two = plan_stages(train("a", data_of((4,) * 4)), 8)
        outcomes = bench.device.run(one, 1, lambda: False) + bench.device.run(two, 1, lambda: False)
    assert isinstance(outcomes[-1].error, CapacityError)
    assert copies == 3
    assert torch.equal(bench.device._model("a").state.grad, want)


def test_a_model_or_snapshot_that_does_not_fit_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creating an adapter, and copying one for a sampler, without memory is a CapacityError of that request."""
    bench = Bench()
    bench.create("a")
    monkeypatch.setattr(Adapter, "place", short)
    create = CreateModel("b", "tickwork/tiny", LoraConfig(rank=4))
    failures = [bench.run(step(ask, "x"))[0].error for ask in (create, OpenSampler("s", model_id="a"))]
    assert all(isinstance(error, CapacityError) for error in failures)
    with pytest.raises(CapacityError):
        bench.one(train("b", data_of((3,))))


def test_a_full_host_keeps_adapters_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has no memory left, the bound is exceeded rather than anybody's request failed."""
    monkeypatch.setattr(Residency, "_to_host", short)
    bench = Bench(adapter_memory=1)
    for name in "ab":
        bench.create(name)
        bench.one(train(name, data_of((3,))))
    assert here(bench) == {"a", "b"}


def test_other_errors_of_the_device_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is no lack of memory goes up, when moving either way."""

    def broken(self: Residency, tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench = Bench(adapter_memory=1)
    bench.create("a")
    for name in ("_to_device", "_to_host"):
        with monkeypatch.context() as patch:
            patch.setattr(Residency, name, broken)
            with pytest.raises(RuntimeError, match="illegal"):
                bench.one(train("a", data_of((3,))))


class Item:
    """A movable that says where it lies."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.moves = 0

    def move(self, copy: Any) -> None:
        """Count."""
        self.moves += 1


@given(
    sizes=st.lists(st.integers(1, 10), min_size=1, max_size=6),
    stages=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=4), st.lists(st.integers(0, 5), max_size=2))),
    bound=st.integers(0, 30),
)
def test_the_bound_holds_for_what_is_not_in_use(
    sizes: list[int], stages: list[tuple[list[int], list[int]]], bound: int
) -> None:
    """Whatever is used in whatever order: it is there while used, and what is idle never exceeds the bound."""
    items = [Item(size) for size in sizes]
    residency = Residency(bound, CPU)
    for used, kept in stages:
        used_items = [items[i % len(items)] for i in used]
        kept_items = [item for item in used_items if items.index(item) in kept]
        for item in used_items:
            residency.use(item)
            assert residency._here[item]
        assert all(residency._here[item] for item in used_items)
        assert residency.nbytes <= max(bound, sum(item.nbytes for item in set(used_items)))
        residency.settle(kept_items)
        assert all(residency._here[item] for item in kept_items)
        assert residency.nbytes <= max(bound, sum(item.nbytes for item in set(kept_items)))
        residency.settle(())


def test_a_move_that_fails_changes_nothing() -> None:
    """A model of which one copy can not be made lies where it lay, all of it."""
    state = Trainable(Adapter(base("llama").shapes, LoraConfig(rank=4, seed=0), 0, CPU))
    state.grad.fill_(1.0)
    state.exp_avg, state.exp_avg_sq = state.grad.clone(), state.grad.clone()
    tensors = (state.adapter.arena, state.grad, state.exp_avg, state.exp_avg_sq)
    for fails in range(4):
        left = fails

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("simulated")
            return tensor.clone()

        with pytest.raises(torch.OutOfMemoryError):
            state.move(copy)
        now = (state.adapter.arena, state.grad, state.exp_avg, state.exp_avg_sq)
        assert all(one is two for one, two in zip(tensors, now, strict=True))


OPTIONS: dict[str, Any] = {"checkpoint_activations": True, "adapter_memory": 12345, "max_tokens_per_pass": 77}


def arrived(engine: Any) -> bool:
    """Whether the device of an engine that has a model of tickwork/tiny was told the options above."""
    device = vars(engine)["_executor"]._device
    base = device._bases.get("tickwork/tiny")
    return (base.recompute is not None, device._residency._bound, base.budget.tokens) == (True, 12345, 77)


def test_a_service_hands_its_options_to_the_device() -> None:
    """What ``ServiceClient`` is told about memory reaches the device."""
    with tickwork.ServiceClient(device="cpu", **OPTIONS) as service:
        service.create_lora_training_client("tickwork/tiny", rank=2).get_info()
        assert arrived(service.host.engine)


async def test_a_service_in_a_nursery_hands_them_on_as_well() -> None:
    """What ``open_service`` is told about memory reaches the device."""
    async with tickwork.open_service(device="cpu", **OPTIONS) as service:
        await (await service.create_lora_training_client_async("tickwork/tiny", rank=2)).get_info_async()
        assert arrived(service.host.engine)


def test_a_server_hands_them_on_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``tickwork serve`` is told about memory, in MiB, reaches the device."""
    engines: list[Any] = []
    make_engine = serve.make_engine
    monkeypatch.setattr(serve, "make_engine", lambda *args, **kwargs: engines.append(make_engine(*args, **kwargs)))
    monkeypatch.setattr(cli_server, "SWITCH_SECONDS", sys.getswitchinterval())
    monkeypatch.setattr(cli_server, "_serve", lambda settings: serve.run(settings, trio.sleep_forever))
    arguments = ["--model", "tickwork/tiny", "--store", str(tmp_path), "--port", "0", "--checkpoint-activations"]
    CliRunner().invoke(cli_server.serve, [*arguments, "--adapter-memory-mib", "3"])
    options = vars(engines[0])["_executor"]._options
    assert (options["checkpoint_activations"], options["adapter_memory"]) == (True, 3 * 2**20)
