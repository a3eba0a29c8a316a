"""``tickwork serve`` as a process: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from served import KEY, TINY, Raw, datum, sdk

TICKWORK = str(Path(sys.executable).parent / "tickwork")


@contextmanager
def serve(folder, *more, env=None):
    """Start a server on a free port; yield it and its URL."""
    command = [TICKWORK, "serve", "--model", TINY, "--store", str(folder), "--port", "0", *more]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )
    try:
        process.told = []
        for line in process.stdout:
            process.told.append(line)
            if "sampler.sample" in line:
                break
        found = re.search(r"TINKER_BASE_URL=(\S+)", "".join(process.told))
        assert found, "".join(process.told) + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_what_it_prints_works(tmp_path):
    with serve(tmp_path) as (process, url):
        text = "".join(process.told)
        assert "No API keys" in text
        example = text[text.index("import tinker") :]
        env = {**os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": re.search(r"TINKER_API_KEY=(\S+)", text)[1]}
        done = subprocess.run([sys.executable, "-c", example], env=env, capture_output=True, text=True, timeout=120, check=False)  # fmt: skip  # noqa: E501
        assert done.returncode == 0, done.stderr
        assert "tokens" in done.stdout


def test_keys_let_in_and_keep_out(tmp_path):
    keys = tmp_path / "keys"
    made = subprocess.run([TICKWORK, "keys", "new", "ann"], capture_output=True, text=True, check=True)
    key = made.stderr.split()[0]
    keys.write_text(made.stdout)
    more = ("--keys", str(keys), "--log", "json")
    with serve(tmp_path / "store", *more, env={"TICKWORK_API_KEYS": "tml-from-env bob"}) as (
        process,
        url,
    ):
        assert "No API keys" not in "".join(process.told)
        assert key not in "".join(process.told)
        statuses = [
            httpx.get(f"{url}/api/v1/training_runs", headers={"X-API-Key": key}).status_code
            for key in (key, "tml-from-env", "tml-other")
        ]
        assert statuses == [200, 200, 401]
        assert json.loads(process.stderr.readline())["message"] == f"loading {TINY}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(tmp_path, number):
    with serve(tmp_path) as (process, url):
        # Not closed: its server is gone by then, and it would try for a minute.
        service = tinker.ServiceClient(base_url=url, api_key=KEY)
        client = service.create_lora_training_client(TINY, rank=4).result(60)
        futures = [client.forward_backward([datum([1] * 100)] * 20, "cross_entropy") for _ in range(4)]
        saved = client.save_state("kept")
        futures[0].result(60)
        process.send_signal(number)
        while "finishing" not in process.stderr.readline():
            pass
        with Raw(url) as raw:
            refused = raw.post("create_session", {"tags": [], "sdk_version": "x", "user_metadata": {}})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        assert all(future.result(60).metrics["loss:sum"] > 0 for future in futures)
        assert saved.result(60).path.endswith("/weights/kept")
        assert process.wait(30) == 0


def test_a_second_signal_ends_it_at_once(tmp_path):
    with serve(tmp_path) as (process, url):
        with Raw(url) as raw:
            model = raw.model()
            raw.forward_backward(model, 1, [datum([1] * 200)] * 400)
            process.send_signal(signal.SIGTERM)
            while "finishing" not in process.stderr.readline():
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 128 + signal.SIGTERM


def test_a_restarted_server_has_its_checkpoints(tmp_path):
    with serve(tmp_path) as (process, url), sdk(url) as service:
        client = service.create_lora_training_client(TINY, rank=4, seed=1).result(60)
        client.forward_backward([datum()], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result(60)
        path = client.save_state("kept").result(60).path
        wanted = client.forward([datum()], "cross_entropy").result(60).metrics["loss:sum"]
    with serve(tmp_path) as (process, url), sdk(url) as service:
        client = service.create_training_client_from_state_with_optimizer(path).result(60)
        assert client.forward([datum()], "cross_entropy").result(60).metrics["loss:sum"] == wanted


def told(*command):
    done = subprocess.run([TICKWORK, "serve", *command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_mistakes_are_told_in_a_line(tmp_path):
    store = ["--store", str(tmp_path)]
    assert "--model" in told(*store)
    assert "nobody/nothing" in told("--model", "nobody/nothing", *store)
    assert "loopback" in told("--model", TINY, "--host", "0.0.0.0", *store)
    with serve(tmp_path / "other") as (_, url):
        assert "listened" in told("--model", TINY, "--port", url.rsplit(":", 1)[1], *store)
