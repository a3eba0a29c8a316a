"""What only a CUDA device can show; run with ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import tickwork
from test_clients import TINY, datum, negative_logprob

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["float32", "bfloat16"])
def service(request: pytest.FixtureRequest) -> Iterator[tickwork.ServiceClient]:
    """A service on the device, in each dtype."""
    with tickwork.ServiceClient(device="cuda", dtype=request.param) as service:
        yield service


def logprobs(service: tickwork.ServiceClient) -> np.ndarray:
    """Return what a fresh adapter gives for one datum."""
    client = service.create_lora_training_client(TINY, rank=4, seed=0)
    return client.forward([datum()], "cross_entropy").result(120).loss_fn_outputs[0]["logprobs"].to_numpy()


def test_logprobs_on_the_device_are_those_of_the_cpu() -> None:
    """In float32 the device and the CPU agree to rounding."""
    with tickwork.ServiceClient(device="cuda", dtype="float32") as service:
        on_device = logprobs(service)
    with tickwork.ServiceClient(device="cpu") as service:
        np.testing.assert_allclose(on_device, logprobs(service), atol=1e-3)


def test_training_lowers_the_loss_under_built_in_and_custom_losses(service: tickwork.ServiceClient) -> None:
    """A few steps on the device learn."""
    client = service.create_lora_training_client(TINY, rank=8, seed=0)
    losses = []
    for _ in range(5):
        losses.append(client.forward_backward([datum()], "cross_entropy"))
        client.optim_step(tickwork.AdamParams(learning_rate=5e-3))
        client.forward_backward_custom([datum()], negative_logprob)
        client.optim_step(tickwork.AdamParams(learning_rate=5e-3))
    values = [loss.result(120).metrics["loss:sum"] for loss in losses]

    assert values[-1] < 0.7 * values[0]


def test_sampler_and_trainer_agree_on_the_device(service: tickwork.ServiceClient) -> None:
    """One forward serves both, so their logprobs differ by rounding alone."""
    client = service.create_lora_training_client(TINY, rank=4, seed=0)
    example = datum()
    last = example.loss_fn_inputs["target_tokens"].data[-1]
    trained = client.forward([example], "cross_entropy").result(120).loss_fn_outputs[0]["logprobs"].to_numpy()
    whole = tickwork.ModelInput.from_ints([*example.model_input.to_ints(), int(last)])
    scored = client.save_weights_and_get_sampling_client().compute_logprobs(whole).result(120)

    np.testing.assert_allclose(np.array(scored[1:], dtype=np.float32), trained, atol=2e-2)
