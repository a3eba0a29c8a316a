"""Nobody can harm a neighbour, end a device, or lose what was accepted: each case once went wrong."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tickwork
from test_clients import TINY, datum, negative_logprob
from tickwork.catalogue import Catalogue
from tickwork.files import ASIDE

Act = Callable[[tickwork.ServiceClient, tickwork.TrainingClient], Any]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tickwork.ServiceClient]:
    """One service for all tests of this file."""
    with tickwork.ServiceClient(store=tmp_path_factory.mktemp("store")) as service:
        yield service


class Unspeakable(Exception):
    """An error whose text is an error."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class FailsBackward(torch.autograd.Function):
    """A function that can not be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise ValueError("not today")


def raise_unspeakable(data: Any, logprobs: Any) -> Any:
    """Raise what can not be printed."""
    raise Unspeakable


def sample(service: tickwork.ServiceClient, **params: Any) -> Any:
    """Sample from the bare base."""
    sampler = service.create_sampling_client(base_model=TINY)
    return sampler.sample(datum().model_input, 1, tickwork.SamplingParams(max_tokens=1, **params))


def mutated() -> tickwork.Datum:
    """Return a datum whose inputs were spoilt after it was made."""
    spoilt = datum()
    spoilt.loss_fn_inputs["weights"] = object()  # type: ignore[assignment]
    return spoilt


HUGE = 10**400
HARMFUL: dict[str, Act] = {
    "metadata that is no mapping": lambda s, c: c.save_state("a", user_metadata="abc"),  # type: ignore[arg-type]
    "metadata that is no text": lambda s, c: c.save_state("b", user_metadata={"a": Path("x")}),  # type: ignore[dict-item]
    "a time beyond all calendars": lambda s, c: c.save_state("c", ttl_seconds=10**18),
    "a rank beyond all memory": lambda s, c: s.create_lora_training_client(TINY, rank=10**10),
    "a rank beyond all numbers": lambda s, c: s.create_lora_training_client(TINY, rank=10**30),
    "a seed that is no number": lambda s, c: s.create_lora_training_client(TINY, seed="x"),  # type: ignore[arg-type]
    "a base that is a list": lambda s, c: s.create_lora_training_client(["a"]),  # type: ignore[arg-type]
    "a sampler's base that is a list": lambda s, c: s.create_sampling_client(base_model=["a"]),  # type: ignore[arg-type]
    "a token beyond all integers": lambda s, c: c.forward(
        [tickwork.Datum(tickwork.ModelInput.from_ints([2**70]), {"target_tokens": [1], "weights": [1.0]})],
        "cross_entropy",
    ),
    "inputs spoilt afterwards": lambda s, c: c.forward([mutated()], "cross_entropy"),
    "a setting of None": lambda s, c: c.forward([datum()], "dro", {"beta": None}),  # type: ignore[dict-item]
    "a setting beyond all floats": lambda s, c: c.forward([datum()], "dro", {"beta": HUGE}),
    "a metric beyond all floats": lambda s, c: c.forward_backward_custom(
        [datum()], lambda d, lps: (lps[0].sum(), {"a": HUGE})
    ),
    "a complex metric": lambda s, c: c.forward_backward_custom(
        [datum()], lambda d, lps: (lps[0].sum(), {"a": torch.tensor(1j)})
    ),
    "a metric of our name": lambda s, c: c.forward_backward_custom(
        [datum()], lambda d, lps: (lps[0].sum(), {"loss:sum": 0})
    ),
    "a backward that raises": lambda s, c: c.forward_backward_custom(
        [datum()], lambda d, lps: (FailsBackward.apply(lps[0]), {})
    ),
    "an error without words": lambda s, c: c.forward_backward_custom([datum()], raise_unspeakable),
    "a temperature beyond all floats": lambda s, c: sample(s, temperature=HUGE),
    "a temperature close to nothing": lambda s, c: sample(s, temperature=1e-42),
    "a part of a prompt without scores": lambda s, c: s.create_sampling_client(base_model=TINY).sample(
        datum().model_input, 1, tickwork.SamplingParams(max_tokens=1), prompt_logprobs_last_n=2
    ),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_a_bad_argument_harms_its_own_request_alone(service: tickwork.ServiceClient, case: str) -> None:
    """The request fails by name; a neighbour, and the same client, go on."""
    client = service.create_lora_training_client(TINY, rank=1, seed=0)
    neighbour = service.create_lora_training_client(TINY, rank=1, seed=1)
    with pytest.raises(tickwork.RequestFailedError) as caught:
        HARMFUL[case](service, client).result(60)

    assert not isinstance(caught.value, tickwork.EngineStoppedError)
    for each in (neighbour, client):
        assert each.forward([datum()], "cross_entropy").result(60).metrics["loss:sum"] > 0


def test_numpy_numbers_are_numbers(service: tickwork.ServiceClient) -> None:
    """Rank, seed and learning rate may come out of an array."""
    client = service.create_lora_training_client(TINY, rank=np.int64(2), seed=np.int64(3))  # type: ignore[arg-type]
    client.optim_step(tickwork.AdamParams(learning_rate=np.float32(0.5))).result(60)  # type: ignore[arg-type]

    assert (client.get_info().lora_rank, client.get_info().seed) == (2, 3)
    assert client.save_state("numpy").result(60).path


def test_a_device_that_is_not_there_is_named() -> None:
    """A CUDA device out of reach fails the model's creation, not the engine."""
    with tickwork.ServiceClient(device="cuda:99") as service:
        with pytest.raises(tickwork.ModelLoadError, match="device cuda:99 is not there"):
            service.create_lora_training_client(TINY, rank=1).result(60)


def test_a_custom_loss_that_calls_backward_itself_counts_once(service: tickwork.ServiceClient) -> None:
    """What the loss leaves in the gradients of its logprobs is not added to ours."""

    def eager(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = negative_logprob(data, logprobs)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        return loss, metrics

    client = service.create_lora_training_client(TINY, rank=1, seed=0)
    norms = []
    for loss in (negative_logprob, eager):
        client.forward_backward_custom([datum()], loss)
        norms.append(client.optim_step(tickwork.AdamParams(learning_rate=0.0)).result(60).metrics["optim/grad_norm"])

    assert norms[0] == norms[1]


def test_data_may_be_a_generator_and_what_was_submitted_is_fixed(service: tickwork.ServiceClient) -> None:
    """A custom loss sees the datums of a generator; changing a datum later changes no request."""
    client = service.create_lora_training_client(TINY, rank=1, seed=0)
    data = [datum(), datum("other")]
    seen = client.forward_backward_custom((each for each in data), negative_logprob)  # type: ignore[arg-type]
    first = client.forward(data, "cross_entropy")
    data[0].loss_fn_inputs["weights"] = tickwork.TensorData([0.0] * datum().model_input.length, "float32")
    second = client.forward([datum(), datum("other")], "cross_entropy")

    assert seen.result(60).metrics["datums:sum"] == 2
    assert first.result(60).metrics["loss:sum"] == second.result(60).metrics["loss:sum"]


@pytest.mark.parametrize("way", ["asyncio", "close"])
def test_the_device_thread_does_not_wait_for_itself(service: tickwork.ServiceClient, way: str) -> None:
    """A custom loss that waits in another way than ``.result()`` is told so as well."""
    client = service.create_lora_training_client(TINY, rank=1, seed=0)

    async def wait() -> Any:
        return await client.forward([datum()], "cross_entropy")

    def waits(data: Any, logprobs: Any) -> Any:
        return asyncio.run(wait()) if way == "asyncio" else service.close()

    with pytest.raises(tickwork.LossError, match="WrongThreadError"):
        client.forward_backward_custom([datum()], waits).result(60)


def test_a_full_context_can_be_scored(service: tickwork.ServiceClient) -> None:
    """The longest prompt that trains can be scored, and one token drawn after it."""
    prompt = tickwork.ModelInput.from_ints([65] * 512)

    assert len(service.create_sampling_client(base_model=TINY).compute_logprobs(prompt).result(60)) == 512


def test_a_crash_while_overwriting_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """Between the two renames of an overwrite the old folder has stepped aside; opening the store puts it back."""
    with tickwork.ServiceClient(store=tmp_path) as service:
        path = service.create_lora_training_client(TINY, rank=1, seed=0).save_state("best").result(60).path
    folder = Catalogue(tmp_path).folder(path)
    folder.rename(folder.with_name(f"{ASIDE}{folder.name}"))

    assert Catalogue(tmp_path).meta(path).name == "best"


def run(code: str, **settings: Any) -> subprocess.Popen[str]:
    """Start a script of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def test_a_service_that_was_dropped_unclosed_still_drains(tmp_path: Path) -> None:
    """Accepted work is finished, though service and client were local to a function that has returned."""
    code = f"""
        import tickwork
        def main():
            service = tickwork.ServiceClient(store={str(tmp_path)!r})
            service.create_lora_training_client({TINY!r}, rank=1, seed=0).save_state("final")
        main()
    """
    with run(code) as process:
        _, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert len(list(tmp_path.glob("runs/*/weights/final/tickwork.json"))) == 1


DRAINING = {
    "with": "with tickwork.ServiceClient(store=STORE) as service:\n    flood(service)",
    "unclosed": "service = tickwork.ServiceClient(store=STORE)\nflood(service)",
    "asyncio": """
async def main():
    async with tickwork.ServiceClient(store=STORE) as service:
        flood(service)
import asyncio
asyncio.run(main())""",
    "trio": """
async def main():
    async with tickwork.ServiceClient(store=STORE) as service:
        flood(service)
import trio
trio.run(main)""",
}


@pytest.mark.parametrize("way", DRAINING)
def test_control_c_while_draining_ends_soon(tmp_path: Path, way: str) -> None:
    """An interrupt lets only the current pass end, however the service is being left; nothing crashes."""
    code = f"""
import tickwork
STORE = {str(tmp_path)!r}
def flood(service):
    client = service.create_lora_training_client({TINY!r}, rank=1, seed=0)
    tokens = [65] * 400
    inputs = {{"target_tokens": tokens, "weights": [1.0] * 400}}
    data = [tickwork.Datum(tickwork.ModelInput.from_ints(tokens), inputs)] * 4
    for _ in range(3000):
        client.forward_backward(data, "cross_entropy")
    client.save_state("never")
    print("flooded", flush=True)
{DRAINING[way]}
"""
    with run(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "flooded\n"
        while not list(tmp_path.glob("runs/*/run.json")):
            assert process.poll() is None
            time.sleep(0)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)

    assert process.returncode not in (-signal.SIGABRT, -signal.SIGSEGV), errors
    assert "terminate called" not in errors
    assert not list(tmp_path.glob("runs/*/weights/never"))
