"""The official SDK samples from a served model: every method of its SamplingClient, over a socket."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tinker
from tinker import types

from served import TINY, TOKENS, datum, sdk

PROMPT = types.ModelInput.from_ints(TOKENS)
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def service(server_url):
    with sdk(server_url) as client:
        yield client


@pytest.fixture(scope="module")
def trained(service):
    client = service.create_lora_training_client(TINY, rank=4, seed=1).result(60)
    for _ in range(5):
        client.forward_backward([datum()], "cross_entropy").result(60)
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result(60)
    return client


@pytest.fixture(scope="module")
def sampler(trained):
    return trained.save_weights_and_get_sampling_client().result(60)


def test_samples_have_their_logprobs_and_names(sampler):
    params = types.SamplingParams(max_tokens=5, seed=3, temperature=0.7, stop=[])
    out = sampler.sample(PROMPT, 3, params, topk_sample_logprobs=2).result(60)
    assert len({seq.sequence_id for seq in out.sequences}) == 3
    for seq in out.sequences:
        assert len(seq.tokens) == len(seq.logprobs) == 5
        assert seq.stop_reason == "length"
        assert [len(row) for row in seq.topk_logprobs] == [2] * 5
        best = [row[0][1] for row in seq.topk_logprobs]
        assert all(lp <= top + 1e-5 for lp, top in zip(seq.logprobs, best, strict=True))
    again = sampler.sample(PROMPT, 3, params).result(60)
    assert [seq.tokens for seq in again.sequences] == [seq.tokens for seq in out.sequences]


def test_greedy_follows_the_most_likely(sampler):
    out = sampler.sample(PROMPT, 1, GREEDY, topk_sample_logprobs=1).result(60)
    seq = out.sequences[0]
    assert seq.tokens == [row[0][0] for row in seq.topk_logprobs]


def test_stopping(sampler):
    free = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])).result(60)
    third = free.sequences[0].tokens[2]
    cut = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=8, temperature=0.0, stop=[third])).result(60)
    assert cut.sequences[0].stop_reason == "stop"
    assert cut.sequences[0].tokens == free.sequences[0].tokens[: free.sequences[0].tokens.index(third) + 1]


def test_trainer_and_sampler_agree(trained, sampler):
    by_trainer = trained.forward([datum()], "cross_entropy").result(60).loss_fn_outputs[0]["logprobs"].to_numpy()
    by_sampler = sampler.compute_logprobs(PROMPT).result(60)
    assert by_sampler[0] is None
    np.testing.assert_allclose(by_sampler[1:], by_trainer, atol=1e-5)


def test_prompt_scores(sampler):
    out = sampler.sample(PROMPT, 1, GREEDY, include_prompt_logprobs=True, topk_prompt_logprobs=3).result(60)
    assert len(out.prompt_logprobs) == len(TOKENS)
    assert out.prompt_logprobs[0] is None and out.topk_prompt_logprobs[0] is None
    assert all(len(row) == 3 for row in out.topk_prompt_logprobs[1:])
    last = sampler.sample(PROMPT, 1, GREEDY, include_prompt_logprobs=True, prompt_logprobs_last_n=2).result(60)
    assert last.prompt_logprobs[:-2] == [None] * (len(TOKENS) - 2)
    assert last.prompt_logprobs[-2:] == pytest.approx(out.prompt_logprobs[-2:], abs=1e-5)
    assert sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result(60) == last.prompt_logprobs


def test_scores_of_named_tokens(sampler):
    plain = sampler.compute_logprobs(PROMPT).result(60)
    cells = np.full((len(TOKENS) - 1, 2), -1, dtype=np.int64)
    cells[:, 0], cells[3, 1] = TOKENS[1:], 5
    out = sampler.sample(PROMPT, 1, GREEDY, target_prompt_logprobs=types.TensorData.from_numpy(cells)).result(60)
    found = out.target_prompt_logprobs.to_numpy()
    assert found.shape == cells.shape
    np.testing.assert_allclose(found[:, 0], plain[1:], atol=1e-5)
    assert (found[[0, 1, 2, 4], 1] == 0).all() and found[3, 1] < 0


def test_other_tokens_than_the_prompt_has(sampler):
    out = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=1, seed=1), prompt_alt_tokens_k=4).result(60)
    tokens, logprobs = out.prompt_alt_tokens.tokens.to_numpy(), out.prompt_alt_tokens.logprobs.to_numpy()
    assert tokens.shape == logprobs.shape == (len(TOKENS) - 1, 4)
    checked = sampler.sample(PROMPT, 1, GREEDY, target_prompt_logprobs=out.prompt_alt_tokens.tokens).result(60)
    np.testing.assert_allclose(checked.target_prompt_logprobs.to_numpy(), logprobs, atol=1e-5)


def test_named_checkpoints_and_base_models(service, trained, sampler):
    path = trained.save_weights_for_sampler("named", ttl_seconds=600, user_metadata={"a": "b"}).result(60).path
    assert path == f"tinker://{trained.model_id}/sampler_weights/named"
    for other in (service.create_sampling_client(path).result(60), trained.create_sampling_client(path).result(60)):
        np.testing.assert_allclose(
            other.compute_logprobs(PROMPT).result(60)[1:], sampler.compute_logprobs(PROMPT).result(60)[1:], atol=1e-5
        )
    by_path = service.create_sampling_client(path).result(60)
    assert by_path.get_tokenizer().encode("a"), "its base model is named so that this machine finds it"
    base = service.create_sampling_client(base_model=TINY).result(60)
    assert base.get_base_model() == TINY
    assert base.compute_logprobs(PROMPT).result(60) != sampler.compute_logprobs(PROMPT).result(60)


def test_snapshots_stay_and_inflight_follows(service):
    client = service.create_lora_training_client(TINY, rank=4, seed=2).result(60)
    snapshot = client.save_weights_and_get_sampling_client().result(60)
    live = client.save_weights_and_get_sampling_client(kind="inflight").result(60)
    before = snapshot.compute_logprobs(PROMPT).result(60)
    assert live.compute_logprobs(PROMPT).result(60) == before
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-1)).result(60)
    assert live.compute_logprobs(PROMPT).result(60) == before, "weights are published by a save, not by a step"
    later = client.save_weights_and_get_sampling_client(kind="inflight").result(60)
    assert snapshot.compute_logprobs(PROMPT).result(60) == before
    assert live.compute_logprobs(PROMPT).result(60) == later.compute_logprobs(PROMPT).result(60) != before


def test_handles_and_pickles_reach_the_same_weights(server_url, sampler, monkeypatch):
    wanted = sampler.compute_logprobs(PROMPT).result(60)
    copy = pickle.loads(pickle.dumps(sampler))
    assert copy.compute_logprobs(PROMPT).result(60) == wanted
    monkeypatch.setenv("TINKER_BASE_URL", server_url)
    by_handle = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key="tml-test")
    assert by_handle.compute_logprobs(PROMPT).result(60) == wanted


def test_many_at_once(sampler):
    futures = [sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2, seed=i)) for i in range(100)]
    outs = [future.result(60) for future in futures]
    assert all(len(out.sequences[0].tokens) <= 2 for out in outs)
    assert len({tuple(out.sequences[0].tokens) for out in outs}) > 5


@pytest.mark.parametrize(
    ("prompt", "params", "name"),
    [
        ([], {}, "prompt"),
        ([10**6], {}, "prompt"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_k": 0}, "top_k"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"max_tokens": 10**9}, "max_tokens"),
    ],
)
def test_bad_samples_are_refused_by_name(sampler, prompt, params, name):
    with pytest.raises((tinker.RequestFailedError, tinker.APIStatusError), match=name):
        sampler.sample(types.ModelInput.from_ints(prompt), 1, types.SamplingParams(**params)).result(60)


def test_stability_records_are_refused_by_name(service):
    client = service.create_sampling_client(base_model=TINY, record_stability_info=True).result(60)
    with pytest.raises(tinker.APIStatusError, match="stable_reinforce"):
        client.sample(PROMPT, 1, GREEDY).result(60)
