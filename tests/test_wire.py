"""Bodies and results on the wire: golden bytes of the official SDK, round trips, and no bytes that do anything else."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tinker import types
from tinker.proto.response_conv import deserialize_forward_backward_output

from served import pass_body
from tickwork.errors import InvalidRequestError
from tickwork.results import ForwardBackwardOutput, SampledSequence, SampleResponse
from tickwork.server import wire
from tickwork.tensors import TensorData

# What the official SDK 0.38.0 writes and reads.
REQUEST = bytes.fromhex(
    "0a09733a747261696e3a3010011a440a100a0e0a0c01000000020000000300000012300a0d7461726765745f746f6b656e73121f0a18"
    "0200000000000000030000000000000004000000000000001802220103220370706f2a1d0a12636c69705f6c6f775f7468726573686f"
    "6c64119a9999999999e93f30013a1f0a12636c69705f6c6f775f7468726573686f6c641209099a9999999999e93f"
)
OUTPUT = bytes.fromhex(
    "0a0b41727261795265636f726412470a0b41727261795265636f726412360a086c6f6770726f6273122a0a0c000080bf000000c00000"
    "40c01218000000000000000008000000000000000c00000000000000180118021a130a086c6f73733a73756d110000000000001840"
)
SAMPLE = bytes.fromhex("0a14120805000000060000001a08000000bf000080be12080000c07f0000c0bf")


def opened(body):
    found = wire.open_training(body)
    return found, found.ask()


def test_a_request_of_the_official_sdk():
    found, ask = opened(REQUEST)
    assert (found.model_id, found.seq_id, ask.loss_fn, ask.forward_only) == ("s:train:0", 1, "ppo", True)
    assert ask.config == {"clip_low_threshold": 0.8}
    assert ask.data[0].model_input.to_ints() == [1, 2, 3]
    assert ask.data[0].loss_fn_inputs["target_tokens"].tolist() == [2, 3, 4]
    assert wire.peek_training(REQUEST) == ("s:train:0", 1)


def test_results_as_the_official_sdk_writes_them():
    logprobs = [TensorData([-1.0, -2.0], "float32"), TensorData([-3.0], "float32")]
    output = ForwardBackwardOutput("ArrayRecord", [{"logprobs": each} for each in logprobs], {"loss:sum": 6.0})
    assert wire.training_proto(output) == OUTPUT
    sample = SampleResponse([SampledSequence("stop", [5, 6], [-0.5, -0.25])], prompt_logprobs=[None, -1.5])
    assert wire.sample_proto(sample, ["0"]) == SAMPLE


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), FLOATS), min_size=1, max_size=4))
def test_what_the_sdk_encodes_is_read_back(rows):
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens),
            loss_fn_inputs={"target_tokens": tokens[::-1], "weights": [weight] * len(tokens)},
        )
        for tokens, weight in rows
    ]
    _, ask = opened(pass_body("m", 7, data, config={"a": 0.5, "b": "text"}))
    assert ask.config == {"a": 0.5, "b": "text"}
    for datum, (tokens, weight) in zip(ask.data, rows, strict=True):
        assert datum.model_input.to_ints() == tokens
        assert datum.loss_fn_inputs["target_tokens"].tolist() == tokens[::-1]
        assert datum.loss_fn_inputs["weights"].tolist() == [weight] * len(tokens)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 3), st.data())
def test_outputs_of_any_shapes_are_read_by_the_sdk(lengths, width, data):
    shapes = [(length,) if length % 2 else (length, width) for length in lengths]
    given_ = [data.draw(arrays(np.float32, shape, elements=FLOATS)) for shape in shapes]
    outputs = [{"logprobs": TensorData.from_numpy(each)} for each in given_]
    read = deserialize_forward_backward_output(
        wire.training_proto(ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": 1.0}))
    )
    for got, want in zip(read.loss_fn_outputs, given_, strict=True):
        np.testing.assert_array_equal(got["logprobs"].to_numpy(), want)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_no_bytes_do_anything_else(body):
    wire.peek_training(body)
    with contextlib.suppress(InvalidRequestError):
        opened(body)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, len(REQUEST) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0)
)
def test_no_damage_does_anything_else(changes, cut):
    body = bytearray(REQUEST)
    for place, value in changes:
        body[place] = value
    with contextlib.suppress(InvalidRequestError):
        opened(bytes(body[: 1 + cut % len(body)]))


@settings(max_examples=200)
@given(
    st.fixed_dictionaries({}, optional={"model_id": JSON, "seq_id": JSON, "forward_input": JSON, "type": JSON}) | JSON
)
def test_no_json_does_anything_else(value):
    with contextlib.suppress(InvalidRequestError):
        wire.open_training_json(value, forward_only=True).ask()


def test_a_json_pass_of_an_older_sdk():
    tensor = {"data": [2], "dtype": "int64", "shape": [1]}
    datum = {"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": {"target_tokens": tensor}}
    body = {"model_id": "m", "seq_id": 1, "forward_input": {"data": [datum], "loss_fn": "cross_entropy"}}
    ask = wire.open_training_json(body, forward_only=True).ask()
    assert ask.forward_only
    assert ask.data[0].loss_fn_inputs["target_tokens"].tolist() == [2]
    with pytest.raises(InvalidRequestError, match="surprise"):
        wire.open_training_json({**body, "surprise": 1}, forward_only=True).ask()
