"""What a server tells about itself: metrics, logs and the ids of errors; and what it never tells."""

from __future__ import annotations

import gc
import io
import json
import logging
import re
import weakref

import httpx
from prometheus_client.parser import text_string_to_metric_families

from fakes import Client, fake_server
from served import TINY, Raw, datum
from tickwork.compute.weights import TrainingModel
from tickwork.server import Settings, logs, serving
from tickwork.server.keys import Keys

SECRET = "tml-a-secret-that-nobody-may-see"


def read(text):
    """Return every sample of a page, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            found[(sample.name, tuple(sorted(sample.labels.items())))] = sample.value
    return found


def metrics(url, key):
    answer = httpx.get(f"{url}/metrics", headers={"X-API-Key": key})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return read(answer.text)


def test_metrics_follow_what_is_done():
    """Counters, gauges and answers, while a model trains and once its session has ended."""
    with serving(Settings(models=(TINY,), port=0, keys=Keys([f"{SECRET} ann"]))) as url, Raw(url, SECRET) as raw:
        before = metrics(url, SECRET)
        others = {id(item) for item in gc.get_objects() if type(item) is TrainingModel}
        session = raw.session()
        model = raw.model(session)
        for number in (1, 2):
            raw.result(raw.forward_backward(model, number, [datum()]).json()["request_id"])
        during = metrics(url, SECRET)
        mine = [
            weakref.ref(item) for item in gc.get_objects() if type(item) is TrainingModel and id(item) not in others
        ]
        raw.ok(f"sessions/{session}/finish", {"reason": {"type": "success"}})
        raw.post("optim_step", {"model_id": "none", "seq_id": 1})
        for _ in range(1000):  # what a session held goes in its turn
            after = metrics(url, SECRET)
            if not after[("tickwork_engine_lanes", ())]:
                break
        gc.collect()
        assert [model() for model in mine] == [None], "nothing of it is left on the device"

    def change(name, one=before, other=during, **labels):
        key = (name, tuple(sorted(labels.items())))
        return other.get(key, 0) - one.get(key, 0)

    assert change("tickwork_engine_passes_total") == 2
    assert change("tickwork_engine_tokens_total") == 20
    assert change("tickwork_engine_requests_total") >= 3
    assert change("tickwork_engine_cycles_total") >= 3
    assert change("tickwork_engine_busy_seconds_total") > 0
    gauges = ("sessions", "models", "engine_lanes", "sessions_kept")
    assert [change(f"tickwork_{name}") for name in gauges] == [1, 1, 1, 1]
    assert [change(f"tickwork_{name}", before, after) for name in gauges] == [0, 0, 0, 1]
    assert change("tickwork_promises") == 3
    assert during[("tickwork_promises_pending", ())] == 0
    passes = {"method": "POST", "route": "forward_backward", "status": "200"}
    assert change("tickwork_http_requests_total", **passes) == 2
    lost = {"method": "POST", "route": "optim_step", "status": "404"}
    assert change("tickwork_http_requests_total", before, after, **lost) == 1
    assert during[("process_resident_memory_bytes", ())] > 2**20


def test_metrics_need_a_key_where_there_are_keys():
    """In either header; elsewhere a bearer is no key."""
    with serving(Settings(models=(TINY,), port=0, keys=Keys([f"{SECRET} ann"]))) as url:
        for headers, status in (
            ({}, 401),
            ({"X-API-Key": "tml-wrong"}, 401),
            ({"Authorization": "Bearer tml-wrong"}, 401),
            ({"X-API-Key": SECRET}, 200),
            ({"Authorization": f"Bearer {SECRET}"}, 200),
        ):
            assert httpx.get(f"{url}/metrics", headers=headers).status_code == status
        assert httpx.get(f"{url}/api/v1/sessions", headers={"Authorization": f"Bearer {SECRET}"}).status_code == 401


async def test_labels_are_bounded(autojump_clock):
    """Whatever is asked for, no label is made of it."""
    async with fake_server() as server, Client(server) as client:
        for number in range(50):
            await client.get(f"nothing/{number}")
            await client.get(f"sessions/{number}")
            await client.get(f"downloads/{number}/a/b/c/d")
            await client.request(f"METHOD{number}", "sessions")
        found = (await client.get("http://localhost:8000/metrics")).text
        routes = {dict(labels).get("route") for name, labels in read(found) if name == "tickwork_http_requests_total"}
        assert routes == {
            "other",
            "sessions/{session_id}",
            "api/v1/downloads/{until:int}/{signature}/{run_id}/{name}/{file}",
        }
        assert "METHOD" not in found


async def test_an_error_has_an_id_in_its_answer_and_in_the_log(autojump_clock, monkeypatch, caplog):
    """The body tells nothing else; the log tells all."""
    async with fake_server() as server, Client(server) as client:

        def broken(owner):
            raise RuntimeError("the inside")

        monkeypatch.setattr(server.sessions, "of", broken)
        answer = await client.get("sessions")
        assert answer.status_code == 500
        assert not re.search("Traceback|RuntimeError|the inside|File", answer.text)
        [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert answer.json()["error_id"] == record.error_id
        assert len(record.error_id) == 16
        assert record.error_id in record.getMessage()
        assert record.route == "sessions"
        assert "the inside" in caplog.text
        assert (await client.get("sessions")).json()["error_id"] != record.error_id


def written(form, log):
    """Return what a log call writes."""
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    levels = root.level, logging.getLogger("tickwork").level
    try:
        logs.configure(form)
        sink = root.handlers[0].stream = io.StringIO()
        log(logging.getLogger("tickwork.server"))
        return sink.getvalue()
    finally:
        root.handlers[:] = before
        root.setLevel(levels[0])
        logging.getLogger("tickwork").setLevel(levels[1])
        logging.captureWarnings(False)


def failing(log):
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it %s", "failed", extra={"error_id": "abc", "route": "sessions", "other": 1})


def test_json_logs_are_one_object_a_line():
    lines = written("json", lambda log: (log.info("hello"), failing(log), log.debug("not told"))).splitlines()
    first, second = map(json.loads, lines)
    assert {**first, "time": ""} == {"time": "", "level": "info", "logger": "tickwork.server", "message": "hello"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert (second["message"], second["error_id"], second["route"]) == ("it failed", "abc", "sessions")
    assert "ValueError: two\nlines" in second["exception"]
    assert "other" not in second


def test_text_logs_are_lines():
    text = written("text", lambda log: (log.info("hello"), failing(log)))
    assert re.match(r"\S+ \S+ INFO tickwork.server: hello\n", text)
    assert "ValueError" in text


def test_no_log_holds_a_key_or_a_link(monkeypatch, caplog):
    """With everything logged that anything logs, while things go right and wrong."""
    caplog.set_level(logging.DEBUG)
    with serving(Settings(models=(TINY,), port=0, keys=Keys([f"{SECRET} ann"]))) as url, Raw(url, SECRET) as raw:
        model = raw.model()
        asked = {"model_id": model, "seq_id": 1, "path": "x"}
        raw.result(raw.ok("save_weights_external", asked)["request_id"])
        urls = raw.http.get(f"training_runs/{model}/checkpoints/external_weights/x/external_weights_urls").json()[
            "urls"
        ]
        caplog.clear()  # httpx logs what it asks for, and this test is such a client
        caplog.set_level(logging.WARNING, "httpx")
        caplog.set_level(logging.WARNING, "httpcore")
        link = urls["adapter_config.json"]
        signature = link.split("/")[7]
        assert len(signature) == 64
        assert httpx.get(link).status_code == 200
        assert httpx.get(link + "x").status_code in (403, 404)
        wrong = f"{SECRET}-wrong"
        assert httpx.get(f"{url}/api/v1/sessions", headers={"X-API-Key": wrong}).status_code == 401
        monkeypatch.setattr("tickwork.catalogue.Catalogue.files", lambda *_: 1 / 0)
        monkeypatch.setattr("tickwork.catalogue.Catalogue.runs", lambda *_, **__: 1 / 0)
        assert httpx.get(link).status_code == 500
        assert raw.http.get("training_runs").status_code == 500
        raw.http.get("training_runs", headers={"Expect": "\x7f"})
    for secret in (SECRET, signature):
        assert secret not in caplog.text
    assert "ZeroDivisionError" in caplog.text
