"""Faults found in other servers, each tried on ours."""

from __future__ import annotations

import math
import time

import httpx
import pytest
import tinker
from tinker import types

from served import TINY, TOKENS, Raw, datum, sdk
from tickwork.server import Settings, serving
from tickwork.server.keys import Keys

STEP = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def service(server_url):
    with sdk(server_url) as client:
        yield client


@pytest.fixture
def client(service):
    return service.create_lora_training_client(TINY, rank=4, seed=1).result(60)


def test_a_target_out_of_range_does_not_end_the_run(client):
    out = datum()
    bad = types.Datum(
        model_input=out.model_input, loss_fn_inputs={"target_tokens": [10**5] * 10, "weights": [1.0] * 10}
    )
    with pytest.raises(tinker.RequestFailedError, match=r"data\[0\]"):
        client.forward_backward([bad], "cross_entropy").result(60)
    for _ in range(3):
        assert client.forward_backward([out], "cross_entropy").result(60).metrics["loss:sum"] > 0
        client.optim_step(STEP).result(60)


def test_negative_targets_and_tokens_are_refused(client):
    for tokens, targets in (([-1] * 10, [1] * 10), ([1] * 10, [-1] * 10), ([1] * 10, [-100] * 10)):
        bad = types.Datum(types.ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": [1.0] * 10})
        with pytest.raises((tinker.RequestFailedError, ValueError, OverflowError)):
            client.forward([bad], "cross_entropy").result(60)


def test_a_step_does_not_get_slower_with_history(client):
    """Not a timed test: what is kept per step is bounded, so that there is nothing to grow with."""

    def step():
        client.forward_backward([datum()], "cross_entropy")
        client.optim_step(STEP).result(60)

    def median(count):
        taken = []
        for _ in range(count):
            begun = time.perf_counter()
            step()
            taken.append(time.perf_counter() - begun)
        return sorted(taken)[count // 2]

    median(10)
    early = median(30)
    for _ in range(100):
        step()
    assert median(30) < 3 * early + 0.05


def test_a_rank_past_all_bounds_is_refused(service):
    with pytest.raises((tinker.RequestFailedError, tinker.APIStatusError), match="rank"):
        service.create_lora_training_client(TINY, rank=10**9).result(60)


def test_the_rank_asked_for_is_the_rank_made(service):
    for rank in (1, 3, 64):
        assert service.create_lora_training_client(TINY, rank=rank).result(60).get_info().lora_rank == rank


def test_tokens_and_lengths_that_do_not_fit_are_refused(client):
    for bad in (
        datum([1, 2, 10**5]),
        types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [1, 2], "weights": [1.0, 1.0]}),
        types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [1, 2, 3], "weights": [1.0, 1.0]}),
        types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"weights": [1.0] * 3}),
        types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [1, 2, 3], "surprise": _floats(3)}),
    ):
        with pytest.raises(tinker.RequestFailedError) as failed:
            client.forward([bad], "cross_entropy").result(60)
        assert failed.value.category == "user"


def _floats(count):
    return types.TensorData(data=[1.0] * count, dtype="float32", shape=[count])


def test_results_are_numbers(client):
    out = client.forward_backward([datum()], "cross_entropy").result(60)
    assert all(map(math.isfinite, out.loss_fn_outputs[0]["logprobs"].tolist()))


def test_an_unknown_base_model_is_refused(service):
    with pytest.raises((tinker.RequestFailedError, tinker.APIStatusError), match="nobody/nothing"):
        service.create_lora_training_client("nobody/nothing").result(60)
    with pytest.raises((tinker.RequestFailedError, tinker.APIStatusError), match="nobody/nothing"):
        service.create_sampling_client(base_model="nobody/nothing").result(60).sample(
            types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)
        ).result(60)


def test_as_many_logprobs_as_tokens(service):
    sampler = service.create_sampling_client(base_model=TINY).result(60)
    assert len(sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result(60)) == len(TOKENS)


def test_sampler_paths_parse(client):
    path = client.save_weights_for_sampler("parsed").result(60).path
    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    assert (parsed.training_run_id, parsed.checkpoint_type) == (client.model_id, "sampler")


def test_models_come_and_go_without_end(server_url):
    with Raw(server_url) as raw:
        for _ in range(80):
            session = raw.session()
            raw.model(session)
            raw.ok(f"sessions/{session}/finish", {"reason": {"type": "success"}})


def test_no_key_no_entry():
    with serving(Settings(models=(TINY,), port=0, keys=Keys(["tml-secret"]))) as url:
        answer = httpx.post(f"{url}/api/v1/create_session", json={"tags": [], "sdk_version": "x", "user_metadata": {}})
        assert answer.status_code == 401
        with pytest.raises(tinker.AuthenticationError), sdk(url, "tml-wrong") as service:
            service.create_lora_training_client(TINY).result(60)


def test_a_restart_is_told_and_never_hidden(tmp_path):
    """Another server answers 200 after its restart and has lost steps; ours, without a journal, says so."""
    settings = Settings(models=(TINY,), store=tmp_path, port=0, journal=None)
    with serving(settings) as url, Raw(url) as raw:
        model = raw.model()
        raw.result(raw.optim(model, 1).json()["request_id"])
    with serving(settings) as url, Raw(url) as raw:
        assert raw.optim(model, 2).status_code == 404
