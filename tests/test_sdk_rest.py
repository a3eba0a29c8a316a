"""Runs, checkpoints and sessions through the official RestClient, AdminClient and command line."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyrage
import pytest
import tinker
from tinker import types

from served import TINY, datum, sdk
from tickwork.server import Settings, serving
from tickwork.server.keys import Keys


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    keys = Keys(["tml-anna ann", "tml-bobb bob"])
    with serving(Settings(models=(TINY,), store=tmp_path_factory.mktemp("rest"), port=0, keys=keys)) as url:
        yield url


@pytest.fixture(scope="module")
def service(url):
    with sdk(url, "tml-anna", user_metadata={"team": "a"}, display_name="the first of ann") as client:
        yield client


@pytest.fixture(scope="module")
def client(service):
    client = service.create_lora_training_client(TINY, rank=4, seed=1, user_metadata={"run": "x"}).result(60)
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(types.AdamParams()).result(60)
    client.save_state("one", ttl_seconds=7200, user_metadata={"step": "1"}).result(60)
    client.save_weights_for_sampler("two").result(60)
    client.save_weights_external("three").result(60)
    return client


@pytest.fixture(scope="module")
def rest(url, client):
    return tinker.RestClient(base_url=url, api_key="tml-anna")


def test_capabilities(rest):
    model = rest.get_server_capabilities().result(60).supported_models[0]
    assert (model.model_name, model.trainable, model.sampleable) == (TINY, True, True)
    assert model.max_context_length > 100


def test_runs(rest, client):
    run = rest.get_training_run(client.model_id).result(60)
    assert (run.training_run_id, run.base_model, run.lora_rank, run.is_lora) == (client.model_id, TINY, 4, True)
    assert run.user_metadata == {"team": "a", "run": "x"}
    assert run.last_checkpoint.tinker_path.endswith("/weights/one")
    by_path = rest.get_training_run_by_tinker_path(f"tinker://{client.model_id}/weights/one").result(60)
    assert by_path.training_run_id == client.model_id
    listed = rest.list_training_runs(limit=1).result(60)
    assert len(listed.training_runs) == 1
    assert listed.cursor.total_count >= 1
    assert rest.list_training_runs(offset=10_000).result(60).training_runs == []


def test_checkpoints(rest, client):
    found = rest.list_checkpoints(client.model_id).result(60).checkpoints
    assert {(c.checkpoint_id, c.checkpoint_type) for c in found} >= {
        ("weights/one", "training"),
        ("sampler_weights/two", "sampler"),
        ("external_weights/three", "external"),
    }
    one = next(c for c in found if c.checkpoint_id == "weights/one")
    assert one.user_metadata == {"step": "1"}
    assert timedelta(hours=1) < one.expires_at - datetime.now(UTC) < timedelta(hours=3)
    assert one.size_bytes > 1000
    info = rest.get_weights_info_by_tinker_path(one.tinker_path).result(60)
    assert (info.base_model, info.lora_rank, info.train_mlp) == (TINY, 4, True)
    assert len(rest.list_user_checkpoints(limit=2).result(60).checkpoints) == 2


def test_ttl_publish_delete(rest, client, url):
    path = client.save_state("passing").result(60).path

    def now():
        found = rest.list_checkpoints(client.model_id).result(60).checkpoints
        return next((c for c in found if c.tinker_path == path), None)

    assert now().expires_at is None
    rest.set_checkpoint_ttl_from_tinker_path(path, 60).result(60)
    assert now().expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result(60)
    assert now().expires_at is None
    bob = tinker.RestClient(base_url=url, api_key="tml-bobb")
    with pytest.raises(tinker.NotFoundError):
        bob.get_weights_info_by_tinker_path(path).result(60)
    rest.publish_checkpoint_from_tinker_path(path).result(60)
    rest.publish_checkpoint_from_tinker_path(path).result(60)
    assert now().public
    assert bob.get_weights_info_by_tinker_path(path).result(60).base_model == TINY
    rest.unpublish_checkpoint_from_tinker_path(path).result(60)
    with pytest.raises(tinker.NotFoundError):
        bob.get_weights_info_by_tinker_path(path).result(60)
    with pytest.raises(tinker.NotFoundError):
        bob.delete_checkpoint_from_tinker_path(path).result(60)
    rest.delete_checkpoint_from_tinker_path(path).result(60)
    assert now() is None
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint(client.model_id, "weights/passing").result(60)


def test_copies(rest, service, client, url):
    path = f"tinker://{client.model_id}/weights/one"
    copy = rest.copy_weights(path, "the-project", ttl_seconds=600).result(60)
    assert copy != path
    mine = service.create_training_client_from_state(copy).result(60)
    assert mine.forward([datum()], "cross_entropy").result(60).metrics == pytest.approx(
        {
            **client.forward([datum()], "cross_entropy").result(60).metrics,
            "clock_cycle:unique": pytest.approx(0, abs=1e9),
        }
    )
    with pytest.raises(tinker.NotFoundError):
        tinker.RestClient(base_url=url, api_key="tml-bobb").copy_weights(path, "theirs").result(60)


def test_downloads_need_no_key_and_may_be_encrypted(rest, client):
    urls = rest.get_external_weights_urls(f"tinker://{client.model_id}/external_weights/three").result(60)
    assert urls.expires > datetime.now(UTC)
    assert set(urls.urls) >= {"adapter_config.json", "adapter_model.safetensors"}
    with urllib.request.urlopen(urls.urls["adapter_config.json"]) as answer:
        assert json.load(answer)["r"] == 4
    changed = urls.urls["adapter_config.json"].replace("adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(changed)
    secret = pyrage.x25519.Identity.generate()
    client.save_weights_external("sealed", age_encryption_recipients=[str(secret.to_public())]).result(60)
    sealed = rest.get_external_weights_urls(f"tinker://{client.model_id}/external_weights/sealed").result(60)
    assert all(name.endswith(".age") for name in sealed.urls)
    with urllib.request.urlopen(sealed.urls["adapter_config.json.age"]) as answer:
        assert json.loads(pyrage.decrypt(answer.read(), [secret]))["r"] == 4


def test_sessions(rest, service, client):
    session = client.model_id.split(":")[0]
    assert session in rest.list_sessions().result(60).sessions
    found = rest.get_session(session).result(60)
    assert client.model_id in found.training_run_ids
    assert (found.user_metadata, found.display_name) == ({"team": "a"}, "the first of ann")
    rest.assign_session_project(session, "the-project").result(60)
    listed = rest.list_training_runs(project_id="the-project").result(60)
    assert client.model_id in {run.training_run_id for run in listed.training_runs}
    assert rest.list_training_runs(project_id="another").result(60).training_runs == []
    with pytest.raises(RuntimeError, match="record"):
        rest.export_session_trace(session).result(60)


@pytest.mark.filterwarnings("ignore::tinker.ExperimentalWarning")
def test_search(rest, client):
    session = client.model_id.split(":")[0]
    for ask, hit in [
        ({"display_name": "FIRST ann"}, True),
        ({"display_name": "second"}, False),
        ({"user_metadata": {"team": "a"}}, True),
        ({"user_metadata": {"team": "b"}}, False),
        ({"session_id": session}, True),
        ({"statuses": [{"type": "active"}]}, True),
        ({"statuses": [{"type": "client_finished"}]}, False),
    ]:
        found = rest.search_sessions(types.SessionSearchRequest(**ask)).result(60)
        assert (session in {item.session_id for item in found.sessions}) is hit, ask


def test_samplers(rest, client):
    sampler = client.create_sampling_client(f"tinker://{client.model_id}/sampler_weights/two").result(60)
    sampler_id = json.loads(_decoded(sampler.get_sampler_handle()))
    name = next(value for value in sampler_id.values() if isinstance(value, str) and ":sample:" in value)
    found = rest.get_sampler(name).result(60)
    assert found.base_model.endswith("tiny")
    assert found.model_path.endswith("/sampler_weights/two")


def _decoded(handle):
    import base64

    return base64.urlsafe_b64decode(handle + "=" * (-len(handle) % 4))


def test_what_has_no_meaning_here_is_an_empty_account(url, client):
    admin = tinker.AdminClient(base_url=url, api_key="tml-bobb")
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    assert admin.get_audit_log("checkpoint.published", today.date()).result(60).entries == []
    assert admin.get_billing_usage(today - timedelta(days=1), today).result(60).data == []
    assert admin.get_current_checkpoint_storage_usage().result(60).data == []
    ann = tinker.AdminClient(base_url=url, api_key="tml-anna")
    assert ann.get_current_checkpoint_storage_usage().result(60).data[0].checkpoint_count >= 3


class CommandLine:
    """Runs the official command line against a server."""

    def __init__(self, url, folder):
        self.env = {
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": "tml-anna",
            "HOME": str(folder),
            "COLUMNS": "300",
            "PATH": str(Path(sys.executable).parent),
            "HF_HUB_OFFLINE": "1",
        }
        self.folder = folder

    def __call__(self, *args):
        done = subprocess.run(
            [str(Path(sys.executable).parent / "tinker"), *args],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def json(self, *args):
        return json.loads(self("-f", "json", *args))


@pytest.fixture
def line(url, client, tmp_path):
    return CommandLine(url, tmp_path)


def test_the_command_line_lists(line, client):
    assert TINY in line("model", "list")
    assert client.model_id in line("run", "list")
    assert client.model_id in json.dumps(line.json("run", "info", client.model_id))
    assert "weights/one" in line("checkpoint", "list", "--run-id", client.model_id)
    assert "weights/one" in json.dumps(line.json("checkpoint", "info", f"tinker://{client.model_id}/weights/one"))


def test_the_command_line_changes(line, client):
    path = client.save_state("by-line").result(60).path
    for command in (["publish"], ["unpublish"], ["set-ttl", "--ttl", "600"], ["set-ttl", "--remove"]):
        line("checkpoint", command[0], path, *command[1:])
    line("checkpoint", "delete", path, "-y")
    assert "by-line" not in line("checkpoint", "list", "--run-id", client.model_id)


def test_the_command_line_downloads(line, client):
    line("checkpoint", "download", f"tinker://{client.model_id}/weights/one", "-o", "here")
    files = {file.name for file in Path(line.folder, "here").rglob("*") if file.is_file()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}


def test_the_command_line_knows_who_it_is(line):
    line("auth", "status")
    line("billing", "checkpoint-storage")
