"""The facts of the wire that other servers get wrong, one test each; and the order of numbered requests."""

from __future__ import annotations

import random

import httpx
import pytest
import tinker
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from served import KEY, PROTOBUF, TINY, TOKENS, VERSION, Raw, datum, pass_body, sdk
from tickwork.server import Settings, serving
from tickwork.server.keys import Keys


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    settings = Settings(models=(TINY,), store=tmp_path_factory.mktemp("facts"), port=0, poll_seconds=0.3, gap_seconds=2)
    with serving(settings) as url:
        yield url


@pytest.fixture(scope="module")
def raw(url):
    with Raw(url) as raw:
        yield raw


def passed(raw, promise):
    while (answer := raw.poll(promise["request_id"], proto=True)).status_code == 408:
        pass
    assert answer.headers["content-type"] == PROTOBUF, answer.text
    return deserialize_forward_backward_output(answer.content)


def asample(raw, session, number=0, seq_id=0, **more):
    made = raw.ok(
        "create_sampling_session", {"session_id": session, "sampling_session_seq_id": number, "base_model": TINY}
    )
    name = made["sampling_session_id"]
    prompt = {"chunks": [{"tokens": TOKENS, "type": "encoded_text"}]}
    ask = {
        "prompt": prompt,
        "sampling_params": {"max_tokens": 3, "seed": 1},
        "sampling_session_id": name,
        "seq_id": seq_id,
    }
    return raw.ok("asample", {**ask, **more})


def test_1_passes_and_samples_are_protobuf(raw):
    model = raw.model()
    out = passed(raw, raw.forward_backward(model, 1, [datum()]).json())
    assert out.metrics["loss:sum"] > 0
    promise = asample(raw, raw.session())
    while (answer := raw.poll(promise["request_id"], proto=True)).status_code == 408:
        pass
    assert answer.headers["content-type"] == PROTOBUF
    assert len(deserialize_sample_response(answer.content).sequences[0].tokens) == 3


def test_2_model_ids_are_those_that_the_client_computes(raw):
    session = raw.session()
    assert raw.model(session, 3) == f"{session}:train:3"
    assert raw.model(session, 0) == f"{session}:train:0"


@pytest.mark.parametrize("seed", range(5))
def test_3_early_requests_wait_for_their_turn(raw, seed):
    order = list(range(1, 9))
    random.Random(seed).shuffle(order)

    def run(order):
        model = raw.model()
        promises = {}
        for seq_id in order:
            sent = (
                raw.optim(model, seq_id, learning_rate=1e-2)
                if seq_id % 2 == 0
                else raw.forward_backward(model, seq_id, [datum()])
            )
            assert sent.status_code == 200
            promises[seq_id] = sent.json()
        return [passed(raw, promises[seq_id]).metrics["loss:sum"] for seq_id in (1, 3, 5, 7)]

    shuffled = run(order)
    assert shuffled == pytest.approx(run(sorted(order)), rel=1e-6)
    assert shuffled[0] > shuffled[1] > shuffled[2] > shuffled[3], "each step acts on the pass after it"


def test_4_what_is_refused_uses_its_number_up(raw):
    model = raw.model()
    wrong = [
        raw.post("optim_step", {"model_id": model, "seq_id": 1, "adam_params": {"learning_rate": "fast"}}),
        raw.post("optim_step", {"model_id": model, "seq_id": 2, "adam_params": {}, "extra": 1}),
        raw.raw_pass(pass_body(model, 3, [datum()], "no_such_loss")),
        raw.raw_pass(pass_body(model, 4, [datum()])[:-3]),
        raw.post("save_weights", {"model_id": model, "seq_id": 5}),
        raw.post("load_weights", {"model_id": model, "seq_id": 6, "path": "tinker://x/weights/y", "optimizer": False}),
    ]
    for sent in wrong[:3] + wrong[4:]:
        result = raw.result(sent.json()["request_id"])
        assert result["category"] == "user", result
    # A damaged body need not name its number; then the number is given up after a while.
    assert wrong[3].status_code in (200, 422)
    assert passed(raw, raw.forward_backward(model, 7, [datum()]).json()).metrics["loss:sum"] > 0


def test_5_polls_are_held(raw, url):
    model = raw.model()
    held = raw.optim(model, 2).json()["request_id"]
    answer = raw.poll(held)
    assert answer.status_code == 408
    assert answer.elapsed.total_seconds() >= 0.25
    assert answer.json()["queue_state"] == "active"
    raw.optim(model, 1)
    assert "error" not in raw.result(held)


def test_6_metrics_have_one_colon(raw):
    model = raw.model()
    out = passed(raw, raw.forward_backward(model, 1, [datum()]).json())
    assert out.metrics
    assert all(key.count(":") == 1 for key in out.metrics)


def test_7_a_conflict_is_never_told_by_409(raw):
    model = raw.model()
    for seq_id in (1, 2):
        sent = raw.post("save_weights", {"model_id": model, "seq_id": seq_id, "path": "same"})
        assert sent.status_code == 200
        result = raw.result(sent.json()["request_id"])
    assert result["category"] == "user"
    path = f"training_runs/{model}/checkpoints/weights/same"
    assert [raw.http.post(f"{path}/publish").status_code for _ in range(2)] == [204, 204]


def test_8_samples_are_named_at_once(raw):
    promise = asample(raw, raw.session(), num_samples=3)
    assert len(set(promise["sample_sequence_ids"])) == 3
    while (answer := raw.poll(promise["request_id"], proto=True)).status_code == 408:
        pass
    assert len(deserialize_sample_response(answer.content).sequences) == 3


def test_9_keys_go_by_their_header():
    with serving(Settings(models=(TINY,), port=0, keys=Keys(["tml-mine"]))) as url:
        ask = {"url": f"{url}/api/v1/client/config", "json": VERSION}
        assert httpx.post(**ask, headers={"X-API-Key": "tml-mine"}).status_code == 200
        assert httpx.post(**ask, headers={"Authorization": "Bearer tml-mine"}).status_code == 401


def test_10_both_ways_of_waiting_work(url):
    async def main():
        service = tinker.ServiceClient(base_url=url, api_key=KEY)
        with pytest.warns(FutureWarning, match="deprecated"):
            client = await service.create_lora_training_client_async(TINY, rank=4)
        with pytest.warns(FutureWarning, match="deprecated"):
            old = await (await client.forward_backward_async([datum()], "cross_entropy"))
        new = await client.forward_backward([datum()], "cross_entropy")
        await service.close("success")
        return old.metrics["loss:sum"], new.metrics["loss:sum"]

    import asyncio

    old, new = asyncio.run(main())
    assert old == new


def test_11_nothing_is_asked_before_it_is_needed():
    tinker.ServiceClient(base_url="http://127.0.0.1:9", api_key=KEY)


def test_12_the_tokenizer_of_a_folder_with_two_slashes_loads(tmp_path, monkeypatch):
    from pathlib import Path

    from tickwork.models import locate

    link = Path(f"/tmp/tickwork-{tmp_path.parent.name}-{tmp_path.name}")
    link.symlink_to(locate(TINY))
    try:
        with serving(Settings(models=(str(link),), port=0)) as url, sdk(url) as service:
            client = service.create_lora_training_client(str(link), rank=4).result(60)
            assert client.get_tokenizer().encode("a")
            path = client.save_weights_for_sampler("here").result(60).path
            sampler = service.create_sampling_client(path).result(60)
            assert sampler.get_tokenizer().encode("a")
    finally:
        link.unlink()


def test_the_same_number_twice_is_one_request(raw):
    model = raw.model()
    first, again = (raw.forward_backward(model, 1, [datum()]).json() for _ in range(2))
    assert first == again
    twice = [raw.optim(model, 2, learning_rate=1e-2).json() for _ in range(3)]
    assert twice[0] == twice[1] == twice[2]
    assert raw.result(twice[0]["request_id"])["metrics"]["optim/step"] == 1.0
    assert raw.result(raw.optim(model, 3).json()["request_id"])["metrics"]["optim/step"] == 1.0, "no gradient was left"
    assert passed(raw, first).metrics == passed(raw, first).metrics, "a result can be fetched again"


def test_a_late_repeat_gets_the_old_result(raw):
    model = raw.model()
    for seq_id in (1, 2):
        raw.result(raw.optim(model, seq_id).json()["request_id"])
    again = raw.optim(model, 1).json()
    assert "metrics" in raw.result(again["request_id"])


def test_a_number_that_never_comes_is_given_up(raw):
    model = raw.model()
    late = raw.optim(model, 3).json()["request_id"]
    assert raw.poll(late).status_code == 408
    assert "metrics" in raw.result(late)
    missed = raw.result(raw.optim(model, 2).json()["request_id"])
    assert missed["category"] == "user"
    assert "metrics" in raw.result(raw.optim(model, 4).json()["request_id"])


@pytest.mark.parametrize("seq_id", [0, -1, 2**40, 2**63, 2**70, "1", 1.5, None, True])
def test_numbers_that_can_not_be(raw, seq_id):
    model = raw.model()
    assert raw.optim(model, seq_id).status_code == 422
    assert "metrics" in raw.result(raw.optim(model, 1).json()["request_id"])


def test_models_and_samplers_are_made_once(raw):
    session = raw.session()
    ask = {"session_id": session, "model_seq_id": 0, "base_model": TINY, "lora_config": {"rank": 4}}
    first, again = raw.ok("create_model", ask), raw.ok("create_model", ask)
    assert first == again
    ask = {"session_id": session, "sampling_session_seq_id": 0, "base_model": TINY}
    assert raw.ok("create_sampling_session", ask) == raw.ok("create_sampling_session", ask)
    counters = [
        raw.ok("join_sampling_session", {"sampling_session_id": f"{session}:sample:0"})["client_counter"]
        for _ in range(3)
    ]
    assert counters == [1, 2, 3]


def test_completions_are_announced_once_each(raw):
    session = raw.session()
    promises = [asample(raw, session, seq_id=i) for i in range(3)]
    name = f"{session}:sample:0"
    seen, cursor = set(), 0
    while len(seen) < 3:
        ask = {"target": {"sampling_session_id": name}, "prev_cursor": cursor}
        told = raw.ok("retrieve_futures", ask)
        assert cursor <= told["cursor"]
        cursor = told["cursor"]
        assert all(item["state"] == "finished" for item in told["completions"])
        seen |= {item["request_id"] for item in told["completions"]}
    assert seen == {promise["request_id"] for promise in promises}
    assert (
        raw.ok("retrieve_futures", {"target": {"sampling_session_id": name}, "prev_cursor": cursor, "timeout": 0.0})[
            "completions"
        ]
        == []
    )


def test_big_results_are_announced_by_size(raw):
    model = raw.model()
    promise = raw.forward_backward(model, 1, [datum([1] * 100) for _ in range(800)]).json()
    while (answer := _metadata(raw, promise)).status_code == 408:
        pass
    told = answer.json()
    assert told["status"] == "complete_metadata"
    whole = raw.poll(promise["request_id"], proto=True)
    assert len(whole.content) == told["response_payload_size"] > 256 * 1024


def _metadata(raw, promise):
    ask = {"request_id": promise["request_id"], "allow_metadata_only": True}
    return raw.http.post("retrieve_future", json=ask, headers={"Accept": PROTOBUF})


def test_a_cancelled_sample_ends(raw):
    session = raw.session()
    promise = asample(raw, session, num_samples=64, sampling_params={"max_tokens": 400, "stop": []})
    raw.ok("cancel_future", {"request_id": promise["request_id"]})
    assert "cancelled" in raw.result(promise["request_id"])["error"]


def test_compressed_bodies(raw):
    import zstandard

    model = raw.model()
    body = zstandard.compress(pass_body(model, 1, [datum()]))
    promise = raw.raw_pass(body, **{"Content-Encoding": "zstd"}).json()
    assert passed(raw, promise).metrics["loss:sum"] > 0


def test_ids_that_are_gone_or_never_were(raw):
    answers = {
        "model": raw.optim("nobody:train:0", 1),
        "request": raw.poll("nobody:train:0:r1"),
        "session": raw.post("create_model", {"session_id": "nobody", "model_seq_id": 0, "base_model": TINY}),
        "sampler": raw.http.get("samplers/nobody:sample:0"),
        "run": raw.http.get("training_runs/nobody"),
        "checkpoint": raw.post("weights_info", {"tinker_path": "tinker://nobody/weights/x"}),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 404)
    assert raw.poll("nobody:sample:0:r1").status_code == 410, "a sample is drawn again"
    assert raw.post("session_heartbeat", {"session_id": "nobody"}).status_code == 410


def test_what_belongs_to_a_closed_session_is_gone(raw):
    session = raw.session()
    model = raw.model(session)
    raw.ok(f"sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None})
    assert raw.optim(model, 1).status_code == 410
    assert raw.post("session_heartbeat", {"session_id": session}).status_code == 410


def test_sdk_side_limits_are_raised(url):
    config = httpx.post(f"{url}/api/v1/client/config", json=VERSION, headers={"X-API-Key": KEY}).json()
    assert config["fwdbwd_max_chunk_len"] >= 10_000
    assert config["sample_use_retrieve_futures"] is True
    assert config["custom_loss_server_side"] is True
