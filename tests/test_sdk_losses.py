"""Custom losses of the official SDK: computed by the client, and by the server from a graph."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from served import TINY, datum, sdk

pytestmark = pytest.mark.filterwarnings("ignore::tinker.ExperimentalWarning")
STEP = types.AdamParams(learning_rate=1e-2)
DATA = [datum(), datum([1, 2, 3, 4], [0.5, -1.0, 2.0])]


def square(logprobs, weights):
    loss = (weights * logprobs**2).sum()
    return loss, {"custom/square:sum": loss, "custom/lowest:mean": logprobs.min()}


@pytest.fixture(scope="module")
def service(server_url):
    with sdk(server_url) as client:
        yield client


def trained(service, act):
    """Train one step by a loss and return what it gave and the logprobs after."""
    client = service.create_lora_training_client(TINY, rank=4, seed=1).result(60)
    out = act(client).result(60)
    client.optim_step(STEP).result(60)
    after = client.forward(DATA, "cross_entropy").result(60)
    return out, np.concatenate([x["logprobs"].to_numpy() for x in after.loss_fn_outputs])


def on_client(data, logprobs):
    parts = [
        square(lp, torch.tensor(d.loss_fn_inputs["weights"].tolist())) for d, lp in zip(data, logprobs, strict=True)
    ]
    loss = torch.stack([part[0] for part in parts]).sum()
    return loss, {"custom/square:sum": float(loss.detach())}


def test_a_loss_of_the_client(service):
    out, _ = trained(service, lambda client: client.forward_backward_custom(DATA, on_client))
    assert out.metrics["loss:sum"] == pytest.approx(out.metrics["custom/square:sum"], rel=1e-5)


def test_a_loss_of_the_server_is_one_pass_with_the_same_effect(service):
    handle = service.create_custom_loss(square, {"logprobs": 1, "weights": 1}).result(60)
    by_graph, after_graph = trained(service, lambda client: client.forward_backward_custom(DATA, handle))
    by_client, after_client = trained(service, lambda client: client.forward_backward_custom(DATA, on_client))
    assert by_graph.metrics["custom/square:sum"] == pytest.approx(by_client.metrics["custom/square:sum"], rel=1e-5)
    assert by_graph.metrics["loss:sum"] == pytest.approx(by_client.metrics["loss:sum"], rel=1e-5)
    assert "surrogate_loss:sum" not in by_graph.metrics
    np.testing.assert_allclose(after_graph, after_client, atol=2e-4)


def test_a_loss_belongs_to_its_session(server_url, service):
    handle = service.create_custom_loss(lambda logprobs: (-logprobs.sum(), {}), {"logprobs": 1}).result(60)
    with sdk(server_url) as other:
        client = other.create_lora_training_client(TINY, rank=4, seed=1).result(60)
        with pytest.raises((tinker.RequestFailedError, ValueError, RuntimeError)):
            client.forward_backward_custom(DATA, handle).result(60)


def test_a_missing_input_is_named(service):
    def needs(logprobs, temper):
        return (logprobs * temper).sum(), {}

    handle = service.create_custom_loss(needs, {"logprobs": 1, "temper": 1}).result(60)
    client = service.create_lora_training_client(TINY, rank=4, seed=1).result(60)
    with pytest.raises((tinker.RequestFailedError, ValueError), match="temper"):
        client.forward_backward_custom(DATA, handle).result(60)
