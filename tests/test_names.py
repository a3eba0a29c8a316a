"""No name that a client gives leads out of the store, nor to anything there but its own."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fakes import Client, fake_server
from tickwork.catalogue import Catalogue
from tickwork.errors import InvalidRequestError, TickworkError
from tickwork.files import write_json
from tickwork.records import META, Meta, Run, check_name
from tickwork.results import KIND_TYPES, as_json
from tickwork.server.answers import HttpError
from tickwork.server.server import checkpoint_path
from tickwork.types import LoraConfig

# Names as an attacker makes them, and any text.
TRICKS = [
    "..",
    ".",
    "...",
    "../x",
    "a/../b",
    "..\\x",
    "%2e%2e",
    "%2f",
    "~",
    "~root",
    "/etc/passwd",
    "a\0b",
    "C:\\x",
    "\n",
]
NAMES = st.one_of(
    st.sampled_from(TRICKS),
    st.text(max_size=12),
    st.text("./%~\\\0 aA", max_size=8),
    st.integers(100, 300).map(lambda size: "x" * size),
)
ROOT = Path("/store")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return Catalogue(tmp_path_factory.mktemp("names"))


@given(run=NAMES, kind=st.sampled_from([*KIND_TYPES, "..", "weights/..", ""]), name=NAMES)
@example(run="a", kind="weights", name="\ud800")
def test_a_path_lies_in_its_run_or_is_refused(catalogue, run, kind, name):
    """Exactly three levels below the runs, whatever the parts are."""
    try:
        folder = catalogue.folder(f"tinker://{run}/{kind}/{name}")
    except InvalidRequestError:
        return
    inside = Path(os.path.normpath(folder)).relative_to(catalogue.root / "runs")
    assert folder == catalogue.root / "runs" / inside
    assert len(inside.parts) == 3
    assert inside.parts[1] in KIND_TYPES
    assert not any(part.startswith(".") for part in inside.parts)
    os.fsencode(folder)
    assert len(os.fsencode(inside.parts[2])) <= 255


@given(NAMES, NAMES)
def test_two_names_are_two_folders(catalogue, one, other):
    """No spelling of a name is that of another."""
    found = []
    for name in (one, other):
        try:
            found.append(catalogue.run_folder(name))
        except InvalidRequestError:
            return
    assert (found[0] == found[1]) == (one == other)


@given(run=NAMES, kind=NAMES, name=NAMES)
def test_a_url_names_a_checkpoint_or_none(catalogue, run, kind, name):
    """What the parts of a URL make is a path of the store, or is not there."""
    try:
        folder = catalogue.folder(checkpoint_path(run, kind, name))
    except (HttpError, InvalidRequestError):
        return
    assert folder.parent.parent.parent == catalogue.root / "runs"


@given(NAMES)
def test_a_name_that_is_allowed_is_one_part_of_a_path(name):
    try:
        check_name(name)
    except InvalidRequestError:
        return
    assert len(Path(quote(name, safe="")).parts) == 1


async def test_no_route_reads_or_writes_outside_of_the_store(autojump_clock, tmp_path):
    """A canary beside the store is neither told nor touched, by any route that takes a name."""
    canary = tmp_path / "canary.json"
    canary.write_text('{"secret": "canary"}')
    before = sorted(tmp_path.rglob("*"))
    async with fake_server(store=tmp_path / "store") as server, Client(server) as client:
        for name in ["..", "../..", "../canary.json", "..%2f..%2fcanary.json", "%2e%2e/canary.json", "/canary.json"]:
            for spelled in (name, quote(name, safe="")):
                for method, path in (
                    ("GET", f"training_runs/{spelled}"),
                    ("GET", f"training_runs/{spelled}/checkpoints"),
                    ("DELETE", f"training_runs/{spelled}/checkpoints/weights/{spelled}"),
                    ("DELETE", f"training_runs/x/checkpoints/{spelled}/{spelled}"),
                    ("POST", f"training_runs/{spelled}/checkpoints/weights/{spelled}/publish"),
                    ("PUT", f"training_runs/{spelled}/checkpoints/weights/{spelled}/ttl"),
                    ("GET", f"training_runs/{spelled}/checkpoints/external_weights/{spelled}/external_weights_urls"),
                    ("GET", f"downloads/9999999999/{spelled}/{spelled}/{spelled}/{spelled}"),
                ):
                    answer = await client.request(method, path, json={"ttl_seconds": 5} if method == "PUT" else None)
                    assert answer.status_code < 500, (path, answer.text)
                    assert 'canary"' not in answer.text
            for path in (f"tinker://{name}/weights/x", f"tinker://x/weights/{name}", f"tinker://x/{name}/x", name):
                for route, field in (("weights_info", "tinker_path"), ("copy_weights", "source_path")):
                    assert (await client.post(route, json={field: path})).status_code in (404, 422)
    assert [file for file in before if not file.exists()] == []
    assert canary.read_text() == '{"secret": "canary"}'


def link_of(client, urls):
    return urls["adapter_model.safetensors"].removeprefix("http://localhost:8000/api/v1/")


def put_checkpoint(catalogue, owner=""):
    """Write a checkpoint for download, with one file that is one and a neighbour that is not."""
    run = Run("run", "tickwork/tiny", LoraConfig(), {}, owner=owner)
    catalogue.open_run(run)
    meta = Meta("run", "external_weights", "x", "tickwork/tiny", LoraConfig(), 0, {}, time=datetime.now(UTC))
    folder = catalogue.folder(meta.path)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder.parent / "neighbour").write_bytes(b"canary")
    sizes = {"adapter_model.safetensors": 7}
    write_json(
        folder / META, as_json(Meta(**{**as_json(meta), "lora": LoraConfig(), "time": meta.time, "sizes": sizes}))
    )


async def test_a_link_opens_one_file_for_a_while(autojump_clock, tmp_path, monkeypatch):
    """Any change of a link closes it, and so does time."""
    async with fake_server(store=tmp_path) as server, Client(server) as client, Client(server, None) as stranger:
        put_checkpoint(server.catalogue)
        told = await client.get("training_runs/run/checkpoints/external_weights/x/external_weights_urls")
        link = link_of(client, told.json()["urls"])
        assert (await stranger.get(link)).content == b"weights"
        start, until, signature, run, name, file = link.split("/")
        for changed in (
            [start, str(int(until) + 1), signature, run, name, file],
            [start, until, signature[:-1] + ("0" if signature[-1] != "0" else "1"), run, name, file],
            [start, until, "", run, name, file],
            [start, until, signature.upper(), run, name, file],
            [start, until, signature, "other", name, file],
            [start, until, signature, run, "y", file],
            [start, until, signature, run, name, META],
            [start, until, signature, run, name, "..%2fneighbour"],
            [start, until, signature, run, name, quote("../neighbour", safe="")],
        ):
            answer = await stranger.get("/".join(changed))
            assert answer.status_code in (403, 404), changed
            assert b"weights" not in answer.content
        monkeypatch.setattr("tickwork.server.routes_catalogue.time.time", lambda: int(until) + 1.0)
        assert (await stranger.get(link)).status_code == 403


async def test_a_damaged_checkpoint_does_not_tell_where_it_lies(autojump_clock, tmp_path):
    """The path of a folder is the host's own business; the command line, which runs there, tells it."""
    async with fake_server(store=tmp_path) as server, Client(server) as client:
        put_checkpoint(server.catalogue)
        (server.catalogue.folder("tinker://run/external_weights/x") / META).write_text("{")
        answer = await client.post("weights_info", json={"tinker_path": "tinker://run/external_weights/x"})
        assert answer.status_code == 404
        assert str(tmp_path) not in answer.text
        assert "damaged" in answer.text
        with pytest.raises(TickworkError, match="damaged"):
            server.catalogue.meta("tinker://run/external_weights/x")
