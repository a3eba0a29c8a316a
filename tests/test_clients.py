"""The clients as a script sees them: one training script run three ways, order, snapshots, checkpoints, endings."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trio

import tickwork as tinker
from conftest import Ask, Caller

TINY = "tickwork/tiny"
ADAM = tinker.AdamParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinker.ServiceClient]:
    """One service for all tests of this file: each test has clients of its own."""
    with tinker.ServiceClient(store=tmp_path_factory.mktemp("store")) as service:
        yield service


def datum(text: str = "pig latin: stone -> onestay", weight: float = 1.0) -> tinker.Datum:
    """Return a datum over the bytes of a text."""
    ids = list(text.encode())
    inputs = {"target_tokens": ids[1:], "weights": [weight] * (len(ids) - 1)}
    return tinker.Datum(tinker.ModelInput.from_ints(ids[:-1]), inputs)


def negative_logprob(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy with weights 1, as a custom loss."""
    return -torch.stack([logp.sum() for logp in logprobs]).sum(), {"datums:sum": float(len(data))}


async def train(ask: Ask, service: tinker.ServiceClient) -> list[Any]:
    """Train a few steps every way there is and return all numbers seen."""
    client = await ask(service.create_lora_training_client, TINY, rank=4, seed=3)
    seen: list[Any] = []
    for _ in range(2):
        first = await ask.submit(client.forward_backward, [datum(), datum("copy: abc -> abc")], "cross_entropy")
        second = await ask.submit(client.forward_backward_custom, [datum("upper: abc -> ABC")], negative_logprob)
        step = await ask.submit(client.optim_step, ADAM)
        seen += [(await ask.wait(each)).metrics for each in (first, second, step)]
    output = await ask(client.forward, [datum()], "cross_entropy")
    sampler = await ask(client.save_weights_and_get_sampling_client)
    params = tinker.SamplingParams(max_tokens=5, seed=1)
    drawn = await ask(sampler.sample, datum().model_input, 2, params)
    scored = await ask(sampler.compute_logprobs, datum().model_input)
    return [*seen, output.loss_fn_outputs[0]["logprobs"].data, [s.tokens for s in drawn.sequences], scored]


def without_cycle(seen: list[Any]) -> list[Any]:
    """Drop the cycle's number: it tells when a request ran, not what it computed."""
    return [{k: v for k, v in x.items() if k != "clock_cycle:unique"} if isinstance(x, dict) else x for x in seen]


def test_one_script_gives_the_same_bits_under_plain_calls_asyncio_and_trio(service: tinker.ServiceClient) -> None:
    """The runner changes nothing: losses, logprobs and samples are equal to the last bit."""
    plain, under_asyncio, under_trio = (
        without_cycle(Caller(kind).run(lambda ask: train(ask, service))) for kind in ("sync", "asyncio", "trio")
    )

    assert plain == under_asyncio == under_trio
    assert plain[0]["loss:sum"] != plain[3]["loss:sum"]


def test_an_engine_in_the_callers_nursery_computes_the_same_bits(service: tinker.ServiceClient, tmp_path: Path) -> None:
    """``open_service`` runs the same engine without a thread of its own."""

    async def main() -> list[Any]:
        async with tinker.open_service(store=tmp_path) as own:
            return await train(Ask("trio"), own)

    assert without_cycle(trio.run(main)) == without_cycle(Caller("sync").run(lambda ask: train(ask, service)))


def test_a_script_in_the_style_of_the_official_sdk_trains_samples_saves_and_resumes(tmp_path: Path) -> None:
    """Both generations of SDK scripts run: ``_async`` with double awaits, and futures at once."""

    async def main() -> tuple[float, float, float]:
        async with tinker.ServiceClient(store=tmp_path) as service_client:
            training_client = await service_client.create_lora_training_client_async(base_model=TINY, rank=8, seed=0)
            tokenizer = training_client.get_tokenizer()
            losses = []
            for _ in range(3):
                fwdbwd_future = await training_client.forward_backward_async([datum()], "cross_entropy")
                optim_future = await training_client.optim_step_async(tinker.types.AdamParams(learning_rate=1e-2))
                fwdbwd_result = await fwdbwd_future
                await optim_future.result_async()
                losses.append(fwdbwd_result.metrics["loss:sum"])
            saved = await (await training_client.save_state_async("step3"))
            sampling_path = training_client.save_weights_for_sampler(name="step3").result(60).path
            sampler = service_client.create_sampling_client(model_path=sampling_path)
            prompt = tinker.types.ModelInput.from_ints(tokenizer.encode("pig latin: stone ->"))
            response = await sampler.sample_async(prompt, 1, tinker.types.SamplingParams(max_tokens=4, stop=["\n"]))
            assert tokenizer.decode(response.sequences[0].tokens)
            resumed = await service_client.create_training_client_from_state_with_optimizer(saved.path)
            again = await resumed.forward([datum()], "cross_entropy")
            here = await training_client.forward([datum()], "cross_entropy")
            return losses[0], here.metrics["loss:sum"], again.metrics["loss:sum"]

    import asyncio

    first, last, resumed = asyncio.run(main())

    assert last < first
    assert resumed == last


def test_a_resumed_model_makes_the_bit_same_next_step(service: tinker.ServiceClient) -> None:
    """Weights and moments come back whole: the step after a resume is the step that would have been."""
    client = service.create_lora_training_client(TINY, rank=4, seed=0)
    for _ in range(2):
        client.forward_backward([datum()], "cross_entropy")
        client.optim_step(ADAM)
    path = client.save_state("here").result().path
    resumed = service.create_training_client_from_state_with_optimizer(path)
    fresh = service.create_training_client_from_state(path)
    seen = []
    for each in (client, resumed, fresh):
        each.forward_backward([datum()], "cross_entropy")
        each.optim_step(ADAM)
        seen.append(each.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data)

    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def test_load_state_rolls_a_living_client_back(service: tinker.ServiceClient) -> None:
    """``load_state`` in the middle of a lane takes effect between the calls around it."""
    client = service.create_lora_training_client(TINY, rank=4, seed=0)
    path = client.save_state("start").result().path
    before = client.forward([datum()], "cross_entropy")
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(ADAM)
    between = client.forward([datum()], "cross_entropy")
    client.load_state(path)
    after = client.forward([datum()], "cross_entropy")

    losses = [future.result().metrics["loss:sum"] for future in (before, between, after)]
    assert losses[0] == losses[2] != losses[1]


def test_a_sampling_client_is_a_fixed_snapshot(service: tinker.ServiceClient) -> None:
    """Training on does not change what a sampling client gives."""
    client = service.create_lora_training_client(TINY, rank=4, seed=0)
    sampler = client.save_weights_and_get_sampling_client()
    before = sampler.compute_logprobs(datum().model_input).result()
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(tinker.AdamParams(learning_rate=0.1)).result()
    later = client.save_weights_and_get_sampling_client()

    assert sampler.compute_logprobs(datum().model_input).result() == before
    assert later.compute_logprobs(datum().model_input).result() != before


def test_sampler_and_trainer_agree_on_logprobs(service: tinker.ServiceClient) -> None:
    """``compute_logprobs`` of input and last target is what training reports, to 1e-5."""
    client = service.create_lora_training_client(TINY, rank=4, seed=0)
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(ADAM)
    example = datum()
    trained = client.forward([example], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    whole = tinker.ModelInput.from_ints(
        [*example.model_input.to_ints(), example.loss_fn_inputs["target_tokens"].data[-1]]
    )
    scored = client.save_weights_and_get_sampling_client().compute_logprobs(whole).result()

    assert scored[0] is None
    np.testing.assert_allclose(scored[1:], trained, atol=1e-5)


def test_calls_from_many_threads_run_in_the_order_in_which_they_were_made(service: tinker.ServiceClient) -> None:
    """Each thread's own calls keep their order, and no step is lost or run twice."""
    client = service.create_lora_training_client(TINY, rank=1, seed=0, train_mlp=False, train_attn=False)
    steps: list[list[float]] = [[] for _ in range(4)]

    def work(mine: list[float]) -> None:
        for _ in range(5):
            client.forward_backward([datum("copy: a -> a")], "cross_entropy")
            mine.append(client.optim_step(ADAM).result().metrics["optim/step"])

    threads = [threading.Thread(target=work, args=(mine,)) for mine in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(mine == sorted(mine) for mine in steps)
    assert max(step for mine in steps for step in mine) <= 20
    assert client.optim_step(ADAM).result().metrics["optim/applied"] == 0


def test_values_of_the_official_package_are_taken(service: tinker.ServiceClient) -> None:
    """Objects with the SDK's attributes stand in for ours, and give the same numbers."""
    mine = datum()
    chunk = SimpleNamespace(type="encoded_text", tokens=mine.model_input.to_ints())
    tensors = {
        key: SimpleNamespace(
            data=value.data,
            dtype=value.dtype,
            shape=list(value.shape),
            sparse_crow_indices=None,
            sparse_col_indices=None,
        )
        for key, value in mine.loss_fn_inputs.items()
    }
    theirs = SimpleNamespace(model_input=SimpleNamespace(chunks=[chunk]), loss_fn_inputs=tensors)
    adam = SimpleNamespace(
        learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0, type="adamw"
    )
    client = service.create_lora_training_client(TINY, rank=4, seed=0)
    ours = client.forward_backward([mine], "cross_entropy").result().metrics["loss:sum"]
    client.optim_step(adam).result()
    other = service.create_lora_training_client(TINY, rank=4, seed=0)

    assert other.forward_backward([theirs], "cross_entropy").result().metrics["loss:sum"] == ours


def test_rest_client_lists_describes_publishes_expires_and_deletes(callers: Caller, tmp_path: Path) -> None:
    """The catalogue follows what the training client saves, whatever the caller runs under."""

    async def script(ask: Ask) -> None:
        client = await ask(service.create_lora_training_client, TINY, rank=2, seed=0, user_metadata={"a": "b"})
        rest = service.create_rest_client()
        path = (await ask(client.save_state, "one", user_metadata={"c": "d"})).path
        await ask(client.save_weights_for_sampler, "two")
        run = await ask(rest.get_training_run, client.model_id)
        assert (run.base_model, run.lora_rank, run.user_metadata) == (TINY, 2, {"a": "b"})
        listed = (await ask(rest.list_checkpoints, client.model_id)).checkpoints
        assert [c.checkpoint_id for c in listed] == ["sampler_weights/two", "weights/one"]
        assert listed[1].user_metadata == {"c": "d"}
        await ask(rest.publish_checkpoint_from_tinker_path, path)
        await ask(rest.set_checkpoint_ttl_from_tinker_path, path, 3600)
        page = await ask(rest.list_user_checkpoints, 1, 1)
        assert (page.cursor.total_count, page.checkpoints[0].public) == (2, True)
        assert page.checkpoints[0].expires_at is not None
        assert (await ask(rest.get_weights_info_by_tinker_path, path)).lora_rank == 2
        await ask(rest.delete_checkpoint, client.model_id, "weights/one")
        assert len((await ask(rest.list_checkpoints, client.model_id)).checkpoints) == 1
        with pytest.raises(tinker.CheckpointError, match="there is no checkpoint"):
            await ask(rest.delete_checkpoint_from_tinker_path, path)
        assert [r.training_run_id for r in (await ask(rest.list_training_runs)).training_runs] == [client.model_id]

    with tinker.ServiceClient(store=tmp_path) as service:
        callers.run(script)


def test_leaving_by_an_exception_fails_what_has_not_run() -> None:
    """The current job ends, the rest fail by name, and the exception goes on."""
    futures: list[Any] = []

    def run() -> None:
        with tinker.ServiceClient() as service:
            client = service.create_lora_training_client(TINY, rank=1, seed=0)
            futures.extend(client.forward_backward([datum()] * 64, "cross_entropy") for _ in range(50))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run()
    with pytest.raises(tinker.EngineStoppedError, match="aborted"):
        futures[-1].result(0)


def test_leaving_normally_drains(tmp_path: Path) -> None:
    """What was accepted is done when the block ends, though nobody waited for it."""
    with tinker.ServiceClient(store=tmp_path) as service:
        client = service.create_lora_training_client(TINY, rank=1, seed=0)
        saved = client.save_state("unwaited")

    assert saved.done()
    with pytest.raises(tinker.ClosedError, match="closed"):
        client.save_state("late")
    assert [c.name for c in (tmp_path / "runs").glob("*/weights/*")] == ["unwaited"]


def test_a_script_that_never_closes_still_drains(tmp_path: Path) -> None:
    """At the interpreter's end accepted work is finished, and the process ends by itself."""
    code = f"""
        import tickwork
        service = tickwork.ServiceClient(store={str(tmp_path)!r})
        service.create_lora_training_client({TINY!r}, rank=1, seed=0).save_state("last")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)

    assert len(list((tmp_path / "runs").glob("*/weights/last/tickwork.json"))) == 1


def test_a_share_is_set_or_refused_by_name(service: tinker.ServiceClient) -> None:
    """``set_share`` reaches the engine's planner, takes numpy's floats, and goes with its client."""
    client = service.create_lora_training_client(TINY, rank=1, seed=0)
    client.set_share(np.float64(2.5))
    shares = vars(service.host.engine)["_planner"]._shares
    assert shares[client.model_id] == 2.5
    with pytest.raises(tinker.InvalidRequestError, match="share: 0"):
        client.set_share(0)
    model_id = client.model_id
    client.forward([datum()], "cross_entropy").result(60)
    del client
    service.create_lora_training_client(TINY, rank=1, seed=0).result(60)  # behind the release
    assert model_id not in shares


def test_the_info_tells_a_hint(service: tinker.ServiceClient, callers: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """``get_info`` has what the engine makes of the client's lane, as of now; None while there is nothing to say."""

    async def script(ask: Ask) -> Any:
        client = await ask(service.create_lora_training_client, TINY, rank=1, seed=0)
        before = await ask(client.get_info)
        monkeypatch.setattr(service.host.engine, "hint", lambda lane: f"of {lane}")
        return client.model_id, before.hint, (await ask(client.get_info)).hint

    model_id, before, after = callers.run(script)
    assert (before, after) == (None, f"of {model_id}")


@pytest.mark.parametrize("settings", [{"invariant": True}, {"invariant": True, "merge": True}, {"merge": False}])
def test_apart_from_others_a_client_gets_the_same_bits(settings: dict[str, bool]) -> None:
    """With passes that are not merged, a neighbour's rows change no bit of a client's results."""

    def logprobs(neighbours: int) -> tuple[list[Any], int]:
        with tinker.ServiceClient(max_tokens_per_pass=64, **settings) as service:  # type: ignore[arg-type]
            clients = [service.create_lora_training_client(TINY, rank=2, seed=n) for n in range(1 + neighbours)]
            clients[0].result(60)
            data = [datum("copy: abc -> abc"), datum(), datum("copy: 12 -> 12")]
            for _ in range(2):
                for client in reversed(clients):
                    client.forward_backward(data, "cross_entropy")
                    client.optim_step(ADAM)
            found = clients[0].forward(data, "cross_entropy").result(60)
            return [out["logprobs"].data for out in found.loss_fn_outputs], service.statistics().passes

    alone, passes = logprobs(0)
    beside, all_passes = logprobs(1)
    assert beside == alone
    assert all_passes == passes + 2 * passes // 3  # the neighbour asks for two of its three batches
