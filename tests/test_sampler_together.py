"""Tests of many requests in one sampler: what one draws, scores and waits for is not the others' doing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import CONTEXT, VOCAB, adapter_of, base, numbers, sample
from test_sampler import FREE, GREEDY, PROMPT, finish, prompts, tiny, tokens
from tickwork.compute import next_tokens, prompt, sampler
from tickwork.compute.cache import KVPool
from tickwork.compute.choose import Recipe, choose
from tickwork.compute.lora import Adapter
from tickwork.compute.sampler import Sampler
from tickwork.engine.request import Outcome, Request
from tickwork.errors import CapacityError, DivergedError, RequestCancelledError, RequestFailedError
from tickwork.results import SampledSequence, SampleResponse
from tickwork.types import LoraConfig, SamplingParams

MODES = [pytest.param(False, id="shared"), pytest.param(True, id="invariant")]


@functools.cache
def adapters() -> list[Adapter | None]:
    """Return the bare base and adapters of several ranks, one of them without the head."""
    found = [adapter_of(base("llama"), LoraConfig(rank=rank, train_unembed=rank != 2), rank) for rank in (2, 3, 8)]
    return [None, *found]


def diverged(part: str) -> Adapter:
    """Return an adapter that holds NaN in its head or in the first layer."""
    adapter = adapter_of(base("llama"), LoraConfig(rank=4), 0)
    path = next(path for path in adapter.tensors if ("lm_head" in path) == (part == "head"))
    with torch.no_grad():
        adapter.tensors[path][1].fill_(math.nan)
    return adapter


@attrs.frozen
class Ask:
    """One request of a mix: whose adapter, when it comes, and what it asks."""

    adapter: int
    at: int
    length: int
    params: SamplingParams
    changes: dict[str, Any]

    def request(self) -> Request:
        """Build it anew."""
        return sample(numbers(self.length).integers(0, VOCAB, self.length).tolist(), self.params, **self.changes)


def asks(ranks: st.SearchStrategy[int]) -> st.SearchStrategy[list[Ask]]:
    """Return mixes of up to five requests."""
    params = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 7),
        seed=st.integers(0, 2**20),
        stop=st.sampled_from([[], list(range(0, VOCAB, 9))]),
        temperature=st.sampled_from([0.0, 0.6, 1.0, 1.8]),
        top_k=st.sampled_from([-1, 1, 9]),
        top_p=st.sampled_from([1.0, 0.8]),
    )
    changes = st.fixed_dictionaries(
        {
            "num_samples": st.integers(1, 3),
            "include_prompt_logprobs": st.booleans(),
            "topk_prompt_logprobs": st.integers(0, 2),
            "topk_sample_logprobs": ranks,
            "prompt_alt_tokens_k": st.integers(0, 1),
        }
    )
    one = st.builds(
        Ask, adapter=st.integers(0, 3), at=st.integers(0, 5), length=st.integers(1, 40), params=params, changes=changes
    )
    return st.lists(one, min_size=2, max_size=5)


def together(mix: Sequence[Ask], max_tokens: int, *, invariant: bool) -> list[SampleResponse]:
    """Run a mix, each request joining at its step."""
    one, requests = Sampler(base("llama"), max_tokens, invariant=invariant), [ask.request() for ask in mix]
    outcomes: dict[Request, Outcome] = {}
    for at in range(max(ask.at for ask in mix) + 1):
        for ask, request in zip(mix, requests, strict=True):
            if ask.at == at:
                one.admit(request, adapters()[ask.adapter])
        outcomes |= {outcome.request: outcome for outcome in one.step()}
    outcomes |= finish(one) if one.busy else {}
    return [outcomes[request].value for request in requests]


def content(response: SampleResponse) -> object:
    """Return all of a response but the names of its sequences."""
    drawn = [(s.tokens, s.logprobs, s.topk_logprobs, s.stop_reason) for s in response.sequences]
    alt = response.prompt_alt_tokens
    beside = None if alt is None else (alt.tokens.to_numpy().tolist(), alt.logprobs.to_numpy().tolist())
    return drawn, response.prompt_logprobs, response.topk_prompt_logprobs, beside


@settings(max_examples=15, deadline=None)
@given(asks(st.integers(0, 3)), st.sampled_from([5, 16, 64]))
def test_invariant_requests_are_bit_equal_to_each_alone(mix: list[Ask], max_tokens: int) -> None:
    """With ``invariant`` every token, logprob and rank is to the bit what the request has alone."""
    for ask, found in zip(mix, together(mix, max_tokens, invariant=True), strict=True):
        (alone,) = together([attrs.evolve(ask, at=0)], max_tokens, invariant=True)
        assert content(found) == content(alone)


def at_a_border(ask: Ask, index: int, place: int, alone: SampledSequence) -> bool:
    """Whether rounding may change a draw: a random number, or a limit, moved by 1e-5 makes it another token."""
    logp = torch.full((1, VOCAB), -math.inf)
    for token, value in alone.topk_logprobs[place]:
        logp[0, token] = value
    if ask.params.temperature == 0:
        best = logp[0].topk(2).values
        return float(best[0] - best[1]) < 1e-5
    uniform = np.random.default_rng([ask.params.seed, index]).random(place + 1)[place]
    moved = {
        int(choose(logp, torch.tensor([uniform + by]), [Recipe(1.0, ask.params.top_k, ask.params.top_p + cut)])[0])
        for by in (-1e-5, 1e-5)
        for cut in (-1e-5, 0.0, 1e-5)
    }
    return len(moved) > 1


@settings(max_examples=15, deadline=None)
@given(asks(st.just(VOCAB)), st.sampled_from([5, 16, 64]))
def test_requests_that_share_forwards_have_the_numbers_of_each_alone(mix: list[Ask], max_tokens: int) -> None:
    """Tokens are those of the request alone, but at a border of its distribution; logprobs differ by rounding."""
    for ask, found in zip(mix, together(mix, max_tokens, invariant=False), strict=True):
        (alone,) = together([attrs.evolve(ask, at=0)], 64, invariant=False)
        got, want = ([v or 0.0 for v in r.prompt_logprobs or ()] for r in (found, alone))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        for index, (ours, theirs) in enumerate(zip(found.sequences, alone.sequences, strict=True)):
            length = max(len(ours.tokens), len(theirs.tokens))
            equal = next((i for i in range(length) if ours.tokens[i : i + 1] != theirs.tokens[i : i + 1]), length)
            np.testing.assert_allclose(ours.logprobs[:equal], theirs.logprobs[:equal], rtol=1e-5, atol=1e-5)
            assert equal == length or at_a_border(ask, index, equal, theirs)


@pytest.mark.parametrize("cells", [1, 3 * VOCAB])
def test_logits_that_do_not_fit_at_once_are_drawn_from_in_parts(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows of logits are held at once, tokens and ranks are the same."""
    mix = [
        Ask(i, 0, 5 + i, attrs.evolve(FREE, seed=i), {"num_samples": 2, "topk_sample_logprobs": i}) for i in range(4)
    ]
    want = together(mix, 64, invariant=False)
    monkeypatch.setattr(next_tokens, "DRAWN_LOGITS", cells)
    for found, whole in zip(together(mix, 64, invariant=False), want, strict=True):
        assert tokens(found) == tokens(whole)
        ranks = [
            [[[token for token, _ in row] for row in s.topk_logprobs or ()] for s in r.sequences]
            for r in (found, whole)
        ]
        assert ranks[0] == ranks[1]


def beside(
    disturb: Callable[[Sampler], object], *, invariant: bool, **changes: Any
) -> tuple[dict[Request, Outcome], SampleResponse, SampleResponse]:
    """Run two requests, one that joins late, beside what ``disturb`` does; return all outcomes and the two answers."""
    one = Sampler(base("llama"), 64, invariant=invariant, **changes)
    first, late = (sample(p, attrs.evolve(FREE, max_tokens=9), num_samples=2) for p in prompts((30, 9)))
    one.admit(first, adapters()[1])
    outcomes = {outcome.request: outcome for outcome in one.step()}
    disturb(one)
    outcomes |= {outcome.request: outcome for _ in range(2) for outcome in one.step()}
    one.admit(late, adapters()[2])
    outcomes |= finish(one)
    return outcomes, outcomes[first].value, outcomes[late].value


def assert_undisturbed(disturb: Callable[[Sampler], object], *, invariant: bool) -> dict[Request, Outcome]:
    """Check that neighbours have what they have without ``disturb``, to the bit where they share no forward."""
    _, *want = beside(lambda one: None, invariant=invariant)
    outcomes, *found = beside(disturb, invariant=invariant)
    for got, alone in zip(found, want, strict=True):
        if invariant:
            assert content(got) == content(alone)
        assert tokens(got) == tokens(alone)
        logprobs = [[s.logprobs for s in response.sequences] for response in (got, alone)]
        np.testing.assert_allclose(*logprobs, rtol=1e-5, atol=1e-5)
    return outcomes


@pytest.mark.parametrize("invariant", MODES)
@pytest.mark.parametrize("part", ["body", "head"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_adapter_fails_its_own_requests_by_name(part: str, temperature: float, invariant: bool) -> None:
    """NaN in an adapter is that request's error; its neighbours, one in the cache it leaves behind, are as without."""
    bad = sample([3] * 20, attrs.evolve(FREE, temperature=temperature), num_samples=3)
    outcomes = assert_undisturbed(lambda one: one.admit(bad, diverged(part)), invariant=invariant)
    assert isinstance(outcomes[bad].error, DivergedError)
    assert "not finite: its adapter has diverged" in str(outcomes[bad].error)


def test_a_base_that_overflows_is_said_to_be_the_base() -> None:
    """Without an adapter the message does not speak of one."""
    one, request = Sampler(base("llama"), 64), sample(PROMPT, FREE)
    one.admit(request, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_tokens, "head_logits", lambda hidden, *_: hidden.new_full((len(hidden), VOCAB), math.inf))
        (outcome,) = one.step()
    assert "the base model overflows" in str(outcome.error)


def test_a_prompt_without_finite_scores_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only a score of the prompt is not finite the request fails too, instead of handing it over."""
    original = prompt.hold_logprobs

    def broken(*args: Any) -> Any:
        held = original(*args)
        held.logprobs[1] = math.nan
        return held

    monkeypatch.setattr(prompt, "hold_logprobs", broken)
    asked, other = sample(PROMPT, FREE, include_prompt_logprobs=True), sample(PROMPT, FREE)
    one = Sampler(base("llama"), 64)
    for request in (asked, other):
        one.admit(request, None)
    outcomes = finish(one)
    assert isinstance(outcomes[asked].error, DivergedError)
    assert outcomes[other].error is None


def test_a_text_that_can_not_be_decoded_is_its_own_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tokenizer raises on drawn tokens fails the request with stop strings, and no other."""

    def broken(*args: object) -> str:
        raise ValueError("no such piece")

    monkeypatch.setattr(sampler, "_decode", broken)
    one, asked, other = Sampler(tiny(), 64), sample(PROMPT, attrs.evolve(FREE, stop="x")), sample(PROMPT, FREE)
    for request in (asked, other):
        one.admit(request, None)
    outcomes = finish(one)
    assert type(outcomes[asked].error) is RequestFailedError
    assert "no such piece" in str(outcomes[asked].error)
    assert outcomes[other].error is None


@pytest.mark.parametrize("invariant", MODES)
@pytest.mark.parametrize("length", [20, 90])
def test_a_cancelled_request_changes_nothing_for_others(length: int, invariant: bool) -> None:
    """Cancelled while decoding or within its prompt, even one that holds NaN, a request leaves no trace."""
    gone = sample([3] * length, attrs.evolve(FREE, max_tokens=5), num_samples=2)

    def disturb(one: Sampler) -> None:
        one.admit(gone, diverged("body") if length == 90 else adapters()[3])
        one.step()
        assert gone.future.cancel()

    _, *want = beside(lambda one: one.step(), invariant=invariant)
    outcomes, *found = beside(disturb, invariant=invariant)
    assert isinstance(outcomes[gone].error, RequestCancelledError)
    for got, alone in zip(found, want, strict=True):
        assert tokens(got) == tokens(alone)
        assert content(got) == content(alone) or not invariant


def small_memory(cells: int, patch: pytest.MonkeyPatch) -> None:
    """Let a cache hold no more than that many positions."""
    original = KVPool._grown

    def grown(pool: KVPool, held: torch.Tensor) -> torch.Tensor:
        if max(held.shape[0], pool.slots) * max(held.shape[2], pool.capacity) > cells:
            raise torch.OutOfMemoryError("simulated")
        return original(pool, held)

    patch.setattr(KVPool, "_grown", grown)


@pytest.mark.parametrize("invariant", MODES)
@pytest.mark.parametrize(("length", "samples"), [(5, 40), (80, 6)], ids=["many", "long"])
def test_a_request_too_large_for_memory_fails_alone(
    length: int, samples: int, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What grew the cache past memory takes its growth with it: the others go on, and are not made to wait for good."""
    small_memory(600, monkeypatch)
    large = sample([3] * length, FREE, num_samples=samples)
    outcomes = assert_undisturbed(lambda one: one.admit(large, adapters()[3]), invariant=invariant)
    assert isinstance(outcomes[large].error, CapacityError)


def test_after_a_request_that_did_not_fit_others_share_steps_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound that a lack of memory sets ends with the requests it was set for."""
    small_memory(600, monkeypatch)
    one = Sampler(base("llama"), 64)
    for samples in (1, 40):
        one.admit(sample(PROMPT, FREE, num_samples=samples), None)
    assert [outcome.error is None for outcome in finish(one).values()] == [True, False]
    later = [sample(PROMPT, attrs.evolve(FREE, max_tokens=3)) for _ in range(4)]
    for request in later:
        one.admit(request, None)
    assert [len(one.step()) for _ in range(3)] == [0, 0, 4]


@pytest.mark.parametrize("invariant", MODES)
def test_a_small_request_keeps_its_pace_beside_a_large_one(invariant: bool) -> None:
    """Beside 256 sequences a request joins at the next step and has a token in each."""
    one = Sampler(base("llama"), 64, invariant=invariant)
    one.admit(sample(PROMPT, attrs.evolve(FREE, max_tokens=40), num_samples=256), None)
    one.step()
    small = sample(PROMPT, attrs.evolve(GREEDY, max_tokens=5))
    one.admit(small, adapters()[1])
    finished = [[outcome.request for outcome in one.step()] for _ in range(5)]
    assert finished == [[], [], [], [], [small]]


def test_a_long_prompt_does_not_keep_short_ones_out() -> None:
    """A short prompt is through at its first step, beside a long one that takes many."""
    one, long = Sampler(base("llama"), 8), sample([3] * 90, attrs.evolve(GREEDY, max_tokens=1))
    one.admit(long, None)
    one.step()
    others = [sample(PROMPT[:4], attrs.evolve(GREEDY, max_tokens=1)), sample([3] * 60, GREEDY)]
    for other in reversed(others):
        one.admit(other, None)
    assert [outcome.request for outcome in one.step()] == [others[0]]


def test_many_short_prompts_do_not_starve_a_long_one() -> None:
    """Of each step's prompt tokens the oldest prompt has half, however many short ones come."""
    one, long = Sampler(base("llama"), 8), sample([3] * 80, attrs.evolve(GREEDY, max_tokens=1))
    one.admit(long, None)
    steps, done = 0, False
    while not done:
        for _ in range(2):
            one.admit(sample(PROMPT[:4], attrs.evolve(GREEDY, max_tokens=1)), None)
        done = long in [outcome.request for outcome in one.step()]
        steps += 1
    assert steps == 20


def test_sequences_that_have_stopped_make_room() -> None:
    """A request that waits for the cache joins when enough sequences of another have stopped, in their slots."""
    stops = attrs.evolve(FREE, max_tokens=CONTEXT - 5, stop=list(range(0, VOCAB, 9)))
    one = Sampler(base("llama"), 64, max_cached=16 * CONTEXT)
    large, waits = sample(PROMPT, stops, num_samples=16), sample(PROMPT, attrs.evolve(GREEDY, max_tokens=2))
    for request in (large, waits):
        one.admit(request, None)
    pool = vars(one)["_shared"]
    most = 0
    outcomes: list[Request] = []
    while one.busy:
        outcomes += [outcome.request for outcome in one.step()]
        most = max(most, pool.slots)
    assert outcomes == [waits, large]
    assert (most, pool.slots) == (16, 0)


def test_waiting_requests_are_taken_in_order() -> None:
    """A small request does not overtake a large one that waits for the cache before it."""
    one = Sampler(base("llama"), 64, max_cached=40)
    short = attrs.evolve(GREEDY, max_tokens=3)
    ahead, large, small = (sample(PROMPT, short, num_samples=n) for n in (4, 5, 1))
    for request in (ahead, large, small):
        one.admit(request, None)
    assert [outcome.request for _ in range(9) for outcome in one.step()] == [ahead, large, small]
