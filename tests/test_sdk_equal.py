"""One script, word for word the same, through the official SDK and in process: the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import tinker

import tickwork
from served import TINY, sdk

SCRIPT = """
import {package} as tinker
from {package} import types

TEXTS = [[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7], [1, 2, 3, 4, 5], [40, 30, 20, 10, 20, 30]]


def data(**more):
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(text[:-1]),
            loss_fn_inputs={{"target_tokens": text[1:], **{{key: make(text) for key, make in more.items()}}}},
        )
        for text in TEXTS
    ]


def run(service):
    client = service.create_lora_training_client(base_model="tickwork/tiny", rank=8, seed=11).result()
    numbers, adam = [], types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0, weight_decay=0.01)

    def told(out):
        numbers.append(out.metrics["loss:sum"])
        numbers.extend(x for item in out.loss_fn_outputs for x in item["logprobs"].tolist())

    sft = data(weights=lambda text: [1.0] * (len(text) - 1))
    for _ in range(4):
        passed, stepped = client.forward_backward(sft, "cross_entropy"), client.optim_step(adam)
        told(passed.result())
        numbers.append(stepped.result().metrics["optim/grad_norm"])
    told(client.forward(sft, "cross_entropy").result())
    rl = data(
        logprobs=lambda text: [-2.0 - 0.1 * i for i in range(len(text) - 1)],
        advantages=lambda text: [(-1.0) ** i for i in range(len(text) - 1)],
    )
    for loss, config in (("importance_sampling", None), ("ppo", {{"clip_low_threshold": 0.8}}), ("cispo", None)):
        told(client.forward_backward(rl, loss, loss_fn_config=config).result())
        client.optim_step(adam).result()

    def custom(given, logprobs):
        return sum((lp**2).sum() for lp in logprobs), {{"mine:sum": 1.0}}

    told(client.forward_backward_custom(sft, custom).result())
    client.optim_step(adam).result()
    saved = client.save_state("equal").result().path
    told(client.forward(sft, "cross_entropy").result())
    again = service.create_training_client_from_state_with_optimizer(saved).result()
    told(again.forward_backward(sft, "cross_entropy").result())
    again.optim_step(adam).result()
    sampler = again.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TEXTS[0])
    numbers.extend(x for x in sampler.compute_logprobs(prompt).result() if x is not None)
    for params in (types.SamplingParams(max_tokens=8, temperature=0.0), types.SamplingParams(max_tokens=8, seed=5)):
        drawn = sampler.sample(prompt, 2, params, topk_prompt_logprobs=2, include_prompt_logprobs=True).result()
        for sequence in drawn.sequences:
            numbers.extend([*sequence.tokens, *sequence.logprobs])
        numbers.extend(x for row in drawn.topk_prompt_logprobs if row for pair in row for x in pair)
    return numbers
"""


def run(package, service):
    space: dict = {}
    exec(SCRIPT.format(package=package), space)
    return np.array(space["run"](service))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_same_numbers(server_url, tmp_path):
    with sdk(server_url) as service:
        served = run("tinker", service)
    with tickwork.ServiceClient(store=tmp_path) as service:
        in_process = run("tickwork", service)
    assert served.shape == in_process.shape
    assert served.size > 200
    np.testing.assert_allclose(served, in_process, rtol=1e-6, atol=1e-6)


def test_the_official_package_is_the_pinned_one():
    assert tinker.__version__ == "0.38.0"
    assert TINY in [model.model_name for model in tickwork.models.supported()]
