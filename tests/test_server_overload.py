"""What grows with requests has a bound, and what clients leave behind goes: in virtual time."""

from __future__ import annotations

import gc
import resource
from collections import Counter

import pytest
import trio

from fakes import Client, Device, fake_server
from served import PROTOBUF, TINY, datum, pass_body
from test_server_isolation import LOSS, PROMPT
from tickwork.server import completions, sessions
from tickwork.server.completions import Completions
from tickwork.server.lanes import Lane
from tickwork.server.promises import Promise

KINDS = (sessions.Session, sessions.Model, sessions.Sampler, Lane, Promise, Completions)


def living():
    """Count the objects that a server makes for its clients."""
    gc.collect()
    return Counter(type(item).__name__ for item in gc.get_objects() if type(item) in KINDS)


def resident():
    """Return this process's memory in MiB, as it is now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


async def come_and_go(client, count):
    """Open sessions, with models, early requests, samplers, samples and losses for some, and leave them all."""
    for number in range(count):
        session = await client.session()
        if number % 2 == 0:
            model = await client.model(session)
            assert (await client.optim(model, 1)).status_code == 200
            assert (await client.optim(model, 9)).status_code == 200, "waits for eight that never come"
        if number % 5 == 0:
            ask = {"session_id": session, "sampling_session_seq_id": 0, "base_model": TINY}
            sampler = (await client.ok("create_sampling_session", ask))["sampling_session_id"]
            draw = {"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": {"max_tokens": 9}}
            await client.ok("asample", draw)
        if number % 10 == 0:
            await client.ok("create_custom_loss", {"session_id": session, "custom_loss_seq_id": 0, **LOSS})
        if number % 3 == 0:
            await client.ok(f"sessions/{session}/finish", {"reason": {"type": "errored"}})


async def test_a_thousand_dropped_sessions_leave_nothing(autojump_clock):
    """Nobody says good-bye, fetches anything, or sends a heartbeat; after a while it is as if nobody had come."""
    bounds = {"max_models": 1000, "max_samplers": 50, "session_seconds": 600, "result_seconds": 600}
    async with fake_server(**bounds) as server, Client(server) as client:
        before, sizes = living(), []
        for count in (250, 250, 500):
            await come_and_go(client, count)
            assert len(server.sessions) == count
            assert server.promises.weight("") > 0
            await trio.sleep(2 * server.settings.session_seconds + 30)
            assert living() == before
            sizes.append(resident())
        assert sizes[2] - sizes[1] < 4
        assert (len(server.sessions), len(server.promises), len(server.promises._in_flight)) == (0, 0, 0)
        assert server.sessions.held() == {"sessions": 0, "models": 0, "samplers": 0}
        assert (server.promises.pending, server.promises.unfetched, server.under_way) == (0, set(), {})
        assert server.bodies.held == 0
        assert not server.engine.statistics().lanes
        assert not server.engine._planner._shares
        assert not server.engine._count._live


async def test_a_heartbeat_keeps_a_session(autojump_clock):
    async with fake_server() as server, Client(server) as client:
        kept, lost = await client.session(), await client.session()
        for _ in range(5):
            await trio.sleep(server.settings.session_seconds - 100)
            await client.ok("session_heartbeat", {"session_id": kept})
        assert (await client.post("session_heartbeat", json={"session_id": lost})).status_code == 410
        assert server.sessions.held()["sessions"] == 1


async def test_tokens_are_held_until_they_are_fetched_or_their_time_is_over(autojump_clock):
    """A client that never fetches is held back, and what it left behind gives its tokens back."""
    async with fake_server(max_tokens_in_flight=25, result_seconds=600) as server, Client(server) as client:
        model = await client.model(await client.session())

        async def passes(seq_id):
            body = pass_body(model, seq_id, [datum()])
            return await client.post("forward_backward", content=body, headers={"content-type": PROTOBUF})

        first = (await passes(1)).json()["request_id"]
        await passes(2)
        assert server.promises.weight("") == 20
        await trio.sleep(60)
        assert (await passes(4)).status_code == 429
        assert (await client.post("retrieve_future", json={"request_id": first})).status_code == 200
        assert server.promises.weight("") == 10
        assert (await passes(3)).status_code == 200
        await trio.sleep(620)
        assert server.promises.weight("") == 0


async def test_requests_without_tokens_are_bounded_too(autojump_clock):
    async with fake_server(max_results=20) as server, Client(server) as client:
        model = await client.model(await client.session())
        early = [(await client.optim(model, number)).status_code for number in range(3, 30)]
        assert early.count(200) == 19
        full = await client.optim(model, 25)
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        for number in (1, 2):
            assert (await client.optim(model, number)).status_code == 200, "the others wait for it"
        with trio.fail_after(60):
            while server.promises.pending:
                await trio.sleep(1)
        refused = await client.optim(model, 22)
        assert refused.status_code == 429
        for number in range(1, 22):
            await client.post("retrieve_future", json={"request_id": f"{model}:r{number}"})
        assert (await client.optim(model, 22)).status_code == 200


async def test_fetched_results_are_bounded(autojump_clock):
    """The oldest go before their time when there are many."""
    async with fake_server(max_results=10) as server, Client(server) as client:
        model = await client.model(await client.session())
        for number in range(1, 50):
            assert (await client.optim(model, number)).status_code == 200
            await trio.testing.wait_all_tasks_blocked()
            await client.post("retrieve_future", json={"request_id": f"{model}:r{number}"})
        assert len(server.promises) == 10 + 1
        assert (await client.post("retrieve_future", json={"request_id": f"{model}:r49"})).status_code == 200
        assert (await client.post("retrieve_future", json={"request_id": f"{model}:r1"})).status_code == 404


async def test_what_is_not_done_can_not_be_called_retrieved(autojump_clock):
    """Else a client could have its tokens back while they are drawn."""
    async with fake_server(Device(draw_cost=100.0)) as server, Client(server) as client:
        session = await client.session()
        ask = {"session_id": session, "sampling_session_seq_id": 0, "base_model": TINY}
        sampler = (await client.ok("create_sampling_session", ask))["sampling_session_id"]
        draw = {"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": {"max_tokens": 9}}
        request_id = (await client.ok("asample", draw))["request_id"]
        told = {"target": {"sampling_session_id": sampler}, "timeout": 0.0, "retrieved_request_ids": [request_id]}
        await client.ok("retrieve_futures", told)
        assert server.promises.weight("") == 10
        assert (await client.ok("cancel_future", {"request_id": request_id}))["cancelled"]
        await trio.sleep(200)
        assert server.promises.weight("") == 0, "nobody waits for it any more"


async def test_samples_without_a_bound_weigh_the_context(autojump_clock):
    async with fake_server(max_tokens_in_flight=5000) as server, Client(server) as client:
        ask = {"session_id": await client.session(), "sampling_session_seq_id": 0, "base_model": TINY}
        sampler = (await client.ok("create_sampling_session", ask))["sampling_session_id"]
        draw = {"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": {}}
        context = server.contexts[TINY]
        most = 5000 // context
        refused = await client.post("asample", json={**draw, "num_samples": most + 1})
        assert refused.status_code == 422
        assert "5000 are the most" in refused.text
        await client.ok("asample", {**draw, "num_samples": most})
        assert server.promises.weight("") == 1 + most * context


async def test_sessions_of_a_key_are_bounded(autojump_clock):
    """Ended ones make room, living ones do not."""
    async with fake_server(max_sessions=3) as server, Client(server) as client:
        first, *_ = [await client.session() for _ in range(3)]
        refused = await client.post("create_session", json={"tags": []})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        await client.ok(f"sessions/{first}/finish", {"reason": {"type": "success"}})
        await client.session()
        assert len(server.sessions) == 3
        assert (await client.get(f"sessions/{first}")).status_code == 404


async def test_a_session_keeps_little(autojump_clock):
    """Names, tags and metadata have a size, and bodies that hold no data are small."""
    async with fake_server() as server, Client(server) as client:
        for wrong in (
            {"user_metadata": {"a": "b" * 2**16}},
            {"display_name": "x" * 1001},
            {"tags": ["x"] * 257},
            {"tags": ["x" * 1001]},
            {"project_id": "x" * 1001},
        ):
            assert (await client.post("create_session", json=wrong)).status_code == 422, wrong
        assert (await client.post("create_session", json={"display_name": "x" * 2**20})).status_code == 413


async def test_models_and_losses_of_a_session_are_bounded(autojump_clock, monkeypatch):
    monkeypatch.setattr(sessions, "MOST_MADE", 4)
    monkeypatch.setattr(sessions, "MOST_LOSSES", 2)
    async with fake_server() as server, Client(server) as client:
        session = await client.session()
        for number in range(4):
            await client.ok("unload_model", {"model_id": await client.model(session, number)})
        ask = {"session_id": session, "model_seq_id": 4, "base_model": TINY}
        assert "new session" in (await client.post("create_model", json=ask)).text
        losses = [{"session_id": session, "custom_loss_seq_id": number, **LOSS} for number in range(3)]
        assert [(await client.post("create_custom_loss", json=loss)).status_code for loss in losses] == [200, 200, 403]
        assert (await client.post("create_custom_loss", json=losses[0])).status_code == 200, "it is there already"


async def test_samplers_known_by_id_are_bounded(autojump_clock, monkeypatch):
    """Those that were let go longest ago are forgotten; the newest stay."""
    monkeypatch.setattr(sessions, "MOST_MADE", 5)
    async with fake_server(max_samplers=2) as server, Client(server) as client:
        session = await client.session()
        for number in range(20):
            ask = {"session_id": session, "sampling_session_seq_id": number, "base_model": TINY}
            await client.ok("create_sampling_session", ask)
            await trio.sleep(1)
        assert server.sessions.held()["samplers"] == 2
        known = (await client.get(f"sessions/{session}")).json()["sampler_ids"]
        assert known == [f"{session}:sample:{number}" for number in range(15, 20)]


async def test_clients_and_completions_of_a_sampler_are_bounded(autojump_clock, monkeypatch):
    """Whoever never asks for completions does not let them pile up."""
    monkeypatch.setattr(completions, "MOST_CLIENTS", 3)
    async with fake_server(refetch_seconds=5) as server, Client(server) as client:
        session = await client.session()
        ask = {"session_id": session, "sampling_session_seq_id": 0, "base_model": TINY}
        name = (await client.ok("create_sampling_session", ask))["sampling_session_id"]
        draw = {"sampling_session_id": name, "prompt": PROMPT, "sampling_params": {"max_tokens": 1}}
        for number in range(20):
            request_id = (await client.ok("asample", {**draw, "seq_id": number}))["request_id"]
            server.promises.fetched(server.promises.find(request_id, ""))
        sampler = server.sessions.sampler(name, "")
        await trio.sleep(60)
        assert sum(len(line.events) for line in sampler.completions._lines.values()) == 0
        target = {"sampling_session_id": name}
        statuses = [
            (
                await client.post(
                    "retrieve_futures", json={"target": {**target, "cloned_sampler_id": clone}, "timeout": 0.0}
                )
            ).status_code
            for clone in range(5)
        ]
        assert statuses == [200, 200, 200, 403, 403]
        assert (await client.post("asample", json={**draw, "seq_id": 7 * completions.CLONE})).status_code == 403


async def test_numbers_given_up_are_not_remembered_for_ever(autojump_clock):
    async with fake_server(gap_seconds=1) as server, Client(server) as client:
        model = await client.model(await client.session())
        for jump in range(1, 6):
            assert (await client.optim(model, jump * 60_000)).status_code == 200
            await trio.sleep(5)
        assert len(server.sessions.model(model, "").lane.given_up) <= 2**16


async def test_what_waits_for_a_number_fails_when_its_model_goes(autojump_clock):
    async with fake_server() as server, Client(server) as client:
        model = await client.model(await client.session())
        held = (await client.optim(model, 5)).json()["request_id"]
        await client.ok("unload_model", {"model_id": model})
        told = await client.ok("retrieve_future", {"request_id": held})
        assert "let go before request 1 came" in told["error"]


async def test_requests_of_a_key_under_way_are_bounded(autojump_clock):
    """Held polls are what there may be many of."""
    async with fake_server(Device(step_cost=1e4), max_requests=3) as server, Client(server) as client:
        model = await client.model(await client.session())
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(lambda: client.post("retrieve_future", json={"request_id": f"{model}:r0"}))
            await trio.testing.wait_all_tasks_blocked()
            full = await client.post("session_heartbeat", json={"session_id": "x"})
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            nursery.cancel_scope.cancel("enough")
        assert server.under_way == {}
        await client.session()


async def test_bodies_all_together_are_bounded(autojump_clock):
    """One alone always has room; a second that would be too much is asked to come again."""
    async with fake_server(max_bodies=1024) as server, Client(server) as client:
        sent = trio.Event()

        async def slowly():
            yield b'{"tags": [], "display_name": "' + b"x" * 900
            await sent.wait()
            yield b'"}'

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: client.post("create_session", content=slowly()))
            await trio.testing.wait_all_tasks_blocked()
            assert server.bodies.held > 900
            other = await client.post("create_session", json={"display_name": "y" * 500})
            assert (other.status_code, other.headers["retry-after"]) == (429, "1")
            sent.set()
        assert server.bodies.held == 0
        assert (await client.post("create_session", json={"display_name": "y" * 1000})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:9"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example:80"}, 403),
        ({"host": "127.0.0.1@evil.example"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
    ],
)
async def test_a_web_page_can_not_use_an_open_server(autojump_clock, headers, status):
    """Neither by a form, nor by a name that is made to point here."""
    async with fake_server() as server, Client(server) as client:
        assert (await client.get("sessions", headers=headers)).status_code == status
