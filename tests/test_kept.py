"""The journal in process: what is written when, what comes back, and what is refused by name."""

from __future__ import annotations

import gc
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import tickwork as tinker
from conftest import Ask, Caller
from journals import change
from keeping import (
    ADAM,
    GUARD,
    TINY,
    Gate,
    bits,
    crashed,
    datum,
    held_loss,
    only,
    service,
    squares,
    targets,
    train,
    until,
)
from served import Raw
from tickwork.errors import ClosedError, InvalidRequestError, JournalError, LossError
from tickwork.journal.codec import encode
from tickwork.journal.journal import Journal
from tickwork.journal.records import IN_PROCESS, TrimRecord
from tickwork.kept import keeper, snapshots
from tickwork.server import Settings, serving

create = partial(tinker.ServiceClient.create_lora_training_client, base_model=TINY, rank=4, seed=7)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A gate before each commit of a journal, which is open to begin with."""
    found = Gate()
    monkeypatch.setattr(keeper, "Journal", partial(Journal, at=found))
    yield found
    found.open()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a snapshot after each result."""
    monkeypatch.setattr(snapshots, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr("tickwork.journal.cost.COST", 0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, str]]:
    """What a run of eight turns is told that nothing happens to, and what it ends as."""
    with tinker.ServiceClient(store=tmp_path_factory.mktemp("calm")) as at:
        client = create(at)
        return without_cycle(train(client, range(8))), bits(at, client)


def without_cycle(told: list[Any]) -> list[Any]:
    """Drop the number of the cycle, which tells when a request ran."""
    return [{**each.metrics, "clock_cycle:unique": 0} for each in told]


def test_a_journal_needs_a_store_and_a_name_that_is_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="give a store too") as refused:
        tinker.ServiceClient(journal="process")
    assert refused.value.field == "journal"
    with pytest.raises(InvalidRequestError, match="'process', 'power' or None"):
        tinker.ServiceClient(store=tmp_path, journal="sometimes")  # type: ignore[arg-type]
    with tinker.ServiceClient(store=tmp_path) as at:
        assert at.resumable() == []
        with pytest.raises(InvalidRequestError, match="journal='process'"):
            at.resume_training_client("some")
        client = create(at)
        assert (client.requests_applied, client.past_results()) == (0, {})


def test_one_store_has_one_journal_open(tmp_path: Path) -> None:
    """Neither a second service nor a server gets in, and neither into a server's."""
    settings = Settings(models=(TINY,), store=tmp_path, port=0)
    with service(tmp_path), pytest.raises(JournalError, match="in use by process"):
        service(tmp_path)
    with service(tmp_path), pytest.raises(JournalError, match="in use by process"), serving(settings):
        pass
    with serving(settings), pytest.raises(JournalError, match="in use by process"):
        service(tmp_path)
    service(tmp_path).close()


def test_acceptance_waits_for_the_request_and_the_future_for_its_result(
    tmp_path: Path, gate: Gate, callers: Caller
) -> None:
    """Before a commit neither is told, though the engine is through; a crash there has neither."""
    store = tmp_path / "store"
    with service(store) as at:
        client = create(at).result(GUARD)
        told: list[Any] = []

        async def script(ask: Ask) -> None:
            told.append(await ask.submit(client.optim_step, ADAM))

        settled = at.statistics().requests
        gate.shut()
        thread = threading.Thread(target=callers.run, args=(script,))
        thread.start()
        until(lambda: at.statistics().requests > settled)
        assert gate.reached.wait(GUARD)
        assert not told
        before = crashed(store, tmp_path / "before")
        # The writer takes what has come meanwhile, the result, in its next commit.
        gate.open()
        thread.join(GUARD)
        assert told[0].result(GUARD).metrics["optim/applied"] == 0
        after = crashed(store, tmp_path / "after")
    assert [applied(each) for each in (before, after)] == [0, 1]


def applied(store: Path) -> int:
    """Return how many requests the one run of a store has accepted."""
    with service(store) as at:
        return at.resumable()[0].requests_applied


def test_a_result_is_shown_once_it_is_written(tmp_path: Path, gate: Gate) -> None:
    """Its request is in one commit, and accepted; its result is in the next, and shown after that."""
    slow, entered, go = held_loss()
    with service(tmp_path) as at:
        client = create(at).result(GUARD)
        future = client.forward_backward_custom([targets(0)], slow)
        assert entered.wait(GUARD)
        gate.shut()
        settled = at.statistics().requests
        go.set()
        until(lambda: at.statistics().requests > settled)
        assert gate.reached.wait(GUARD)
        assert not future.done()
        gate.open()
        assert future.result(GUARD).metrics["datums:sum"] == 1


def test_a_plain_call_in_an_event_loop_does_not_wait_for_the_disk(tmp_path: Path, gate: Gate) -> None:
    async def main() -> None:
        async with tinker.open_service(store=tmp_path, journal="process") as at:
            client = await at.create_lora_training_client_async(TINY, rank=4)
            gate.shut()
            future = client.optim_step(ADAM)
            assert await trio.to_thread.run_sync(gate.reached.wait, GUARD)
            assert not future.done()
            gate.open()
            assert (await future).metrics["optim/applied"] == 0

    trio.run(main)


@pytest.mark.usefixtures("eager")
def test_snapshots_stand_in_for_what_they_cover(tmp_path: Path, calm: Any) -> None:
    with service(tmp_path) as at:
        train(create(at), range(5))
    with service(tmp_path) as at:
        past = at.host.keeper.runs[only(at)].lane
        assert past.snapshot is not None
        assert [each.number for each in past.requests] == list(range(past.snapshot.number + 1, 11))
        client = at.resume_training_client(only(at))
        train(client, range(5, 8))
        assert bits(at, client) == calm[1]


def test_a_run_is_what_it_was_after_a_crash_in_its_middle(tmp_path: Path, calm: Any, callers: Caller) -> None:
    """Results that were shown are told again, and the rest of the script ends as if nothing had been."""
    with service(tmp_path / "store") as at:
        client = create(at)
        told = train(client, range(4))
        client.forward_backward([datum(4), datum(54)], "cross_entropy").result(GUARD)
        store = crashed(tmp_path / "store", tmp_path / "crashed")

    async def script(ask: Ask) -> Any:
        again = await ask(at.resume_training_client, only(at))
        return again, await ask(again.past_results)

    with service(store) as at:
        assert at.resumable()[0].base_model == TINY
        assert at.resumable()[0].lora == tinker.LoraConfig(rank=4, seed=7)
        client, results = callers.run(script)
        assert at.resumable() == []
        assert client.requests_applied == 9
        assert [encode(results[number].value) for number in range(1, 9)] == [encode(each) for each in told]
        assert [results[number].kind for number in (8, 9)] == ["optim_step", "forward_backward"]
        client.optim_step(ADAM)
        train(client, range(5, 8))
        assert bits(at, client) == calm[1]


def test_the_order_of_several_threads_is_the_order_of_the_journal(tmp_path: Path) -> None:
    def steps(turn: int) -> None:
        for place in range(4):
            client.forward_backward([datum(10 * turn + place)], "cross_entropy")
            client.optim_step(tinker.AdamParams(learning_rate=1e-3 * (turn + 1)))

    with service(tmp_path / "store") as at:
        client = create(at).result(GUARD)
        threads = [threading.Thread(target=steps, args=(turn,)) for turn in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUARD)
        client.optim_step(ADAM).result(GUARD)
        store = crashed(tmp_path / "store", tmp_path / "crashed")
        wanted = bits(at, client)
    with service(store) as at:
        client = at.resume_training_client(only(at))
        assert client.requests_applied == 33
        assert bits(at, client) == wanted


def test_a_custom_loss_is_not_called_again(tmp_path: Path) -> None:
    """The gradients that it gave stand for it, also where it took several passes."""
    calls = []

    def counted(data: Any, logprobs: Any) -> Any:
        calls.append(len(data))
        return squares(data, logprobs)

    with service(tmp_path / "store", max_tokens_per_pass=30) as at:
        client = create(at)
        client.forward_backward_custom([targets(0), targets(1)], counted)
        client.optim_step(ADAM)
        future = client.forward_backward_custom([targets(turn) for turn in range(8)], counted)
        assert "logprobs" in future.result(GUARD).loss_fn_outputs[7]
        store = crashed(tmp_path / "store", tmp_path / "crashed")
        wanted = bits(at, client)
    with service(store, max_tokens_per_pass=30) as at:
        assert bits(at, at.resume_training_client(only(at))) == wanted
    assert calls == [2, 8]


def test_a_custom_loss_that_was_not_done_fails_by_name_and_what_follows_runs(tmp_path: Path) -> None:
    slow, entered, go = held_loss()
    with service(tmp_path / "store") as at:
        client = create(at)
        train(client, range(1))
        client.forward_backward_custom([targets(2)], slow)
        client.optim_step(ADAM)
        client.forward_backward([datum(3)], "cross_entropy")
        assert entered.wait(GUARD)
        store = crashed(tmp_path / "store", tmp_path / "crashed")
        go.set()
    with service(tmp_path / "other") as at:
        client = create(at)
        train(client, range(1))
        client.forward_backward([datum(3)], "cross_entropy")
        wanted = bits(at, client)
    for turn in range(2):  # it stays failed
        with service(store) as at:
            client = at.resume_training_client(only(at))
            results = client.past_results()
            assert isinstance(results[3].error, LossError)
            assert "slow went with the process that defined it: submit the request again" in str(results[3].error)
            assert results[4].value.metrics["optim/applied"] == 0
            assert "loss:sum" in results[5].value.metrics
            assert client.requests_applied == 5
            if turn:
                assert bits(at, client) == wanted


def test_what_a_service_loaded_outlives_its_checkpoint(tmp_path: Path) -> None:
    """What follows a load may overwrite or delete what was read."""
    with service(tmp_path / "store") as at:
        client = create(at)
        train(client, range(2))
        path = client.save_state("first").result(GUARD).path
        train(client, range(2, 4))
        client.load_state_with_optimizer(path)
        client.forward_backward([datum(5)], "cross_entropy")
        client.optim_step(ADAM)
        sampler = client.save_weights_and_get_sampling_client()
        drawn = sampler.sample(datum(0).model_input, 1, tinker.SamplingParams(max_tokens=3, seed=1))
        client.save_state("first", overwrite=True).result(GUARD)
        assert len(drawn.result(GUARD).sequences[0].tokens) == 3
        other = at.create_training_client_from_state_with_optimizer(path)
        other.forward_backward([datum(6)], "cross_entropy").result(GUARD)
        at.create_rest_client().delete_checkpoint_from_tinker_path(path).result(GUARD)
        store = crashed(tmp_path / "store", tmp_path / "crashed")
        wanted = [bits(at, each) for each in (client, other)]
    with service(store) as at:
        runs = at.resumable()
        assert [run.base_model for run in runs] == [TINY, TINY]
        clients = [at.resume_training_client(run.run_id) for run in runs]
        assert clients[0].past_results()[10].kind == "load_state"
        assert [bits(at, each) for each in clients] == wanted


def test_a_save_that_is_done_again_replaces_what_it_has_saved(tmp_path: Path, gate: Gate) -> None:
    """Its checkpoint was there already, its result was not."""
    slow, entered, go = held_loss()
    with service(tmp_path / "store") as at:
        client = create(at)
        client.forward_backward_custom([targets(0)], slow)
        client.optim_step(ADAM)
        future = client.save_state("once")
        assert entered.wait(GUARD)
        gate.shut()
        go.set()
        until(lambda: bool(at.host.catalogue.checkpoints()))
        assert not future.done()
        store = crashed(tmp_path / "store", tmp_path / "crashed")
        gate.open()
    with service(store) as at:
        client = at.resume_training_client(only(at))
        assert client.past_results()[3].value.path.endswith("weights/once")
        with pytest.raises(tinker.CheckpointError, match="exists"):
            client.save_state("once").result(GUARD)


def test_each_trims_its_own(tmp_path: Path) -> None:
    """A server's trimming leaves runs in process as they are, and that of a run all others."""
    with service(tmp_path) as at:
        clients = [create(at), create(at)]
        for client in clients:
            train(client, range(1))
    journal = Journal(tmp_path)
    journal.trim(settled_before=1e12, fetched_before=1e12).result(GUARD)
    journal.append([TrimRecord(1e12, 1e12, clients[0].model_id)]).result(GUARD)
    journal.close()
    with service(tmp_path) as at:
        first, second = (at.resume_training_client(run.run_id).past_results() for run in at.resumable())
        assert (sorted(first), sorted(second)) == ([], [1, 2])


def test_leaving_waits_for_what_is_not_with_the_engine_yet(tmp_path: Path, gate: Gate) -> None:
    """What follows a load is held back until that is on the disk; a service in a nursery drains it all the same."""

    async def main() -> None:
        async with tinker.open_service(store=tmp_path, journal="process") as at:
            client = await at.create_lora_training_client_async(TINY, rank=4)
            path = (await client.save_state("first")).path
            gate.shut()
            client.load_state(path)
            futures.extend(client.optim_step(ADAM) for _ in range(3))
            trio.lowlevel.spawn_system_task(let_go)

    async def let_go() -> None:
        await trio.to_thread.run_sync(gate.reached.wait, GUARD)
        gate.open()

    futures: list[Any] = []
    trio.run(main)
    assert [future.result(0).metrics["optim/applied"] for future in futures] == [0] * 3
    with service(tmp_path) as at:
        assert [each.error for each in at.resume_training_client(only(at)).past_results().values()] == [None] * 5


def test_what_a_service_that_is_aborted_had_accepted_is_done_by_the_next(tmp_path: Path) -> None:
    slow, entered, go = held_loss()
    with pytest.raises(ZeroDivisionError), service(tmp_path) as at:
        client = create(at)
        client.forward_backward_custom([targets(0)], slow)
        futures = [client.optim_step(ADAM) for _ in range(3)]
        assert entered.wait(GUARD)
        threading.Timer(0.05, go.set).start()
        raise ZeroDivisionError
    with pytest.raises(tinker.EngineStoppedError):
        futures[-1].result(GUARD)
    with service(tmp_path) as at:
        results = at.resume_training_client(only(at)).past_results()
        assert [results[number].error for number in range(1, 5)] == [None] * 4


def test_a_full_disk_fails_requests_by_name_and_keeps_what_was_accepted(tmp_path: Path) -> None:
    with service(tmp_path) as at:
        client = create(at)
        train(client, range(2))
        db = at.host.keeper.journal._database.connection
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count={pages}")
        large = [datum(turn, 300) for turn in range(8)]
        with pytest.raises(JournalError, match="is full: make room"):
            for _ in range(4):
                client.forward_backward(large, "cross_entropy").result(GUARD)
        for ask in (client.optim_step, client.forward):
            with pytest.raises(JournalError, match="is full"):
                ask(ADAM) if ask == client.optim_step else ask([datum(1)], "cross_entropy")
    with service(tmp_path) as at:
        client = at.resume_training_client(only(at))
        assert client.past_results()[4].value.metrics["optim/step"] == 2
        client.optim_step(ADAM).result(GUARD)


def test_a_store_that_can_not_be_written_is_named_by_the_service(tmp_path: Path) -> None:
    (tmp_path / "journal").touch()
    with pytest.raises(JournalError, match="needs a folder it can write"):
        service(tmp_path)


def test_a_damaged_run_is_named_and_others_go_on(tmp_path: Path) -> None:
    with service(tmp_path) as at:
        clients = [create(at), create(at)]
        for client in clients:
            train(client, range(2))
        bad, good = (client.model_id for client in clients)
    change(tmp_path, "UPDATE requests SET body = zeroblob(9) WHERE lane = ? AND number = 3", bad)
    with service(tmp_path) as at:
        assert [run.broken is None for run in at.resumable()] == [False, True]
        assert at.resumable()[0].requests_applied == 2
        with pytest.raises(JournalError, match=r"request 3 .* is damaged"):
            at.resume_training_client(bad)
        at.resume_training_client(good).optim_step(ADAM).result(GUARD)
        at.forget_run(bad).result(GUARD)
        assert at.resumable() == []


def test_a_model_that_can_not_be_brought_back_says_why(tmp_path: Path) -> None:
    """Its journal stays as it is for whoever mends that."""
    with service(tmp_path) as at:
        train(create(at), range(2))
    with service(tmp_path) as at:
        run = only(at)
        # As if the base model's folder had gone meanwhile.
        object.__setattr__(at.host.keeper.runs[run].lane.requests[0].payload, "base_model", "nowhere/nothing")
        client = at.resume_training_client(run)
        step = client.optim_step(ADAM)
        for wait in (client.result, step.result, client.past_results):
            with pytest.raises(tinker.ModelLoadError, match="nowhere"):
                wait()
    with service(tmp_path) as at:
        client = at.resume_training_client(only(at))
        assert client.requests_applied == 5
        assert client.past_results()[5].error is None


def test_a_run_that_is_forgotten_is_gone(tmp_path: Path) -> None:
    with service(tmp_path) as at:
        client, other = create(at), create(at)
        train(client, range(2))
        step = client.optim_step(ADAM)
        at.forget_run(client.model_id).result(GUARD)
        assert step.done()
        with pytest.raises(InvalidRequestError, match="was forgotten"):
            client.optim_step(ADAM)
        with pytest.raises(InvalidRequestError, match="holds no run"):
            at.forget_run(client.model_id)
        with pytest.raises(InvalidRequestError, match="has a client"):
            at.resume_training_client(other.model_id)
        other.optim_step(ADAM).result(GUARD)
    with service(tmp_path) as at:
        assert only(at) == other.model_id
        at.forget_run(other.model_id).result(GUARD)
    with Journal(tmp_path)._database.connection as db:
        counts = [db.execute(f"SELECT count(*) FROM {table}").fetchone() for table in ("requests", "results", "lanes")]
    assert counts == [(0,)] * 3


def test_a_creation_that_failed_is_told_again(tmp_path: Path) -> None:
    with service(tmp_path) as at:
        client = at.create_lora_training_client("nowhere/nothing")
        with pytest.raises(tinker.ModelLoadError):
            client.result(GUARD)
        client = at.create_lora_training_client(TINY, rank=2.5)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="no training model"):
            client.optim_step(ADAM).result(GUARD)
    with service(tmp_path) as at:
        (run,) = at.resumable()
        assert isinstance(run.broken, tinker.ModelLoadError)
        with pytest.raises(tinker.ModelLoadError):
            at.resume_training_client(run.run_id)


@pytest.mark.filterwarnings("ignore::tinker.ExperimentalWarning")
def test_a_server_and_a_service_leave_each_others_models_alone(tmp_path: Path, calm: Any) -> None:
    """One after the other on one store, again and again, each finds its own and nothing else."""
    settings = Settings(models=(TINY,), store=tmp_path, port=0, snapshot_seconds=0, result_seconds=0)
    with service(tmp_path) as at:
        train(create(at), range(4))
    with serving(settings) as url, Raw(url) as raw:
        model = raw.model()
        told = raw.result(raw.optim(model, 1).json()["request_id"])
    with service(tmp_path) as at:
        client = at.resume_training_client(only(at))
        assert sorted(client.past_results()) == list(range(1, 9))
        train(client, range(4, 6))
    with serving(settings) as url, Raw(url) as raw:
        assert raw.result(raw.optim(model, 2).json()["request_id"]).keys() == told.keys()
        raw.result(raw.optim(model, 3).json()["request_id"])
    journal = Journal(tmp_path)
    journal.close()
    for in_process, owner in ((True, IN_PROCESS), (False, "")):
        part = journal.recovered.of(in_process=in_process)
        assert [lane.about.owner for lane in part.lanes] == [owner]
        assert {result.owner for result in part.results} == {owner}
    with service(tmp_path) as at:
        client = at.resume_training_client(only(at))
        train(client, range(6, 8))
        assert bits(at, client) == calm[1]


def test_a_service_that_nobody_holds_any_more_writes_what_it_accepted(tmp_path: Path) -> None:
    at = service(tmp_path)
    client = create(at)
    futures = [client.optim_step(ADAM) for _ in range(3)]
    del at, client
    gc.collect()
    assert futures[-1].result(GUARD).metrics["optim/applied"] == 0
    until(lambda: _lets_in(tmp_path))
    with service(tmp_path) as at:
        assert at.resumable()[0].requests_applied == 3


def test_a_service_that_was_never_used_lets_go_of_its_store(tmp_path: Path) -> None:
    at = service(tmp_path)
    del at
    gc.collect()
    until(lambda: _lets_in(tmp_path))
    at = service(tmp_path)
    at.close()
    with pytest.raises(ClosedError):
        at.forget_run("any")


def _lets_in(store: Path) -> bool:
    try:
        service(store).close()
    except JournalError:
        return False
    return True
