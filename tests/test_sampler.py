"""Tests of the sampler: what is drawn depends on the request alone, and follows the model's distribution."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch

from models import (
    CONTEXT,
    CPU,
    VOCAB,
    Bench,
    adapter_of,
    base,
    datum,
    folder,
    plain,
    plain_logits,
    sample,
    tokens_of,
    train,
)
from models import plain_shared as shared
from tickwork.compute import next_tokens
from tickwork.compute.choose import Recipe, choose
from tickwork.compute.lora import Adapter
from tickwork.compute.model import BaseModel
from tickwork.compute.sampler import Sampler
from tickwork.engine.request import Outcome, Request
from tickwork.errors import CapacityError, InvalidRequestError, RequestCancelledError
from tickwork.models import load_tokenizer
from tickwork.requests import OpenSampler
from tickwork.results import SampleResponse
from tickwork.types import LoraConfig, SamplingParams

PROMPT = (5, 17, 3, 99, 42)
FREE = SamplingParams(max_tokens=12, seed=7, stop=[])
GREEDY = attrs.evolve(FREE, temperature=0.0)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Return random prompts."""
    return [row.tolist() for row in tokens_of(lengths, seed)]


def finish(sampler: Sampler) -> dict[Request, Outcome]:
    """Step until nothing is left."""
    outcomes: dict[Request, Outcome] = {}
    for _ in range(1000):
        outcomes |= {outcome.request: outcome for outcome in sampler.step()}
        if not sampler.busy:
            return outcomes
    raise AssertionError("the sampler does not come to an end")


def run(
    *requests: Request, kind: str = "llama", max_tokens: int = 64, adapter: Adapter | None = None
) -> list[SampleResponse]:
    """Sample requests that arrive together."""
    sampler = Sampler(base(kind), max_tokens)
    for request in requests:
        sampler.admit(request, adapter)
    outcomes = finish(sampler)
    assert all(outcomes[request].error is None for request in requests)
    return [outcomes[request].value for request in requests]


def tokens(response: SampleResponse) -> list[list[int]]:
    """Return the drawn tokens of all sequences."""
    return [sequence.tokens for sequence in response.sequences]


def generated(model: object, prompt: Sequence[int], count: int) -> list[int]:
    """Return what transformers' own greedy search generates."""
    ids = torch.tensor([list(prompt)])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


@functools.cache
def endless() -> object:
    """Return a plain model that knows no end of sequence."""
    model = plain("llama")
    model.generation_config.eos_token_id = None
    return model


def test_greedy_is_transformers_generate() -> None:
    """At temperature 0 the tokens are those of transformers' greedy search, for prompts of any length."""
    many = prompts((1, 5, 30, 5, 70))
    for prompt, response in zip(many, run(*[sample(p, GREEDY) for p in many]), strict=True):
        assert tokens(response) == [generated(endless(), prompt, 12)]
        assert response.sequences[0].stop_reason == "length"


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2", "gemma3", "gpt2", "phi3"])
def test_other_architectures_decode_as_they_forward(kind: str) -> None:
    """Greedy tokens are the best ones of a full plain forward over prompt and tokens, with their logprobs."""
    (response,) = run(sample(PROMPT, GREEDY), kind=kind)
    (sequence,) = response.sequences
    with torch.no_grad():
        logp = plain_logits(shared(kind), [*PROMPT, *sequence.tokens])[len(PROMPT) - 1 : -1].log_softmax(-1)
    assert sequence.tokens == logp.argmax(-1).tolist()
    np.testing.assert_allclose(sequence.logprobs, logp.amax(-1).tolist(), rtol=0, atol=2e-5)


SETTINGS = [
    FREE,
    attrs.evolve(FREE, seed=8, temperature=0.6),
    attrs.evolve(FREE, seed=9, top_k=5),
    attrs.evolve(FREE, seed=10, top_p=0.7, temperature=1.3),
    GREEDY,
    attrs.evolve(FREE, seed=7, max_tokens=3),
]


def test_neighbours_do_not_change_what_is_drawn() -> None:
    """A request has the same tokens alone, in a batch, and with neighbours that join and leave while it runs."""
    many = prompts((5, 1, 9, 20, 3, 5))
    make = lambda: [sample(p, s) for p, s in zip(many, SETTINGS, strict=True)]  # noqa: E731
    alone = [tokens(run(request)[0]) for request in make()]
    assert [tokens(response) for response in run(*make())] == alone
    sampler, requests, outcomes = Sampler(base("llama"), 16), make(), {}
    for request in requests:
        sampler.admit(request, None)
        for _ in range(2):
            outcomes |= {outcome.request: outcome for outcome in sampler.step()}
    outcomes |= finish(sampler)
    assert [tokens(outcomes[request].value) for request in requests] == alone


def test_a_waiting_request_is_not_starved_and_draws_the_same() -> None:
    """Where the cache is full requests wait for their turn, and then have the tokens they have alone."""
    many = prompts((5, 5, 5))
    alone = [tokens(run(sample(p, FREE))[0]) for p in many]
    sampler = Sampler(base("llama"), 64, max_cached=20)
    requests = [sample(p, FREE) for p in many]
    for request in requests:
        sampler.admit(request, None)
    outcomes = finish(sampler)
    assert [tokens(outcomes[request].value) for request in requests] == alone


@pytest.mark.parametrize("where", ["hidden", "head"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_running_out_of_memory_delays_but_does_not_change(where: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two requests do not fit at once, wherever and whenever that shows, both get the tokens they have alone."""
    many = prompts((6, 7))
    ask = lambda: [sample(p, FREE, num_samples=2, include_prompt_logprobs=True) for p in many]  # noqa: E731
    alone = [run(request)[0] for request in ask()]
    sampler, requests, calls = Sampler(base("llama"), 64), ask(), []
    target, name = (BaseModel, "hidden") if where == "hidden" else (next_tokens, "choose")
    original: Callable[..., object] = getattr(target, name)

    def narrow(*args: object) -> object:
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("simulated")
        return original(*args)

    monkeypatch.setattr(target, name, narrow)
    for request in requests:
        sampler.admit(request, None)
    outcomes = finish(sampler)
    assert len(calls) > 13
    for request, want in zip(requests, alone, strict=True):
        assert tokens(outcomes[request].value) == tokens(want)
        assert outcomes[request].value.prompt_logprobs == pytest.approx(want.prompt_logprobs, abs=2e-5)


def test_a_request_that_does_not_fit_alone_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request alone that runs out of memory fails with what to lower, and the next one is served."""
    sampler, request = Sampler(base("llama"), 64), sample(PROMPT, FREE, num_samples=3)
    with monkeypatch.context() as patch:
        patch.setattr(BaseModel, "hidden", _no_memory)
        sampler.admit(request, None)
        (outcome,) = sampler.step()
    assert isinstance(outcome.error, CapacityError)
    assert "3 sequences of up to 17 tokens" in str(outcome.error)
    after = sample(PROMPT, FREE)
    sampler.admit(after, None)
    assert tokens(finish(sampler)[after].value) == tokens(run(sample(PROMPT, FREE))[0])


def _no_memory(*args: object) -> None:
    raise torch.OutOfMemoryError("simulated")


def test_seeds_make_the_difference() -> None:
    """The same seed draws the same, another seed and no seed draw otherwise."""
    draws = [tokens(run(sample(PROMPT, attrs.evolve(FREE, seed=seed)))[0])[0] for seed in (1, 1, 2, None, None)]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


def test_samples_of_one_request_differ_and_do_not_depend_on_their_number() -> None:
    """Each of ``num_samples`` sequences has random numbers of its own; asking for more leaves the first as they are."""
    (three,) = run(sample(PROMPT, FREE, num_samples=3))
    (five,) = run(sample(PROMPT, FREE, num_samples=5))
    assert len({tuple(drawn) for drawn in tokens(five)}) == 5
    assert tokens(five)[:3] == tokens(three)
    assert len({sequence.sequence_id for sequence in five.sequences}) == 5


def test_every_sample_of_a_request_continues_the_prompt() -> None:
    """All sequences of a request see the whole prompt: greedy ones are equal, and logprobs are the plain forward's."""
    (greedy,) = run(sample(PROMPT, GREEDY, num_samples=3))
    assert tokens(greedy) == tokens(run(sample(PROMPT, GREEDY))[0]) * 3
    (free,) = run(sample(PROMPT, FREE, num_samples=3))
    for sequence in free.sequences:
        want = plain_prompt_logprobs([*PROMPT, *sequence.tokens])[len(PROMPT) - 1 :]
        want = want[range(12), sequence.tokens]
        np.testing.assert_allclose(sequence.logprobs, want.tolist(), rtol=0, atol=2e-5)


def test_successive_tokens_follow_the_distribution() -> None:
    """Along sequences each draw falls anywhere in the model's distribution, independent of the draw before it."""
    (response,) = run(sample(PROMPT, attrs.evolve(FREE, max_tokens=60), num_samples=12))
    places = []
    for sequence in response.sequences:
        sums = plain_prompt_logprobs([*PROMPT, *sequence.tokens])[len(PROMPT) - 1 :].exp().cumsum(-1)
        ends = sums[range(60), sequence.tokens].numpy()
        starts = ends - np.exp(sequence.logprobs)
        places.append(starts + np.random.default_rng(0).random(60) * (ends - starts))
    quarters = np.floor(np.array(places) * 4).clip(0, 3).astype(int)
    pairs = np.bincount((quarters[:, 0:-1:2] * 4 + quarters[:, 1::2]).reshape(-1), minlength=16)
    expected = pairs.sum() / 16
    assert float(((pairs - expected) ** 2 / expected).sum()) < 37.7  # chi-square, 15 degrees, one in a thousand


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_are_the_models_at_the_temperature(temperature: float) -> None:
    """Each token's logprob is that of the plain forward's logits over the temperature, over the whole vocabulary."""
    params = attrs.evolve(FREE, temperature=temperature, top_k=20, top_p=0.9)
    (response,) = run(sample(PROMPT, params, topk_sample_logprobs=VOCAB))
    (sequence,) = response.sequences
    with torch.no_grad():
        logits = plain_logits(shared("llama"), [*PROMPT, *sequence.tokens])[len(PROMPT) - 1 : -1]
    want = (logits / temperature).log_softmax(-1)
    np.testing.assert_allclose(sequence.logprobs, want[range(len(want)), sequence.tokens].tolist(), rtol=0, atol=2e-5)
    for row, ranked in zip(want, sequence.topk_logprobs, strict=True):
        found = torch.tensor([value for _, value in sorted(ranked)])
        torch.testing.assert_close(found, row, rtol=0, atol=2e-5)
        assert [value for _, value in ranked] == sorted((value for _, value in ranked), reverse=True)


def test_greedy_logprobs_are_the_plain_ones() -> None:
    """At temperature 0 logprobs are those of the plain distribution."""
    (response,) = run(sample(PROMPT, GREEDY, topk_sample_logprobs=1))
    (sequence,) = response.sequences
    assert [ranked[0][0] for ranked in sequence.topk_logprobs] == sequence.tokens
    assert [ranked[0][1] for ranked in sequence.topk_logprobs] == sequence.logprobs
    assert all(-20 < value < 0 for value in sequence.logprobs)


def test_topk_logprobs_come_only_when_asked_for() -> None:
    """A neighbour that asks for ranked tokens does not give them to one that does not."""
    plain_one, ranked = run(sample(PROMPT, GREEDY), sample(PROMPT, GREEDY, topk_sample_logprobs=3))
    assert plain_one.sequences[0].topk_logprobs is None
    assert [len(row) for row in ranked.sequences[0].topk_logprobs] == [3] * 12
    assert (plain_one.prompt_logprobs, plain_one.topk_prompt_logprobs) == (None, None)


def test_the_one_most_likely_token_is_greedy() -> None:
    """``top_k=1``, and a ``top_p`` below any token's mass, draw the greedy tokens at any temperature."""
    (greedy,) = run(sample(PROMPT, GREEDY))
    for params in (attrs.evolve(FREE, top_k=1, temperature=3.0), attrs.evolve(FREE, top_p=1e-9, temperature=3.0)):
        assert tokens(run(sample(PROMPT, params))[0]) == tokens(greedy)


def logits_of(probabilities: Sequence[float]) -> torch.Tensor:
    """Return logits with that distribution."""
    return torch.tensor(probabilities).log()


MASS = (0.05, 0.3, 0.1, 0.25, 0.02, 0.15, 0.03, 0.1)
CHI = {
    "plain": (Recipe(1.0, -1, 1.0), MASS),
    "warm": (Recipe(2.0, -1, 1.0), [p**0.5 for p in MASS]),
    "cold": (Recipe(0.5, -1, 1.0), [p**2 for p in MASS]),
    "top three": (Recipe(1.0, 3, 1.0), [p if p >= 0.15 else 0 for p in MASS]),
    "top half": (Recipe(1.0, -1, 0.5), [p if p >= 0.25 else 0 for p in MASS]),
    "both": (Recipe(1.0, 4, 0.95), [p if p >= 0.15 or i == 2 else 0 for i, p in enumerate(MASS)]),
}


@pytest.mark.parametrize("case", CHI)
def test_frequencies_follow_the_distribution(case: str) -> None:
    """Drawn often, tokens come as often as the model says (chi-square, one in a thousand), left-out ones never."""
    recipe, mass = CHI[case]
    count = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(3).random(count))
    drawn, _ = choose(logits_of(MASS).expand(count, -1), uniforms, [recipe] * count)
    found = torch.bincount(drawn, minlength=len(MASS)).double()
    want = torch.tensor(mass, dtype=torch.float64) / sum(mass) * count
    assert not found[want == 0].any()
    some = want > 0
    statistic = float(((found - want)[some].square() / want[some]).sum())
    critical = {1: 10.83, 2: 13.82, 3: 16.27, 7: 24.32}[int(some.sum()) - 1]
    assert statistic < critical


@pytest.mark.parametrize("recipe", [Recipe(1.0, -1, 1.0), Recipe(0.7, 3, 1.0), Recipe(1.0, -1, 0.6)])
def test_extreme_random_numbers_draw_possible_tokens(recipe: Recipe) -> None:
    """Random numbers at the ends of their range never draw a token of no probability."""
    logits = torch.tensor([-math.inf, 0.0, -1.0, -math.inf, 1.0, -math.inf])
    uniforms = torch.tensor([0.0, 1e-300, 1 - 2**-53, 0.5], dtype=torch.float64)
    drawn, _ = choose(logits.expand(4, -1), uniforms, [recipe] * 4)
    assert set(drawn.tolist()) <= {1, 2, 4}


def test_rows_with_settings_of_their_own_are_drawn_as_each_alone() -> None:
    """In one call each row follows its own settings, to the bit."""
    recipes = [Recipe(t, k, p) for t in (0.0, 0.5, 1.0, 1.7) for k in (-1, 1, 3, 99) for p in (1.0, 0.6)]
    random = np.random.default_rng(5)
    logits = torch.from_numpy(random.normal(size=(len(recipes), 17)).astype(np.float32))
    uniforms = torch.from_numpy(random.random(len(recipes)))
    drawn, logp = choose(logits, uniforms, recipes)
    alone = [choose(logits[i : i + 1], uniforms[i : i + 1], [recipe]) for i, recipe in enumerate(recipes)]
    assert drawn.tolist() == [int(token) for token, _ in alone]
    assert len(set(drawn.tolist())) > 5
    torch.testing.assert_close(logp, torch.cat([row for _, row in alone]), rtol=0, atol=0)
    greedy = [recipe.temperature == 0 for recipe in recipes]
    assert drawn[greedy].tolist() == logits[greedy].argmax(-1).tolist()


def test_ties_go_to_the_lower_id() -> None:
    """Among equally likely tokens greedy and top-k keep the lower id."""
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0]])
    for recipe in (Recipe(0.0, -1, 1.0), Recipe(1.0, 1, 1.0)):
        assert choose(logits, torch.tensor([0.999], dtype=torch.float64), [recipe])[0].tolist() == [1]
    uniforms = torch.linspace(0, 0.999, 99, dtype=torch.float64)
    two = choose(logits.expand(99, -1), uniforms, [Recipe(1.0, 2, 1.0)] * 99)[0]
    assert set(two.tolist()) == {1, 2}


def test_top_p_keeps_the_token_that_crosses_the_line() -> None:
    """The kept tokens are the fewest whose mass reaches p: the one that crosses it is kept, the next is not."""
    uniforms = torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64)
    for top_p, kept in ((0.29, {1}), (0.31, {1, 3}), (0.54, {1, 3}), (0.56, {1, 3, 5}), (1.0, set(range(8)))):
        drawn, _ = choose(logits_of(MASS).expand(500, -1), uniforms, [Recipe(1.0, -1, top_p)] * 500)
        assert set(drawn.tolist()) == kept


def stopped(stop: object, count: int = 12) -> tuple[list[int], str]:
    """Return the greedy tokens and the reason under a stop setting."""
    (response,) = run(sample(PROMPT, SamplingParams(max_tokens=count, stop=stop, temperature=0.0)))
    return response.sequences[0].tokens, response.sequences[0].stop_reason


def test_stop_ids_end_the_sequence_and_belong_to_it() -> None:
    """A listed token id stops the sequence, as its last token; the first of several that comes counts."""
    free, reason = stopped([])
    assert (len(free), reason) == (12, "length")
    first = {token: free.index(token) for token in free}
    token = free[4]
    assert stopped([token]) == (free[: first[token] + 1], "stop")
    assert stopped([free[9], token]) == (free[: min(first[free[9]], first[token]) + 1], "stop")
    unused = next(token for token in range(VOCAB) if token not in free)
    assert stopped([unused]) == (free, "length")


def test_a_stop_at_the_last_token_is_a_stop() -> None:
    """A sequence that stops with the last token it may have was stopped, not cut."""
    free, _ = stopped([])
    at = free.index(free[4])
    assert stopped([free[4]], at + 1) == (free[: at + 1], "stop")
    assert stopped([free[4]], at) == (free[:at], "length")


def ending(tmp_path: Path) -> tuple[BaseModel, list[int]]:
    """Return the random model with an end-of-sequence token that it reaches, and its greedy tokens without it."""
    free, _ = stopped([])
    place = tmp_path / "ending"
    shutil.copytree(folder("llama"), place)
    model = plain("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = free[4]
    model.save_pretrained(place)
    return BaseModel(str(place), CPU, torch.float32), free


def test_none_stops_at_the_models_own_end_and_an_empty_list_never(tmp_path: Path) -> None:
    """``stop=None`` is the model's end-of-sequence token; ``[]`` and other stops replace it."""
    model, free = ending(tmp_path)
    assert model.stop_ids == {free[4]}
    want = {None: free[: free.index(free[4]) + 1], (): free}
    for stop, expected in want.items():
        sampler = Sampler(model, 64)
        request = sample(PROMPT, attrs.evolve(GREEDY, stop=stop))
        sampler.admit(request, None)
        assert tokens(finish(sampler)[request].value) == [expected]


@functools.cache
def tiny() -> BaseModel:
    """Return the shipped model, whose tokens are bytes."""
    return BaseModel("tickwork/tiny", CPU, torch.float32)


def written(prompt: Sequence[int], stop: object, seed: int = 3) -> tuple[list[int], str]:
    """Sample from the shipped model."""
    sampler = Sampler(tiny(), 64)
    request = sample(prompt, SamplingParams(max_tokens=40, stop=stop, seed=seed, temperature=1.5))
    sampler.admit(request, None)
    (sequence,) = finish(sampler)[request].value.sequences
    return sequence.tokens, sequence.stop_reason


def test_stop_strings_are_found_across_token_borders() -> None:
    """A string stops the sequence where its last byte is drawn, wherever tokens end; the first to come counts."""
    tokenizer = load_tokenizer("tickwork/tiny")
    prompt = tokenizer.encode("a long text ")
    free, reason = written(prompt, [])
    assert (len(free), reason) == (40, "length")
    text = tokenizer.decode(free)
    shown = text.encode("utf-8", "replace").decode()
    middle, late = shown[9:13], shown[20:23]
    ends = {part: next(n for n in range(1, 41) if part in tokenizer.decode(free[:n])) for part in (middle, late)}
    assert ends[middle] > 4
    assert written(prompt, middle) == (free[: ends[middle]], "stop")
    assert written(prompt, [late]) == (free[: ends[late]], "stop")
    assert written(prompt, [late, middle]) == (free[: min(ends.values())], "stop")
    assert written(prompt, "no such text in here") == (free, "length")


def test_a_stop_string_in_the_prompt_does_not_stop() -> None:
    """Only what is drawn can stop a sequence, not the prompt, nor a string half in each."""
    tokenizer = load_tokenizer("tickwork/tiny")
    prompt = tokenizer.encode("a long text ")
    free, _ = written(prompt, [])
    first = tokenizer.decode(free[:1])
    assert "a long text" not in tokenizer.decode(free)
    assert written(prompt, ["a long text", "text " + first]) == (free, "length")


def test_stop_strings_need_a_tokenizer() -> None:
    """Stop strings on a model without a tokenizer fail that request by name; nothing else is harmed."""
    sampler = Sampler(base("llama"), 64)
    fine = sample(PROMPT, FREE)
    sampler.admit(fine, None)
    with pytest.raises(Exception, match="no tokenizer"):
        sampler.admit(sample(PROMPT, attrs.evolve(FREE, stop="x")), None)
    assert finish(sampler)[fine].error is None


def plain_prompt_logprobs(prompt: Sequence[int]) -> torch.Tensor:
    """Return the logprobs of all but the first prompt token, of the plain model."""
    with torch.no_grad():
        logp = plain_logits(shared("llama"), prompt).log_softmax(-1)
    return logp[:-1]


@pytest.mark.parametrize("max_tokens", [64, 7, 1])
@pytest.mark.parametrize("last_n", [None, 1, 4, 20, 99])
def test_prompt_logprobs_are_the_plain_models(max_tokens: int, last_n: int | None) -> None:
    """Each prompt token after the first has its logprob and rank, whole or the last n, however prefill is cut."""
    (prompt,) = prompts((20,))
    ask = sample(
        prompt,
        attrs.evolve(FREE, max_tokens=1, temperature=0.3),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        prompt_logprobs_last_n=last_n,
    )
    (response,) = run(ask, max_tokens=max_tokens)
    logp = plain_prompt_logprobs(prompt)
    first = max(1, 0 if last_n is None else 20 - last_n)
    assert response.prompt_logprobs[:first] == [None] * first
    assert response.topk_prompt_logprobs[:first] == [None] * first
    want = logp[range(19), prompt[1:]].tolist()[first - 1 :]
    np.testing.assert_allclose(response.prompt_logprobs[first:], want, rtol=0, atol=2e-5)
    values, ids = logp.topk(3)
    for row, ranked in enumerate(response.topk_prompt_logprobs[first:], start=first - 1):
        assert [token for token, _ in ranked] == ids[row].tolist()
        np.testing.assert_allclose([value for _, value in ranked], values[row].tolist(), rtol=0, atol=2e-5)


def test_scores_and_ranks_come_only_when_asked_for() -> None:
    """Prompt logprobs and their ranked tokens are given independently of each other."""
    scored, ranked = run(
        sample(PROMPT, FREE, include_prompt_logprobs=True), sample(PROMPT, FREE, topk_prompt_logprobs=2)
    )
    assert scored.topk_prompt_logprobs is None
    assert ranked.prompt_logprobs is None
    assert len(ranked.topk_prompt_logprobs) == len(PROMPT)


def test_prompt_logprobs_are_those_of_training() -> None:
    """Sampling from a training model scores a prompt as ``forward`` does, to 1e-5, with the adapter's head."""
    bench = Bench()
    bench.create("run")
    opened = Request("step", "sampler", OpenSampler("sampler", model_id="run"))
    bench.one(opened)
    (row,) = tokens_of((25,))
    weights = np.zeros(24, dtype=np.float32)
    forward = bench.one(train("run", [datum(row[:-1], row[1:], weights=weights)], backward=False))
    scored = bench.one(sample(row, attrs.evolve(FREE, max_tokens=1), include_prompt_logprobs=True))
    want = forward.loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(scored.prompt_logprobs[1:], want, rtol=0, atol=1e-5)
    bare = plain_prompt_logprobs(row)[range(24), row[1:]].numpy()
    assert np.abs(want - bare).max() > 0.01


def test_drawn_logprobs_are_those_of_training() -> None:
    """The logprobs of drawn tokens, decoded one by one, are what ``forward`` gives for the whole sequence."""
    bench = Bench()
    bench.create("run")
    bench.one(Request("step", "sampler", OpenSampler("sampler", model_id="run")))
    (sequence,) = bench.one(sample(PROMPT, attrs.evolve(FREE, max_tokens=40))).sequences
    whole = np.array([*PROMPT, *sequence.tokens])
    answer = bench.one(train("run", [datum(whole[:-1], whole[1:], weights=np.zeros(44, np.float32))], backward=False))
    want = answer.loss_fn_outputs[0]["logprobs"].to_numpy()[len(PROMPT) - 1 :]
    np.testing.assert_allclose(sequence.logprobs, want, rtol=0, atol=1e-5)


def test_adapters_in_one_batch_equal_each_alone() -> None:
    """Requests of several adapters and the bare base, sampled together, have the tokens they have alone."""
    adapters = [None, *[adapter_of(base("llama"), LoraConfig(rank=rank), rank) for rank in (2, 4, 8)]]
    alone = [run(sample(PROMPT, FREE), adapter=adapter)[0] for adapter in adapters]
    assert len({tuple(tokens(response)[0]) for response in alone}) > 1
    sampler = Sampler(base("llama"), 64)
    requests = [sample(PROMPT, FREE) for _ in adapters]
    for request, adapter in zip(requests, adapters, strict=True):
        sampler.admit(request, adapter)
    outcomes = finish(sampler)
    for request, want in zip(requests, alone, strict=True):
        got = outcomes[request].value
        assert tokens(got) == tokens(want)
        np.testing.assert_allclose(got.sequences[0].logprobs, want.sequences[0].logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("max_tokens", [1, 3, 16])
def test_small_forwards_give_the_same_tokens(max_tokens: int) -> None:
    """Prefill in small chunks beside decoding neighbours changes no token."""
    many = prompts((30, 2, 17, 41))
    ask = lambda: [sample(p, FREE) for p in many]  # noqa: E731
    want = [tokens(response) for response in run(*ask(), max_tokens=4096)]
    assert [tokens(response) for response in run(*ask(), max_tokens=max_tokens)] == want


def test_a_cancelled_request_leaves_and_the_others_go_on() -> None:
    """Cancelling ends a request with a named error at the next step; its neighbours' tokens stay the same."""
    sampler = Sampler(base("llama"), 64)
    stays, goes, waits = (sample(PROMPT, attrs.evolve(FREE, max_tokens=n)) for n in (12, 60, 60))
    for request in (stays, goes):
        sampler.admit(request, None)
    assert sampler.step() == []
    sampler.admit(waits, None)
    assert goes.future.cancel()
    assert waits.future.cancel()
    outcomes = {outcome.request: outcome for outcome in sampler.step()}
    assert set(outcomes) == {goes, waits}
    assert all(isinstance(outcome.error, RequestCancelledError) for outcome in outcomes.values())
    assert tokens(finish(sampler)[stays].value) == tokens(run(sample(PROMPT, FREE))[0])
    assert not sampler.busy


def test_without_max_tokens_the_context_is_filled() -> None:
    """``max_tokens=None`` draws until the model's context is full."""
    (response,) = run(sample(PROMPT, attrs.evolve(FREE, max_tokens=None)))
    assert len(response.sequences[0].tokens) == CONTEXT - len(PROMPT)
    assert response.sequences[0].stop_reason == "length"


BAD: dict[str, tuple[Request, str]] = {
    "empty prompt": (sample(()), "prompt"),
    "token out of range": (sample((1, VOCAB)), "prompt"),
    "prompt fills the context": (sample([1] * CONTEXT), "sampling_params.max_tokens"),
    "too many tokens": (sample(PROMPT, attrs.evolve(FREE, max_tokens=CONTEXT)), "sampling_params.max_tokens"),
    "no tokens": (sample(PROMPT, attrs.evolve(FREE, max_tokens=0)), "sampling_params.max_tokens"),
    "no samples": (sample(PROMPT, num_samples=0), "num_samples"),
    "negative temperature": (sample(PROMPT, attrs.evolve(FREE, temperature=-1.0)), "sampling_params.temperature"),
    "infinite temperature": (sample(PROMPT, attrs.evolve(FREE, temperature=math.inf)), "sampling_params.temperature"),
    "top_k of 0": (sample(PROMPT, attrs.evolve(FREE, top_k=0)), "sampling_params.top_k"),
    "top_p of 0": (sample(PROMPT, attrs.evolve(FREE, top_p=0.0)), "sampling_params.top_p"),
    "top_p above 1": (sample(PROMPT, attrs.evolve(FREE, top_p=1.1)), "sampling_params.top_p"),
    "seed": (sample(PROMPT, attrs.evolve(FREE, seed=-1)), "sampling_params.seed"),
    "empty stop string": (sample(PROMPT, attrs.evolve(FREE, stop="")), "sampling_params.stop"),
    "stop id": (sample(PROMPT, attrs.evolve(FREE, stop=[VOCAB])), "sampling_params.stop"),
    "mixed stops": (sample(PROMPT, attrs.evolve(FREE, stop=["a", 1])), "sampling_params.stop"),
    "too many ranks": (sample(PROMPT, topk_sample_logprobs=VOCAB + 1), "topk_sample_logprobs"),
    "last n": (sample(PROMPT, include_prompt_logprobs=True, prompt_logprobs_last_n=0), "prompt_logprobs_last_n"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_honoured_is_refused_by_name(case: str) -> None:
    """A setting out of range is refused at admission, with the name of its field."""
    request, field = BAD[case]
    sampler = Sampler(base("llama"), 64)
    with pytest.raises(InvalidRequestError) as caught:
        sampler.admit(request, None)
    assert caught.value.field == field
    assert not sampler.busy
