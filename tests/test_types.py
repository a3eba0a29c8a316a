"""The values a caller builds: copies, layouts, dtypes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tickwork import Datum, EncodedTextChunk, InvalidRequestError, ModelInput, TensorData
from tickwork.convert import as_data
from tickwork.results import ParsedCheckpointTinkerPath

FLOATS = arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=2), elements=st.floats(-9, 9, width=32))


@given(FLOATS)
def test_arrays_and_tensors_come_back_as_they_were(array: np.ndarray) -> None:
    """Numpy and torch round-trip, and the list is flat."""
    for made in (TensorData.from_numpy(array), TensorData.from_torch(torch.from_numpy(array))):
        np.testing.assert_array_equal(made.to_numpy(), array)
        np.testing.assert_array_equal(made.to_torch().numpy(), array)
        assert made.data == array.reshape(-1).tolist()
        assert made.tolist() == array.tolist()


@given(arrays.arrays(np.float32, (6, 8), elements=st.sampled_from([0.0, 0.0, 0.0, 1.5, -2.0])))
def test_sparse_and_dense_say_the_same(array: np.ndarray) -> None:
    """Compressed rows hold the same tensor, and are used only where they are smaller."""
    made = TensorData.from_torch_sparse(torch.from_numpy(array))
    smaller = 7 + 2 * np.count_nonzero(array) < array.size

    np.testing.assert_array_equal(made.to_numpy(), array)
    assert (made.sparse_crow_indices is not None) == smaller


@given(FLOATS)
def test_bytes_are_taken_as_they_are(array: np.ndarray) -> None:
    """Whatever was made of them can not be changed."""
    made = TensorData.from_bytes(array.tobytes(), "float32", array.shape)

    np.testing.assert_array_equal(made.to_numpy(), array)
    np.testing.assert_array_equal(made.flat, array.reshape(-1))
    assert TensorData.from_bytes(array.tobytes(), "float32").shape == (array.size,)
    with pytest.raises(ValueError, match="read-only"):
        made.flat[0] = 1


@pytest.mark.parametrize(
    ("data", "shape", "message"),
    [(bytes(9), None, "9 bytes are no whole number of int64"), (bytes(16), [3], "does not hold 2 values")],
)
def test_bytes_that_are_no_tensor_are_refused(data: bytes, shape: list[int] | None, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        TensorData.from_bytes(data, "int64", shape)


def test_what_was_handed_over_is_a_copy() -> None:
    """Changing the caller's array later changes nothing."""
    array = np.ones(3, np.float32)
    made = TensorData.from_numpy(array)
    array[0] = 7

    assert made.data == [1, 1, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([True]), "neither float nor signed integer"),
        (np.array([1], np.uint8), "neither float nor signed integer"),
        (torch.ones(2, requires_grad=True), "requires grad"),
        ([[1, 2], [3]], "not a rectangular list"),
        ("text", "is not a TensorData"),
    ],
)
def test_other_kinds_are_refused_by_name(value: object, message: str) -> None:
    """What is neither float nor integer, ragged, or tied to autograd, names its key."""
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Datum(ModelInput.from_ints([1]), {"weights": value})

    assert caught.value.field == "loss_fn_inputs['weights']"


def test_lists_take_their_dtype_from_the_name() -> None:
    """Targets are integers, weights floats, and a list under another name is refused."""
    datum = Datum(ModelInput.from_ints([1]), {"target_tokens": [1], "weights": [1]})

    assert (datum.loss_fn_inputs["target_tokens"].dtype, datum.loss_fn_inputs["weights"].dtype) == ("int64", "float32")
    with pytest.raises(InvalidRequestError, match="has no dtype under this name"):
        Datum(ModelInput.from_ints([1]), {"mine": [1.0]})
    with pytest.raises(InvalidRequestError, match="expects integers"):
        Datum(ModelInput.from_ints([1]), {"target_tokens": [1.5]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], "float16"), "not one of 'float32', 'int64'"),
        (([1.0], "float32", [2]), "does not hold 1 values"),
        (([1.0], "float32", [2, 2], [0, 1, 1]), "go together"),
        (([1.0], "float32", [2, 2], [0, 1], [0]), "row starts do not describe"),
        (([1.0], "float32", [2, 2], [0, 1, 1], [2]), "column lies outside"),
        (([1.0], "float32", [-1, -1]), "does not hold 1 values"),
        (([], "float32", [2**32, 2**32]), "does not hold 0 values"),
        (([1.5], "int64"), "holds what is not int64"),
        (([float("nan")], "int64"), "holds what is not int64"),
        (([2**64 - 1], "int64"), "holds what is not int64"),
        (([1e300], "int64"), "holds what is not int64"),
        (([1e300], "float32"), "holds what is not float32"),
    ],
)
def test_layouts_are_checked(arguments: tuple[object, ...], message: str) -> None:
    """A shape that the values do not fill, or rows that are none, are refused."""
    with pytest.raises(InvalidRequestError, match=message):
        TensorData(*arguments)  # type: ignore[arg-type]


def test_a_sparse_tensor_of_any_shape_is_not_laid_out() -> None:
    """A few bytes can not ask for all memory."""
    with pytest.raises(InvalidRequestError, match="more than 67108864 cells"):
        TensorData([1], "int64", [1, 2**40], [0, 1], [0]).to_numpy()


def test_chunks_are_read_one_after_the_other() -> None:
    """Appending makes a new sequence and leaves the old one."""
    start = ModelInput.from_ints([1, 2])
    longer = start.append(EncodedTextChunk([3])).append_int(4)

    assert (start.to_ints(), longer.to_ints(), longer.length) == ([1, 2], [1, 2, 3, 4], 4)


def test_chunks_that_are_not_text_are_refused_by_name() -> None:
    """An image names its datum and chunk."""

    class Image:
        type = "image"

    class Input:
        chunks = (EncodedTextChunk([1]), Image())

    class Foreign:
        def __init__(self) -> None:
            self.model_input = Input()
            self.loss_fn_inputs: dict[str, object] = {}

    with pytest.raises(InvalidRequestError, match=r"data\[0\]: model_input.chunks\[1\]: 'image' is not offered"):
        as_data([Foreign()])


def test_a_path_has_three_parts() -> None:
    """Run, kind and name are read out of a checkpoint's path."""
    parsed = ParsedCheckpointTinkerPath.from_tinker_path("tinker://s:train:0/sampler_weights/final")

    assert (parsed.training_run_id, parsed.kind, parsed.name) == ("s:train:0", "sampler_weights", "final")
    assert (parsed.checkpoint_type, parsed.checkpoint_id) == ("sampler", "sampler_weights/final")
