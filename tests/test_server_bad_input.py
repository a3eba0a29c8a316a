"""Whatever is sent, the answer is no 5xx, says what is wrong, shows nothing of the inside; and the server lives on."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tinker import types

from served import KEY, PROTOBUF, TINY, TOKENS, Raw, datum, pass_body
from tickwork.server import Settings, serving
from tickwork.server.app import ROUTES

LEAKS = re.compile(r"Traceback|File \"|site-packages|torch\.|0x[0-9a-f]{6}")
PATHS = [(method, path) for method, path, _ in ROUTES]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    settings = Settings(models=(TINY,), store=tmp_path_factory.mktemp("bad"), port=0, poll_seconds=0.05, gap_seconds=0)
    with serving(settings) as url, Raw(url) as raw:
        raw.mine = raw.session()
        raw.trained = raw.model(raw.mine)
        yield raw
        lives_on(raw)


def lives_on(raw):
    model = raw.model()
    promise = raw.forward_backward(model, 1, [datum()]).json()
    assert raw.result(promise["request_id"])["metrics"]["loss:sum"] > 0


def is_clean(answer):
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()
    assert not LEAKS.search(answer.text), answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 5000,
        b'{"session_id": {"$ne": 1}}',
    ],
)
def test_bodies_that_are_none(raw, body):
    for method, path in PATHS:
        answer = raw.http.request(
            method, path.format(**_names(raw)), content=body, headers={"Content-Type": "application/json"}
        )
        is_clean(answer)


def _names(raw):
    nobody = {"session_id": "nobody", "sampler_id": "nobody:sample:0", "run_id": "nobody:train:0"}
    return {**nobody, "kind": "weights", "name": "none"}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)

# A body that is taken, for each route that takes one: every field of it is replaced by nonsense in turn.
GOOD = {
    "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0", "display_name": "x"},
    "session_heartbeat": {"session_id": "S"},
    "create_model": {"session_id": "S", "model_seq_id": 1, "base_model": TINY, "lora_config": {"rank": 2, "seed": 1}},
    "get_info": {"model_id": "M"},
    "optim_step": {"model_id": "M", "seq_id": 1, "adam_params": {"learning_rate": 0.1, "beta1": 0.9}},
    "save_weights": {"model_id": "M", "seq_id": 1, "path": "x", "ttl_seconds": 60, "overwrite": True},
    "save_weights_for_sampler": {"model_id": "M", "seq_id": 1, "sampling_session_seq_id": 3, "kind": "snapshot"},
    "load_weights": {"model_id": "M", "seq_id": 1, "path": "tinker://M/weights/x", "optimizer": True},
    "create_sampling_session": {"session_id": "S", "sampling_session_seq_id": 0, "base_model": TINY},
    "asample": {
        "sampling_session_id": "S:sample:0",
        "seq_id": 0,
        "num_samples": 1,
        "prompt_logprobs": True,
        "prompt": {"chunks": [{"tokens": TOKENS, "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "stop": [1], "seed": 1},
        "target_prompt_logprobs": {"data": [1] * 10, "dtype": "int64", "shape": [10, 1]},
        "topk_prompt_logprobs": 1,
        "topk_sample_logprobs": 1,
        "prompt_alt_tokens_k": 1,
        "prompt_logprobs_last_n": 2,
    },
    "retrieve_future": {"request_id": "M:r0", "allow_metadata_only": True},
    "retrieve_futures": {"target": {"sampling_session_id": "S:sample:0"}, "prev_cursor": 0, "timeout": 0.0},
    "cancel_future": {"request_id": "M:r0"},
    "create_custom_loss": {
        "session_id": "S",
        "custom_loss_seq_id": 0,
        "name": "x",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {
            "format": 1,
            "nodes": [
                {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
                {"op": "call_method", "name": "s", "target": "sum", "args": [{"ref": "logprobs"}], "kwargs": {}},
                {
                    "op": "output",
                    "name": "o",
                    "target": "output",
                    "args": [{"tuple": [{"ref": "s"}, {"dict": {}}]}],
                    "kwargs": {},
                },
            ],
        },
    },
    "weights_info": {"tinker_path": "tinker://M/weights/x"},
    "copy_weights": {"source_path": "tinker://M/weights/x", "ttl_seconds": 60},
    "sessions/search": {"limit": 5, "display_name": "x", "statuses": [{"type": "active"}], "owner": {"type": "own"}},
}


def paths_in(value, here=()):
    """Every place in a JSON value."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*here, key))


def replaced(value, where, new):
    if not where:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[where[0]] = replaced(value[where[0]], where[1:], new)
    return copy


def filled(value, raw):
    if isinstance(value, dict):
        return {key: filled(inner, raw) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, raw) for inner in value]
    if isinstance(value, str):
        return (
            value.replace("S:sample", f"{raw.mine}:sample").replace("M:", f"{raw.trained}:")
            if ":" in value
            else {"S": raw.mine, "M": raw.trained}.get(value, value)
        )
    return value


@pytest.mark.parametrize("route", GOOD)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_field_of_any_body_can_hurt(raw, route, data):
    good = filled(GOOD[route], raw)
    where = data.draw(st.sampled_from(list(paths_in(good))))
    answer = raw.post(route, replaced(good, where, data.draw(JSON)))
    is_clean(answer)
    promised = answer.json() if answer.status_code == 200 and route != "retrieve_future" else {}
    if "request_id" in promised:
        done = raw.poll(promised["request_id"])
        if done.status_code != 408:
            is_clean(done)


@pytest.mark.parametrize("route", [route for route in GOOD if route != "sessions/search"])
def test_fields_that_are_not_known_are_refused_by_name(raw, route):
    good = filled(GOOD[route], raw)
    if "model_id" in good:
        good["model_id"] = raw.model()
    answer = raw.post(route, {**good, "surprise": 1})
    text = answer.text
    if answer.status_code == 200:
        text = str(raw.result(answer.json()["request_id"]))
    else:
        assert answer.status_code == 422
    assert "surprise" in text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), seed=st.integers(0, 2**32))
def test_no_bytes_of_a_pass_can_hurt(raw, body, seed):
    is_clean(raw.raw_pass(body))
    valid = bytearray(pass_body(raw.trained, 1, [datum()]))
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 4)):
        valid[chance.randrange(len(valid))] = chance.randrange(256)
    is_clean(raw.raw_pass(bytes(valid)))


@pytest.mark.parametrize("media", ["text/plain", "multipart/form-data", "application/json", ""])
def test_other_media_types(raw, media):
    is_clean(raw.http.post("forward_backward", content=b"\x00\x01", headers={"Content-Type": media}))


@pytest.mark.parametrize(
    "query", ["limit=-1", "limit=x", "offset=9" * 1, "limit=" + "9" * 40, "offset=-1", "limit=1e3"]
)
def test_queries(raw, query):
    for path in ("training_runs", "checkpoints", "sessions"):
        is_clean(raw.http.get(f"{path}?{query}"))


@pytest.mark.parametrize("name", ["..", "../../etc/passwd", "%2e%2e", "a%2fb", b"a\x00b".hex(), "%00", "x" * 5000])
def test_names_never_leave_the_store(raw, name):
    for path in (
        f"training_runs/{name}",
        f"training_runs/{raw.trained}/checkpoints/weights/{name}/publish",
        f"training_runs/{name}/checkpoints/weights/x/publish",
        f"downloads/9999999999/aa/{raw.trained}/{name}/adapter_config.json",
    ):
        is_clean(raw.http.get(path))
        is_clean(raw.http.post(path))
    saved = raw.post("save_weights", {"model_id": raw.model(), "seq_id": 1, "path": name})
    if saved.status_code == 200:
        result = raw.result(saved.json()["request_id"])
        assert result.get("category") == "user" or result["path"].endswith(name)


def test_a_connection_that_ends_within_a_body(raw):
    import socket

    host, port = raw.http.base_url.host, raw.http.base_url.port
    for part in (b"POST /api/v1/optim_step HTTP/1.1\r\n", b"\r\n", b"\x16\x03\x01 garbage\r\n\r\n"):
        with socket.create_connection((host, port)) as connection:
            connection.sendall(part)
    with socket.create_connection((host, port)) as connection:
        head = f"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: {PROTOBUF}\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\nabc".encode())


@pytest.mark.parametrize("name", ["target_tokens", "weights"])
def test_a_few_bytes_that_claim_a_huge_tensor(raw, name):
    huge = types.TensorData([1], "int64" if name == "target_tokens" else "float32", [10, 2**40], [0] + [1] * 10, [0])
    bad = datum()
    bad = types.Datum(bad.model_input, {**bad.loss_fn_inputs, name: huge})
    promise = raw.forward_backward(raw.model(), 1, [bad]).json()
    failed = raw.result(promise["request_id"])
    assert failed["category"] == "user"
    assert str(2**40) in failed["error"]
