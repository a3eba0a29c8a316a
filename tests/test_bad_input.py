"""Bad input: one clear error on that future only, naming the field and the datum; nothing is accumulated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import trio

import tickwork
from test_clients import TINY, datum, negative_logprob
from tickwork import AdamParams, Datum, ModelInput, SamplingParams, TensorData


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tickwork.ServiceClient]:
    """One service for all tests of this file."""
    with tickwork.ServiceClient(store=tmp_path_factory.mktemp("store")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: tickwork.ServiceClient) -> tickwork.TrainingClient:
    """One training client: no bad request may harm the next test's."""
    return service.create_lora_training_client(TINY, rank=2, seed=0)


def changed(**inputs: Any) -> Datum:
    """Return a datum with loss inputs replaced, or left out where None."""
    merged = {**datum().loss_fn_inputs, **inputs}
    return Datum(datum().model_input, {key: value for key, value in merged.items() if value is not None})


N = datum().model_input.length
LONG = ModelInput.from_ints([65] * 513)
NAN = [float("nan")] + [1.0] * (N - 1)

RL_2D = {
    "target_tokens": np.zeros((N, 2), np.int64),
    "logprobs": np.zeros((N, 2), np.float32),
    "advantages": np.zeros((N, 2), np.float32),
}

BAD_DATA: dict[str, tuple[Any, Any, str]] = {
    "empty data": ([], "cross_entropy", r"data: holds no datum"),
    "not a list": (7, "cross_entropy", r"data: int is not a list of Datum"),
    "not a datum": ([datum(), {"a": 1}], "cross_entropy", r"data\[1\]: dict is not a Datum"),
    "unknown loss": ([datum()], "crossentropy", r"loss_fn: 'crossentropy': unknown. Losses: cross_entropy, imp"),
    "unpublished loss": ([datum()], "gspo", r"loss_fn: 'gspo': its formula and defaults are unpublished"),
    "alpha loss": ([datum()], "stable_reinforce", r"formula is unpublished; use 'importance_sampling'"),
    "missing input": ([datum(), changed(weights=None)], "cross_entropy", r"data\[1\]: .*'weights'\]: is missing"),
    "extra input": ([changed(mask=np.ones(N))], "cross_entropy", r"data\[0\]: .*'mask'\]: cross_entropy does not use"),
    "wrong dtype": (
        [changed(weights=TensorData([1] * N, "int64"))],
        "cross_entropy",
        r"data\[0\]: .*'weights'\]: dtype int64 where float32",
    ),
    "wrong length": ([changed(weights=[1.0] * 3)], "cross_entropy", r"data\[0\]: .*'weights'\]: shape \(3,\)"),
    "targets too short": (
        [changed(target_tokens=[1, 2])],
        "cross_entropy",
        r"'target_tokens'\]: shape \(2,\) does not",
    ),
    "two-dimensional targets for RL": (
        [Datum(datum().model_input, RL_2D)],
        "ppo",
        rf"'target_tokens'\]: shape \({N}, 2\) does not fit model_input: \({N},\) is allowed",
    ),
    "target out of vocabulary": ([changed(target_tokens=[264] * N)], "cross_entropy", r"token id 264 at position 0"),
    "token out of vocabulary": (
        [Datum(ModelInput.from_ints([999]), {"target_tokens": [1], "weights": [1.0]})],
        "cross_entropy",
        r"data\[0\]: model_input: token id 999 at position 0; ids are 0 to 263",
    ),
    "negative token": (
        [Datum(ModelInput.from_ints([-1]), {"target_tokens": [1], "weights": [1.0]})],
        "cross_entropy",
        r"token id -1",
    ),
    "NaN weights": ([changed(weights=NAN)], "cross_entropy", r"data\[0\]: .*'weights'\]: nan at position 0"),
    "too long": (
        [Datum(LONG, {"target_tokens": [65] * 513, "weights": [1.0] * 513})],
        "cross_entropy",
        r"data\[0\]: model_input: has 513 tokens; 1 to 512 are allowed",
    ),
    "empty sequence": (
        [Datum(ModelInput.empty(), {"target_tokens": [], "weights": []})],
        "cross_entropy",
        r"data\[0\]: model_input: has 0 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_fails_its_own_future_and_accumulates_nothing(client: tickwork.TrainingClient, case: str) -> None:
    """The error names field and datum; the step after it has nothing to apply; the next request works."""
    data, loss_fn, message = BAD_DATA[case]
    future = client.forward_backward(data, loss_fn)

    with pytest.raises(tickwork.InvalidRequestError, match=message) as caught:
        future.result(60)
    assert caught.value.category == "user"
    assert client.optim_step(AdamParams()).result(60).metrics["optim/applied"] == 0
    assert np.isfinite(client.forward([datum()], "cross_entropy").result(60).metrics["loss:sum"])


def test_an_error_names_the_datum_as_an_attribute(client: tickwork.TrainingClient) -> None:
    """Programs need not parse the message."""
    with pytest.raises(tickwork.InvalidRequestError) as caught:
        client.forward_backward([datum(), changed(weights=NAN)], "cross_entropy").result(60)

    assert caught.value.datum == 1
    assert isinstance(caught.value, ValueError)


BAD_CONFIG: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown setting": ("ppo", {"clip_ratio": 0.2}, r"loss_fn_config\['clip_ratio'\]: ppo takes no such setting"),
    "setting of a loss without any": ("cross_entropy", {"beta": 1.0}, r"takes no such setting, only nothing"),
    "not a number": ("dro", {"beta": "big"}, r"'big' is not a finite number"),
    "not finite": ("dro", {"beta": float("inf")}, r"inf is not a finite number"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_settings_are_honoured_or_refused_by_name(client: tickwork.TrainingClient, case: str) -> None:
    """No setting is taken and ignored."""
    loss_fn, config, message = BAD_CONFIG[case]
    with pytest.raises(tickwork.InvalidRequestError, match=message):
        client.forward_backward([datum()], loss_fn, config).result(60)


def raises(data: Any, logprobs: Any) -> Any:
    """Raise."""
    raise ZeroDivisionError("oops")


def exits(data: Any, logprobs: Any) -> Any:
    """Try to end the program."""
    raise SystemExit(3)


CUSTOM: dict[str, tuple[Any, str]] = {
    "raises": (raises, r"raised ZeroDivisionError: oops \(line \d+ of .*test_bad_input.py\)"),
    "exits": (exits, r"raised SystemExit: 3"),
    "non-scalar": (lambda data, lps: (lps[0], {}), r"must be a scalar float tensor, not \(26,\)"),
    "a number": (lambda data, lps: (1.0, {}), r"must be a scalar float tensor, not float"),
    "detached": (lambda data, lps: (lps[0].detach().sum(), {}), r"is detached"),
    "no metrics": (lambda data, lps: lps[0].sum(), r"must return \(loss, metrics dict\), not Tensor"),
    "odd metrics": (lambda data, lps: (lps[0].sum(), {"a": "b"}), r"metrics of a custom loss must be numbers"),
    "not finite": (lambda data, lps: ((lps[0] * float("inf")).sum(), {}), r"not finite for data\[0\]"),
    "double backward": (
        lambda data, lps: (lps[0].sum().backward(), {}),
        r"must be a scalar float tensor, not NoneType",
    ),
}


@pytest.mark.parametrize("case", CUSTOM)
def test_a_custom_loss_that_is_wrong_fails_its_own_future_only(client: tickwork.TrainingClient, case: str) -> None:
    """A custom loss that raises, or returns what is no loss, adds nothing and harms nobody."""
    loss_fn, message = CUSTOM[case]
    with pytest.raises(tickwork.LossError, match=message):
        client.forward_backward_custom([datum()], loss_fn).result(60)

    assert client.optim_step(AdamParams()).result(60).metrics["optim/applied"] == 0
    assert client.forward_backward_custom([datum()], negative_logprob).result(60).metrics["datums:sum"] == 1
    client.optim_step(AdamParams(learning_rate=0.0)).result(60)


def test_a_custom_loss_may_ignore_logprobs(client: tickwork.TrainingClient) -> None:
    """Logprobs that a loss does not use get no gradient: the result is that of the others alone."""
    both = client.forward_backward_custom([datum(), datum("other")], lambda d, lps: (-lps[0].sum(), {}))
    norm = client.optim_step(AdamParams(learning_rate=0.0)).result(60).metrics["optim/grad_norm"]
    alone = client.forward_backward_custom([datum()], negative_logprob)
    expected = client.optim_step(AdamParams(learning_rate=0.0)).result(60).metrics["optim/grad_norm"]

    assert both.result(60).metrics["loss:sum"] == pytest.approx(alone.result(60).metrics["loss:sum"], rel=1e-6)
    assert norm == pytest.approx(expected, rel=1e-5)


def test_a_custom_loss_that_waits_for_a_future_is_told_so(client: tickwork.TrainingClient) -> None:
    """Waiting on the device thread could never end; it is an error instead."""

    def waits(data: Any, logprobs: list[torch.Tensor]) -> Any:
        client.forward([datum()], "cross_entropy").result()

    with pytest.raises(tickwork.LossError, match="WrongThreadError"):
        client.forward_backward_custom([datum()], waits).result(60)


BAD_ADAM = [("learning_rate", -1.0), ("learning_rate", float("nan")), ("beta1", 1.0), ("beta2", -0.1), ("eps", "small")]


@pytest.mark.parametrize(("name", "value"), [*BAD_ADAM, ("weight_decay", -1), ("grad_clip_norm", float("inf"))])
def test_optimizer_parameters_are_checked(client: tickwork.TrainingClient, name: str, value: Any) -> None:
    """Each hyper-parameter out of its range is named."""
    with pytest.raises(tickwork.InvalidRequestError, match=f"adam_params.{name}"):
        client.optim_step(attrs.evolve(AdamParams(), **{name: value})).result(60)


def test_optim_step_takes_exactly_one_argument(client: tickwork.TrainingClient) -> None:
    """None or both are a TypeError, as in the SDK."""
    with pytest.raises(TypeError, match="exactly one"):
        client.optim_step()
    with pytest.raises(TypeError, match="exactly one"):
        client.optim_step(AdamParams(), adam_params=AdamParams())


BAD_SAMPLING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "negative top_k": ({"top_k": -2}, {}, r"sampling_params.top_k: -2"),
    "top_k 0": ({"top_k": 0}, {}, r"sampling_params.top_k: 0"),
    "top_p 0": ({"top_p": 0.0}, {}, r"sampling_params.top_p"),
    "negative temperature": ({"temperature": -1.0}, {}, r"sampling_params.temperature"),
    "NaN temperature": ({"temperature": float("nan")}, {}, r"sampling_params.temperature"),
    "max_tokens 0": ({"max_tokens": 0}, {}, r"sampling_params.max_tokens"),
    "over the context": ({"max_tokens": 500}, {}, r"leave room for 486 of the model's 512; asked for 500"),
    "negative seed": ({"seed": -1}, {}, r"sampling_params.seed"),
    "mixed stop": ({"stop": ["a", 1]}, {}, r"sampling_params.stop"),
    "empty stop string": ({"stop": ""}, {}, r"sampling_params.stop"),
    "stop id out of vocabulary": ({"stop": [264]}, {}, r"sampling_params.stop"),
    "no samples": ({}, {"num_samples": 0}, r"num_samples: 0"),
    "empty prompt": ({}, {"prompt": ModelInput.empty()}, r"prompt: is empty"),
    "prompt out of vocabulary": ({}, {"prompt": ModelInput.from_ints([1, 300])}, r"prompt: .* at position 1"),
    "prompt too long": ({}, {"prompt": LONG}, r"prompt: 513 tokens; the model's context is 512"),
    "last_n 0": ({}, {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 0}, r"prompt_logprobs_last_n: 0"),
    "too many top logprobs": ({}, {"topk_prompt_logprobs": 265}, r"topk_prompt_logprobs"),
    "alternative tokens": ({}, {"prompt_alt_tokens_k": -2}, r"prompt_alt_tokens_k: -2"),
    "target logprobs": ({}, {"target_prompt_logprobs": [1]}, r"target_prompt_logprobs"),
}


@pytest.mark.parametrize("case", BAD_SAMPLING)
def test_bad_sampling_requests_name_the_field(service: tickwork.ServiceClient, case: str) -> None:
    """A sampling request out of range fails alone, and the sampler goes on."""
    params, arguments, message = BAD_SAMPLING[case]
    sampler = service.create_sampling_client(base_model=TINY)
    given = {"prompt": datum().model_input, "num_samples": 1, **arguments}
    bad = sampler.sample(sampling_params=SamplingParams(**{"max_tokens": 2, **params}), **given)
    good = sampler.sample(datum().model_input, 1, SamplingParams(max_tokens=2, seed=0))

    with pytest.raises(tickwork.InvalidRequestError, match=message):
        bad.result(60)
    assert len(good.result(60).sequences[0].tokens) <= 2


BAD_PATHS = {
    "not a path": ("weights", r"path: 'weights' is not of the form tinker://"),
    "another scheme": ("file://a/weights/b", r"is not of the form"),
    "a slash in the name": ("tinker://run/weights/a/b", r"is not of the form"),
    "unknown kind": ("tinker://run/optimizer/a", r"is not of the form"),
    "unknown": ("tinker://run/weights/nothing", r"there is no checkpoint tinker://run/weights/nothing"),
    "parent folder": ("tinker://../weights/..", r"is not of the form"),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_bad_checkpoint_paths(service: tickwork.ServiceClient, client: tickwork.TrainingClient, case: str) -> None:
    """Loading, resuming and sampling from what is not there say so by name."""
    path, message = BAD_PATHS[case]
    attempts = [
        client.load_state(path),
        client.load_state_with_optimizer(path),
        service.create_training_client_from_state(path),
        service.create_training_client_from_state_with_optimizer(path),
        client.create_sampling_client(path),
    ]
    for attempt in attempts:
        with pytest.raises(tickwork.RequestFailedError, match=message):
            attempt.result(60)


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "x" * 201, "nul\0"])
def test_checkpoint_names_are_checked(client: tickwork.TrainingClient, name: str) -> None:
    """A name that could leave its folder, or hide in it, is refused."""
    for save in (client.save_state, client.save_weights_for_sampler):
        with pytest.raises(tickwork.InvalidRequestError, match="name: "):
            save(name).result(60)


def test_a_taken_name_needs_overwrite(client: tickwork.TrainingClient) -> None:
    """Saving twice under one name is refused, unless asked for."""
    client.save_state("twice").result(60)
    with pytest.raises(tickwork.CheckpointError, match="exists: choose another name or pass overwrite=True"):
        client.save_state("twice").result(60)

    assert client.save_state("twice", overwrite=True).result(60).path.endswith("/twice")


def test_sampler_weights_hold_no_optimizer(client: tickwork.TrainingClient) -> None:
    """Asking for optimizer state that was never saved is refused, not made up."""
    path = client.save_weights_for_sampler("only-weights").result(60).path
    assert path is not None
    with pytest.raises(tickwork.CheckpointError, match="holds no optimizer state"):
        client.load_state_with_optimizer(path).result(60)


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./nowhere"])
def test_an_unknown_base_model_fails_creation_and_all_that_follows(service: tickwork.ServiceClient, name: str) -> None:
    """The client's creation and every later request tell the same cause."""
    client = service.create_lora_training_client(name, rank=2)
    later = client.forward([datum()], "cross_entropy")

    with pytest.raises(tickwork.ModelLoadError, match="base_model"):
        client.result(60)
    with pytest.raises(tickwork.ModelLoadError, match=re.escape("base_model")):
        later.result(60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank: 0"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"train_mlp": False, "train_attn": False, "train_unembed": False}, "nothing to train"),
    ],
)
def test_a_bad_adapter_is_refused(service: tickwork.ServiceClient, arguments: dict[str, Any], message: str) -> None:
    """Rank and layers are checked when the model is made."""
    with pytest.raises(tickwork.InvalidRequestError, match=message):
        service.create_lora_training_client(TINY, **arguments).result(60)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"cycle_period": -1.0}, "cycle_period"),
        ({"max_tokens_per_pass": 0}, "max_tokens_per_pass"),
        ({"merge": 0}, "merge"),
        ({"invariant": "yes"}, "invariant"),
        ({"max_tokens_per_pass": True}, "max_tokens_per_pass"),
        ({"adapter_memory": 0}, "adapter_memory"),
        ({"adapter_memory": 1.5}, "adapter_memory"),
        ({"checkpoint_activations": 1}, "checkpoint_activations"),
    ],
)
def test_a_bad_setting_of_the_service_is_refused(arguments: dict[str, Any], field: str) -> None:
    """A service that can not be is not made."""
    with pytest.raises(tickwork.InvalidRequestError, match=field):
        tickwork.ServiceClient(**arguments)


def test_unknown_arguments_are_refused_by_name() -> None:
    """Nothing is swallowed by a catch-all."""
    with pytest.raises(TypeError, match="project_id"):
        tickwork.ServiceClient(project_id="p")  # type: ignore[call-arg]


def test_use_after_close_is_refused() -> None:
    """A closed service says so, for old clients and new."""
    service = tickwork.ServiceClient()
    client = service.create_lora_training_client(TINY, rank=1, seed=0)
    service.close()
    service.close()

    for call in (lambda: client.optim_step(AdamParams()), lambda: service.create_sampling_client(base_model=TINY)):
        with pytest.raises(tickwork.ClosedError, match="closed"):
            call()


def test_result_on_the_engines_own_thread_is_refused() -> None:
    """Under ``open_service`` a blocking wait would stop the engine it waits for."""

    async def main() -> None:
        async with tickwork.open_service() as service:
            client = await service.create_lora_training_client_async(TINY, rank=1, seed=0)
            future = client.forward([datum()], "cross_entropy")
            with pytest.raises(tickwork.WrongThreadError, match="await the future"):
                future.result()
            assert (await future).metrics["loss:sum"] > 0

    trio.run(main)
