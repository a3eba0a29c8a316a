"""Every option of sampling, and what samples say of themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from tickwork.conformance.probe import Verdict, differs, probe, refused, require, same
from tickwork.conformance.target import TOKENS, Target

VERDICT = Verdict.IGNORED


@probe
def a_logprob_for_each_token(target: Target) -> str:
    """Tokens and logprobs go together, as many as asked for."""
    out = target.sample(target.sampler()[1], 3, seed=1, temperature=1.0)
    require(len(out.sequences) == 3, f"asked for 3 samples, got {len(out.sequences)}")
    counts = [(len(seq.tokens), len(seq.logprobs or [])) for seq in out.sequences]
    require(all(tokens == scores for tokens, scores in counts), f"(tokens, logprobs): {counts}")
    require(len({tuple(seq.tokens) for seq in out.sequences}) > 1, "3 samples at temperature 1 are the same")
    return f"(tokens, logprobs): {counts}"


@probe
def max_tokens(target: Target) -> str:
    """Where nothing stops it, a sample has as many tokens as allowed."""
    seq = target.sample(target.sampler()[1], max_tokens=5).sequences[0]
    require(len(seq.tokens) == 5 and seq.stop_reason == "length", f"{len(seq.tokens)} tokens, {seq.stop_reason!r}")
    return "5 of 5, 'length'"


@probe
def temperature_0_is_greedy(target: Target) -> str:
    """At temperature 0 each token is the most likely one."""
    out = target.sample(target.sampler()[1], temperature=0.0, more={"topk_sample_logprobs": 1})
    best = [row[0][0] for row in out.sequences[0].topk_logprobs]
    require(best == list(out.sequences[0].tokens), "a token is not the most likely one", VERDICT)
    return "each token is the most likely one"


@probe
def logprobs_are_of_the_temperature(target: Target) -> str:
    """Sampled logprobs are those of the distribution divided by the temperature."""
    sampler = target.sampler()[1]
    gaps = []
    for temperature in (1.0, 0.5):
        out = target.sample(sampler, temperature=temperature, max_tokens=1, more={"topk_sample_logprobs": 4})
        gaps.append(dict(out.sequences[0].topk_logprobs[0]))
    shared = sorted(set(gaps[0]) & set(gaps[1]))
    require(len(shared) >= 2, "the most likely tokens differ between temperatures")
    plain, cold = (np.array([gap[token] for token in shared]) for gap in gaps)
    differs(plain - plain[0], cold - cold[0], "temperature 0.5 and 1 report the same logprobs")
    same(cold - cold[0], (plain - plain[0]) / 0.5, "logprobs at temperature 0.5", tolerance=1e-3)
    return "log p(i) - log p(j) is that at 1, divided by it"


@probe
def seeds_are_honoured(target: Target) -> str:
    """The same seed draws the same tokens, another others."""
    sampler = target.sampler()[1]
    one, again, other = (target.sample(sampler, seed=seed, max_tokens=24) for seed in (7, 7, 8))
    same(one.sequences[0].tokens, again.sequences[0].tokens, "seed 7 twice")
    differs(one.sequences[0].tokens, other.sequences[0].tokens, "seeds 7 and 8 draw the same")
    return "same seed, same tokens; another seed, others"


def _is_greedy(target: Target, what: str, **params: Any) -> str:
    sampler = target.sampler()[1]
    greedy = target.sample(sampler, temperature=0.0, max_tokens=12).sequences[0].tokens
    for seed in range(3):
        drawn = target.sample(sampler, temperature=1.0, seed=seed, max_tokens=12, **params).sequences[0].tokens
        require(list(drawn) == list(greedy), f"{what} draws other tokens than the most likely", VERDICT)
    return f"{what} leaves the most likely token only"


@probe
def top_k(target: Target) -> str:
    """top_k 1 leaves the most likely token only."""
    return _is_greedy(target, "top_k 1", top_k=1)


@probe
def top_p(target: Target) -> str:
    """A tiny top_p leaves the most likely token only."""
    return _is_greedy(target, "top_p 1e-6", top_p=1e-6)


@probe
def stop_tokens(target: Target) -> str:
    """A token id stops a sample, and is its last token."""
    sampler = target.sampler()[1]
    free = list(target.sample(sampler, temperature=0.0).sequences[0].tokens)
    cut = target.sample(sampler, temperature=0.0, stop=[free[3]]).sequences[0]
    wanted = free[: free.index(free[3]) + 1]
    require(list(cut.tokens) == wanted, f"stopped at {list(cut.tokens)}, wanted {wanted}", VERDICT)
    require(cut.stop_reason == "stop", f"stop_reason is {cut.stop_reason!r}")
    return "stops there, the token included"


@probe
def stop_strings(target: Target) -> str:
    """A string stops a sample."""
    client, sampler = target.sampler()
    try:
        tokenizer = client.get_tokenizer()
    except Exception as error:
        return f"SKIPPED: no tokenizer here ({type(error).__name__})"
    free = list(target.sample(sampler, temperature=0.0, max_tokens=12).sequences[0].tokens)
    text = tokenizer.decode(free)
    if len(text) < 2:
        return "SKIPPED: the sample has no text"
    cut = target.sample(sampler, temperature=0.0, max_tokens=12, stop=[text[:2]]).sequences[0]
    require(len(cut.tokens) < len(free) and cut.stop_reason == "stop", f"{text[:2]!r} did not stop it", VERDICT)
    return f"{text[:2]!r} stops it"


@probe
def prompt_logprobs(target: Target) -> str:
    """One for each prompt token, none for the first, and those of the trainer."""
    client, sampler = target.sampler()
    found = target.wait(sampler.compute_logprobs(target.types.ModelInput.from_ints(list(TOKENS))))
    require(len(found) == len(TOKENS), f"{len(TOKENS)} prompt tokens, {len(found)} logprobs")
    require(found[0] is None, "the first token has a logprob")
    [trained] = target.look(client, [target.datum()])[1]
    same(found[1:], trained, "sampler against trainer", tolerance=5e-3)
    worst = float(np.abs(np.array(found[1:]) - trained).max())
    return f"as the trainer's, to {worst:.1e}"


@probe
def samples_agree_with_the_trainer(target: Target) -> str:
    """A sample's logprobs are what the trainer gives its tokens."""
    client, sampler = target.sampler()
    seq = target.sample(sampler, seed=2, max_tokens=12).sequences[0]
    [trained] = target.look(client, [target.datum([*TOKENS, *seq.tokens])])[1]
    same(seq.logprobs, trained[len(TOKENS) - 1 :], "sampler against trainer", tolerance=5e-3)
    return "as the trainer's"


@probe
def top_prompt_logprobs(target: Target) -> str:
    """The most likely tokens at each prompt position."""
    more = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 3}
    out = target.sample(target.sampler()[1], max_tokens=1, more=more)
    require(out.topk_prompt_logprobs is not None, "none returned", VERDICT)
    require(len(out.topk_prompt_logprobs) == len(TOKENS), f"{len(out.topk_prompt_logprobs)} rows")
    require(all(len(row) == 3 for row in out.topk_prompt_logprobs[1:]), "not 3 in each row")
    return "3 at each position"


@probe
def last_prompt_logprobs(target: Target) -> str:
    """Only the last of the prompt is scored, if so asked."""
    more = {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 2}
    sampler = target.sampler()[1]
    found = target.checked_sample("prompt_logprobs_last_n", sampler, max_tokens=1, more=more).prompt_logprobs
    scored = [index for index, score in enumerate(found) if score is not None]
    require(scored == [len(TOKENS) - 2, len(TOKENS) - 1], f"scored positions: {scored}", VERDICT)
    return "the last 2"


@probe
def named_prompt_logprobs(target: Target) -> str:
    """Tokens other than the prompt's can be scored in its place."""
    sampler = target.sampler()[1]
    cells = np.full((len(TOKENS) - 1, 2), -1, dtype=np.int64)
    cells[:, 0] = TOKENS[1:]
    asked = target.types.TensorData.from_numpy(cells)
    out = target.sample(sampler, max_tokens=1, more={"target_prompt_logprobs": asked, "include_prompt_logprobs": True})
    require(out.target_prompt_logprobs is not None, "none returned", VERDICT)
    found = out.target_prompt_logprobs.to_numpy()
    same(found[:, 0], out.prompt_logprobs[1:], "the prompt's own tokens, named", tolerance=1e-3)
    same(found[:, 1], np.zeros(len(TOKENS) - 1), "cells that ask for nothing")
    return "as the prompt's own"


@probe
def alternative_prompt_tokens(target: Target) -> str:
    """Tokens can be drawn beside the prompt's."""
    sampler, more = target.sampler()[1], {"prompt_alt_tokens_k": 3}
    out = target.checked_sample("prompt_alt_tokens_k", sampler, max_tokens=1, seed=1, more=more)
    shape = out.prompt_alt_tokens.tokens.to_numpy().shape
    require(shape == (len(TOKENS) - 1, 3), f"shape {shape}")
    return "3 at each position"


@probe
def snapshots_stay(target: Target) -> str:
    """A sampler's weights do not follow training."""
    client, sampler = target.sampler()
    prompt = target.types.ModelInput.from_ints(list(TOKENS))
    before = target.wait(sampler.compute_logprobs(prompt))[1:]
    target.learn(client, [target.datum()])
    target.step(client, learning_rate=0.5)
    same(target.wait(sampler.compute_logprobs(prompt))[1:], before, "a snapshot after a step", tolerance=1e-4)
    later = target.wait(client.save_weights_and_get_sampling_client())
    differs(target.wait(later.compute_logprobs(prompt))[1:], before, "a later snapshot equals the first")
    return "a step changes only later ones"


@probe
def samples_out_of_range_are_refused(target: Target) -> str:
    """Nonsense is not drawn with."""
    sampler = target.sampler()[1]
    for wrong in ({"temperature": -1.0}, {"top_p": 1.5}, {"max_tokens": -5}):
        with refused(target, str(wrong)):
            target.sample(sampler, **wrong)
    with refused(target, "a token past the vocabulary"):
        target.sample(sampler, prompt=[1, 10_000_000])
    return "refused"
