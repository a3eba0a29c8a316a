"""Route by route: with another owner's ids a key gets exactly what it gets with ids that do not exist."""

from __future__ import annotations

import json
import uuid
from types import SimpleNamespace

import pytest

from served import TINY, VERSION, Raw, datum, pass_body
from tickwork.server import Settings, serving
from tickwork.server.app import CHECKPOINT, OPEN_ROUTES, ROUTES
from tickwork.server.keys import Keys

PROMPT = {"chunks": [{"tokens": [1], "type": "encoded_text"}]}
LOSS = {
    "name": "x",
    "inputs": [{"name": "logprobs", "rank": 1}],
    "graph": {
        "format": 1,
        "nodes": [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
            {"op": "call_method", "name": "s", "target": "sum", "args": [{"ref": "logprobs"}]},
            {"op": "output", "name": "o", "target": "output", "args": [{"tuple": [{"ref": "s"}, {"dict": {}}]}]},
        ],
    },
}


def ids_of(session, private="private"):
    """Every id that one client could name, derived from its session's."""
    model, sampler = f"{session}:train:0", f"{session}:sample:0"
    return SimpleNamespace(
        session=session,
        model=model,
        sampler=sampler,
        promise=f"{model}:r1",
        sample=f"{sampler}:r0",
        loss=f"{session}:loss:0",
        path=f"tinker://{model}/weights/{private}",
        sampler_path=f"tinker://{model}/sampler_weights/{private}",
        external=f"tinker://{model}/external_weights/{private}",
        name=private,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ann has one of everything; Bob has a session and a model of his own."""
    keys = Keys(["tml-anna ann", "tml-bobb bob"])
    store = tmp_path_factory.mktemp("isolation")
    settings = Settings(models=(TINY,), store=store, port=0, keys=keys, poll_seconds=0.1)
    with serving(settings) as url, Raw(url, "tml-anna") as ann, Raw(url, "tml-bobb") as bob:
        ann.store = store
        ann.ids, bob.ids = ids_of(ann.session()), ids_of(bob.session())
        for each in (ann, bob):
            each.model(each.ids.session)
        asked = {
            "save_weights": {"model_id": ann.ids.model, "seq_id": 1, "path": "private"},
            "save_weights_for_sampler": {"model_id": ann.ids.model, "seq_id": 2, "path": "private"},
            "save_weights_external": {"model_id": ann.ids.model, "seq_id": 3, "path": "private"},
            "create_custom_loss": {"session_id": ann.ids.session, "custom_loss_seq_id": 0, **LOSS},
        }
        for route, body in asked.items():
            assert "error" not in ann.result(ann.ok(route, body)["request_id"])
        ann.ok("create_sampling_session", sampling(ann.ids, base_model=TINY))
        ann.result(ann.ok("asample", sample(ann.ids))["request_id"])
        yield ann, bob


def sampling(of, **more):
    return {"session_id": of.session, "sampling_session_seq_id": 0, **more}


def sample(of):
    ask = {"sampling_session_id": of.sampler, "seq_id": 0, "prompt": PROMPT}
    return {**ask, "sampling_params": {"max_tokens": 1}}


def raw_pass(bob, of, mine):
    return bob.raw_pass(pass_body(of.model, 1, [datum()]))


def custom_pass(bob, of, mine):
    """A pass of Bob's own model that names Ann's loss."""
    bob.number = getattr(bob, "number", 0) + 1
    return bob.raw_pass(pass_body(mine.model, bob.number, [datum()], "custom", {"loss_id": of.loss}))


def to(path, /, **body):
    """Make a case that posts JSON, in which a callable stands for what is named."""

    def send(bob, of, mine):
        return bob.post(path, {key: value(of) if callable(value) else value for key, value in body.items()})

    return send


def at(method, path, body=None):
    """Make a case whose ids stand in its path."""

    def send(bob, of, mine):
        known = {"session_id": of.session, "sampler_id": of.sampler, "run_id": of.model, "name": of.name}
        return bob.http.request(method, path.format(**known, kind="weights"), json=body or {})

    return send


def loading(bob, of, mine):
    bob.loaded = getattr(bob, "loaded", 100) + 1
    ask = {"session_id": mine.session, "model_seq_id": bob.loaded, "path": of.path, "optimizer": False}
    return bob.post("load_weights", ask)


def listing(method, path, body=None):
    """Make a case of a route that names nothing: what it tells must not hold anything of Ann's."""

    def send(bob, of, mine):
        return bob.http.request(method, path, json=body or {})

    send.lists = True
    return send


MODEL, SESSION, SAMPLER = (lambda of: of.model), (lambda of: of.session), (lambda of: of.sampler)
REASON = {"reason": {"type": "success"}}

# One case or more for each route of the table.
CASES = {
    ("POST", "retrieve_future"): [
        to("retrieve_future", request_id=lambda of: of.promise),
        to("retrieve_future", request_id=lambda of: of.sample),
        to("retrieve_future", request_id=lambda of: of.loss),
    ],
    ("POST", "retrieve_futures"): [
        to("retrieve_futures", target=lambda of: {"sampling_session_id": of.sampler}, timeout=0.0)
    ],
    ("POST", "session_heartbeat"): [to("session_heartbeat", session_id=SESSION)],
    ("POST", "asample"): [lambda bob, of, mine: bob.post("asample", sample(of))],
    ("POST", "forward_backward"): [raw_pass, custom_pass],
    ("POST", "optim_step"): [
        to("optim_step", model_id=MODEL, seq_id=1, adam_params={}),
        to("optim_step", model_id=MODEL, seq_id=1, adam_params={"learning_rate": "fast"}),
    ],
    ("POST", "client/config"): [listing("POST", "client/config", VERSION)],
    ("POST", "client/dynamic_config"): [listing("POST", "client/dynamic_config", VERSION)],
    ("POST", "auth/token"): [listing("POST", "auth/token")],
    ("GET", "auth/apikey/me"): [listing("GET", "auth/apikey/me")],
    ("DELETE", "auth/apikey/me"): [listing("DELETE", "auth/apikey/me")],
    ("GET", "get_server_capabilities"): [listing("GET", "get_server_capabilities")],
    ("POST", "create_session"): [listing("POST", "create_session", {"tags": [], **VERSION})],
    ("POST", "sessions/search"): [
        listing("POST", "sessions/search", {}),
        to("sessions/search", session_id=SESSION),
    ],
    ("POST", "sessions/{session_id}/finish"): [at("POST", "sessions/{session_id}/finish", REASON)],
    ("GET", "sessions"): [listing("GET", "sessions")],
    ("GET", "sessions/{session_id}"): [at("GET", "sessions/{session_id}")],
    ("PUT", "sessions/{session_id}/project"): [at("PUT", "sessions/{session_id}/project", {"project_id": "p"})],
    ("GET", "sessions/{session_id}/trace_export"): [at("GET", "sessions/{session_id}/trace_export")],
    ("POST", "telemetry"): [listing("POST", "telemetry")],
    ("GET", "audit"): [listing("GET", "audit")],
    ("GET", "billing/usage/events"): [listing("GET", "billing/usage/events")],
    ("GET", "billing/usage/checkpoints/current"): [listing("GET", "billing/usage/checkpoints/current")],
    ("POST", "create_model"): [to("create_model", session_id=SESSION, model_seq_id=7, base_model=TINY)],
    ("POST", "unload_model"): [to("unload_model", model_id=MODEL)],
    ("POST", "get_info"): [to("get_info", model_id=MODEL)],
    ("POST", "forward"): [
        to("forward", model_id=MODEL, seq_id=1, forward_input={"data": [], "loss_fn": "cross_entropy"})
    ],
    ("POST", "save_weights"): [to("save_weights", model_id=MODEL, seq_id=1, path="x")],
    ("POST", "save_weights_external"): [to("save_weights_external", model_id=MODEL, seq_id=1, path="x")],
    ("POST", "save_weights_for_sampler"): [
        to("save_weights_for_sampler", model_id=MODEL, seq_id=1, path="x"),
        to("save_weights_for_sampler", model_id=MODEL, seq_id=1, sampling_session_seq_id=3),
    ],
    ("POST", "load_weights"): [
        to("load_weights", model_id=MODEL, seq_id=1, path="tinker://x/weights/y", optimizer=False),
        to("load_weights", session_id=SESSION, model_seq_id=1, path="tinker://x/weights/y", optimizer=False),
        loading,
    ],
    ("POST", "create_custom_loss"): [
        lambda bob, of, mine: bob.post(
            "create_custom_loss", {"session_id": of.session, "custom_loss_seq_id": 0, **LOSS}
        )
    ],
    ("POST", "create_sampling_session"): [
        lambda bob, of, mine: bob.post("create_sampling_session", sampling(of, base_model=TINY)),
        lambda bob, of, mine: bob.post("create_sampling_session", sampling(mine, model_path=of.sampler_path)),
        lambda bob, of, mine: bob.post("create_sampling_session", sampling(mine, model_path=of.path)),
    ],
    ("POST", "join_sampling_session"): [to("join_sampling_session", sampling_session_id=SAMPLER)],
    ("GET", "samplers/{sampler_id}"): [at("GET", "samplers/{sampler_id}")],
    ("POST", "cancel_future"): [
        to("cancel_future", request_id=lambda of: of.sample),
        to("cancel_future", request_id=lambda of: of.promise),
    ],
    ("POST", "weights_info"): [to("weights_info", tinker_path=lambda of: of.path)],
    ("POST", "copy_weights"): [
        to("copy_weights", source_path=lambda of: of.path),
        to("copy_weights", source_path=lambda of: of.external),
    ],
    ("GET", "training_runs"): [listing("GET", "training_runs"), listing("GET", "training_runs?project_id=p")],
    ("GET", "training_runs/{run_id}"): [at("GET", "training_runs/{run_id}")],
    ("GET", "training_runs/{run_id}/checkpoints"): [at("GET", "training_runs/{run_id}/checkpoints")],
    ("GET", "training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls"): [
        at("GET", "training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls")
    ],
    ("GET", "checkpoints"): [listing("GET", "checkpoints")],
    ("DELETE", CHECKPOINT): [at("DELETE", CHECKPOINT)],
    ("POST", f"{CHECKPOINT}/publish"): [at("POST", f"{CHECKPOINT}/publish")],
    ("DELETE", f"{CHECKPOINT}/publish"): [at("DELETE", f"{CHECKPOINT}/publish")],
    ("PUT", f"{CHECKPOINT}/ttl"): [at("PUT", f"{CHECKPOINT}/ttl", {"ttl_seconds": 60})],
}


def test_every_route_has_a_case():
    """A route that is added without one fails here."""
    assert set(CASES) == {(method, path) for method, path, _ in ROUTES}


def test_routes_without_a_key_are_these():
    """Each of them was looked at: the one tells nothing, and a link of the other is its key."""
    names = ["api/v1/healthz", "api/v1/downloads/{until:int}/{signature}/{run_id}/{name}/{file}"]
    assert [path for path, _ in OPEN_ROUTES] == names


def told(bob, answer, of):
    """Return what an answer says, with the names that were asked for taken out; of a promise, its result's."""
    found = answer.text
    if answer.status_code == 200 and "request_id" in answer.json():
        found = str(bob.result(answer.json()["request_id"]))
        assert "error" in found
    return answer.status_code, found.replace(of.session, "SESSION").replace(of.name, "NAME")


@pytest.mark.parametrize(("route", "index"), [(route, i) for route, cases in CASES.items() for i in range(len(cases))])
def test_another_owners_ids_are_like_ids_that_do_not_exist(both, route, index):
    """Word for word, so that nobody can find out what others have."""
    ann, bob = both
    send = CASES[route][index]
    if hasattr(send, "lists"):
        text = send(bob, ann.ids, bob.ids).text
        assert ann.ids.session not in text
        assert "private" not in text
        return
    nobody = ids_of(str(uuid.uuid4()), "no-such")
    theirs, none = (told(bob, send(bob, of, bob.ids), of) for of in (ann.ids, nobody))
    assert theirs == none
    assert theirs[0] != 200 or "error" in theirs[1] or route[1] == "sessions/search"


def test_ann_still_has_everything(both):
    """Nothing of what Bob tried did anything."""
    ann, bob = both
    mine = ann.ids
    for path in (mine.path, mine.sampler_path, mine.external):
        assert ann.post("weights_info", {"tinker_path": path}).status_code == 200
    assert not any(item["public"] for item in ann.http.get("checkpoints").json()["checkpoints"])
    assert ann.http.get(f"sessions/{mine.session}").json()["training_run_ids"] == [mine.model]
    assert ann.post("session_heartbeat", {"session_id": mine.session}).status_code == 200
    assert ann.http.get("training_runs?project_id=p").json()["training_runs"] == []
    assert "metrics" in ann.result(ann.optim(mine.model, 4).json()["request_id"])


def test_an_expired_checkpoint_of_another_owner_is_not_there_either(both):
    """The message for an owner says when it expired; for others it never was."""
    ann, bob = both
    found = ann.store.glob("runs/*/weights/private/tickwork.json")
    for file in found:
        file.write_text(json.dumps({**json.loads(file.read_text()), "expires_at": "2020-01-01T00:00:00+00:00"}))
    assert "expired" in ann.post("weights_info", {"tinker_path": ann.ids.path}).text
    detail = bob.post("weights_info", {"tinker_path": ann.ids.path}).json()["detail"]
    assert detail == f"there is no checkpoint {ann.ids.path}"
