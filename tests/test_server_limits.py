"""Who may come in, what is theirs, and how much of everything: the bounds of a server."""

from __future__ import annotations

import httpx
import pytest
import zstandard

from served import PROTOBUF, TINY, VERSION, Raw, datum, pass_body, sdk
from tickwork.engine.engine import Engine
from tickwork.errors import InvalidRequestError
from tickwork.server import Settings, serve, serving
from tickwork.server.app import ROUTES
from tickwork.server.keys import Keys


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    settings = Settings(
        models=(TINY,),
        store=tmp_path_factory.mktemp("limits"),
        port=0,
        keys=Keys(["tml-anna ann", "tml-bobb bob"]),
        max_models=2,
        max_samplers=2,
        max_tokens_in_flight=1000,
        max_body=100_000,
        max_decompressed=200_000,
        poll_seconds=0.2,
        gap_seconds=600,
    )
    with serving(settings) as url:
        yield url


@pytest.fixture
def ann(url):
    with Raw(url, "tml-anna") as raw:
        raw.mine = raw.session()
        yield raw
        raw.ok(f"sessions/{raw.mine}/finish", {"reason": {"type": "success"}})


@pytest.fixture
def bob(url):
    with Raw(url, "tml-bobb") as raw:
        yield raw


@pytest.mark.parametrize("key", [None, "", "tml-", "tml-annas", "tml-ann", "ann", "tml-anna\x7f", "ümlaut"])
def test_every_route_needs_a_key(url, key):
    headers = {} if key is None else {"X-API-Key": key.encode()}
    with httpx.Client(base_url=f"{url}/api/v1/", headers=headers) as http:
        for method, path, _ in ROUTES:
            answer = http.request(method, path.replace("{", "").replace("}", ""), json={})
            # No header may hold a control character: such a request is refused before its key is looked at.
            assert answer.status_code == (400 if "\x7f" in (key or "") else 401), path
            assert answer.headers["content-type"] == "application/json"
        if "\x7f" not in (key or ""):
            assert http.get("healthz").json() == {"status": "ok"}


def test_without_keys_only_loopback_is_served():
    assert Settings(models=(TINY,)).keys.open
    with pytest.raises(InvalidRequestError, match="loopback"):
        Settings(models=(TINY,), host="0.0.0.0")
    Settings(models=(TINY,), host="0.0.0.0", keys=Keys(["tml-anna ann"]))


def test_others_things_are_not_there(ann, bob):
    model = ann.model(ann.mine)
    saved = ann.ok("save_weights", {"model_id": model, "seq_id": 1, "path": "private"})["request_id"]
    path = ann.result(saved)["path"]
    named = ann.ok("save_weights_for_sampler", {"model_id": model, "seq_id": 2, "path": "sampler"})["request_id"]
    sampler_path = ann.result(named)["path"]
    made = ann.ok("create_sampling_session", {"session_id": ann.mine, "sampling_session_seq_id": 0, "base_model": TINY})
    sampler = made["sampling_session_id"]
    theirs = bob.session()
    prompt = {"chunks": [{"tokens": [1], "type": "encoded_text"}]}
    seen = {
        "model": bob.optim(model, 3),
        "pass": bob.forward_backward(model, 3, [datum()]),
        "info": bob.post("get_info", {"model_id": model}),
        "promise": bob.poll(saved),
        "session": bob.http.get(f"sessions/{ann.mine}"),
        "finish": bob.post(f"sessions/{ann.mine}/finish", {"reason": {"type": "success"}}),
        "run": bob.http.get(f"training_runs/{model}"),
        "checkpoints": bob.http.get(f"training_runs/{model}/checkpoints"),
        "weights": bob.post("weights_info", {"tinker_path": path}),
        "copy": bob.post("copy_weights", {"source_path": path}),
        "delete": bob.http.delete(f"training_runs/{model}/checkpoints/weights/private"),
        "publish": bob.http.post(f"training_runs/{model}/checkpoints/weights/private/publish"),
        "ttl": bob.http.put(f"training_runs/{model}/checkpoints/weights/private/ttl", json={"ttl_seconds": 60}),
        "sampler": bob.http.get(f"samplers/{sampler}"),
        "join": bob.post("join_sampling_session", {"sampling_session_id": sampler}),
        "sample": bob.post(
            "asample", {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {}}
        ),
        "announce": bob.post("retrieve_futures", {"target": {"sampling_session_id": sampler}}),
        "open": bob.post(
            "create_sampling_session", {"session_id": theirs, "sampling_session_seq_id": 0, "model_path": sampler_path}
        ),
        "join session": bob.post("create_model", {"session_id": ann.mine, "model_seq_id": 5, "base_model": TINY}),
    }
    assert {name: answer.status_code for name, answer in seen.items()} == dict.fromkeys(seen, 404)
    created = bob.ok("load_weights", {"session_id": theirs, "model_seq_id": 0, "path": path, "optimizer": False})
    assert bob.result(created["request_id"])["category"] == "user"
    assert bob.http.get("training_runs").json()["training_runs"] == []
    assert bob.http.get("checkpoints").json()["checkpoints"] == []
    assert bob.http.get("sessions").json()["sessions"] == [theirs]
    assert ann.http.get(f"training_runs/{model}/checkpoints").json()["checkpoints"]


def test_models_of_one_key_are_bounded(ann, bob):
    first = ann.model(ann.mine, 0)
    ann.model(ann.mine, 1)
    ask = {"session_id": ann.mine, "model_seq_id": 2, "base_model": TINY, "lora_config": {"rank": 4}}
    refused = ann.post("create_model", ask)
    assert refused.status_code == 403
    assert "2 training models" in refused.text
    theirs = bob.session()
    bob.model(theirs)
    bob.ok(f"sessions/{theirs}/finish", {"reason": {"type": "success"}})
    ann.ok("unload_model", {"model_id": first})
    ann.model(ann.mine, 3)


def test_tokens_in_flight_are_bounded(ann):
    model = ann.model(ann.mine)
    held = ann.forward_backward(model, 2, [datum([1] * 451), datum([1] * 451)])
    assert held.status_code == 200
    full = ann.forward_backward(model, 3, [datum([1] * 200)])
    assert full.status_code == 429
    assert "retry-after" in full.headers
    first = ann.forward_backward(model, 1, [datum()])
    assert first.status_code == 200, "the one on which the others wait has room always"
    assert "error" not in ann.result(held.json()["request_id"])
    assert "error" not in ann.result(ann.forward_backward(model, 3, [datum([1] * 200)]).json()["request_id"])


def test_bodies_are_bounded_and_use_their_number_up(ann):
    model = ann.model(ann.mine)
    big = pass_body(model, 1, [datum([1] * 500) for _ in range(60)])
    assert len(big) > 100_000
    answer = ann.raw_pass(big)
    assert answer.status_code == 413
    assert "100000" in answer.text
    bomb = zstandard.compress(pass_body(model, 2, [datum([1] * 1000) for _ in range(60)]))
    assert len(bomb) < 10_000
    answer = ann.raw_pass(bomb, **{"Content-Encoding": "zstd"})
    assert answer.status_code == 413
    assert "200000" in answer.text
    assert "metrics" in ann.result(ann.optim(model, 3).json()["request_id"])


def test_a_bomb_of_gigabytes_is_small_work(ann):
    import io

    sink = io.BytesIO()
    with zstandard.ZstdCompressor(level=1).stream_writer(sink, closefd=False) as writer:
        for _ in range(512):
            writer.write(bytes(2**20))
    answer = ann.raw_pass(sink.getvalue(), **{"Content-Encoding": "zstd"})
    assert answer.status_code == 413


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd, zstd", "nonsense"])
def test_other_encodings_are_refused(ann, encoding):
    assert ann.raw_pass(b"", **{"Content-Encoding": encoding}).status_code == 415


def test_damaged_compression(ann):
    for body in (b"", b"not zstd", zstandard.compress(b"x" * 1000)[:-4]):
        assert 400 <= ann.raw_pass(body, **{"Content-Encoding": "zstd"}).status_code < 500


def test_samplers_past_the_bound_are_opened_again_when_asked(ann):
    names = []
    for number in range(4):
        ask = {"session_id": ann.mine, "sampling_session_seq_id": number, "base_model": TINY}
        names.append(ann.ok("create_sampling_session", ask)["sampling_session_id"])
    prompt = {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]}
    for name in names:
        ask = {"sampling_session_id": name, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 1}}
        result = ann.result(ann.ok("asample", ask)["request_id"])
        assert len(result["sequences"]) == 1


def test_config_is_json_and_unknown_routes_are_too(ann, url):
    assert ann.post("client/config", VERSION).headers["content-type"] == "application/json"
    for answer in (httpx.get(f"{url}/"), httpx.get(f"{url}/api/v1/nothing"), ann.http.get("optim_step")):
        assert answer.status_code in (404, 405)
        assert "detail" in answer.json()


def test_what_the_client_accepts_decides_the_form(ann):
    model = ann.model(ann.mine)
    promise = ann.forward_backward(model, 1, [datum()]).json()
    assert ann.result(promise["request_id"])["metrics"]["loss:sum"] > 0
    assert ann.poll(promise["request_id"], proto=True).headers["content-type"] == PROTOBUF


def test_models_get_the_share_of_their_owner(monkeypatch):
    given = []
    monkeypatch.setattr(Engine, "set_share", lambda self, lane, share: given.append((lane, share)))
    with serving(Settings(models=(TINY,), port=0, keys=Keys(["tml-anna ann 3", "tml-bobb bob"]))) as url:
        with Raw(url, "tml-anna") as ann, Raw(url, "tml-bobb") as bob:
            models = [ann.model(), bob.model()]
    assert given == [(models[0], 3.0), (models[1], 1.0)]


def test_a_hint_is_told_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(Engine, "hint", lambda self, lane: "missed 9 of 20 cycles: submit the next request sooner")
    monkeypatch.setattr("tickwork.server.server.SWEEP_SECONDS", 0.01)
    with serving(Settings(models=(TINY,), port=0)) as url:
        with Raw(url) as raw:
            model = raw.model()
            for _ in range(20):
                assert raw.ok("get_info", {"model_id": model})["hint"].startswith("missed 9 of 20 cycles")
        with sdk(url) as service:
            assert service.create_lora_training_client(TINY, rank=1).result(60).get_info().lora_rank == 1
    assert caplog.text.count(f"{model} missed 9 of 20 cycles") == 1


def test_switches_of_the_planner_are_settings(monkeypatch):
    made = []
    make = serve.make_engine
    monkeypatch.setattr(serve, "make_engine", lambda *given, **more: made.append(more) or make(*given, **more))
    with serving(Settings(models=(TINY,), port=0, merge=False, invariant=True)) as url:
        assert httpx.get(f"{url}/api/v1/healthz").status_code == 200
    assert [(each["merge"], each["invariant"]) for each in made] == [(False, True)]
