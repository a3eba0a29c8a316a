"""Training bodies of the wire: opened into datums. No I/O; whatever the bytes, only ``InvalidRequestError``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from tickwork.errors import InvalidRequestError
from tickwork.server import schema
from tickwork.server.wire_count import Most, check_counts
from tickwork.server.wire_json import number_of, pass_of
from tickwork.server.wire_results import sample_json, sample_proto, training_json, training_proto
from tickwork.tensors import TensorData, TensorDtype
from tickwork.types import Datum, EncodedTextChunk, ModelInput

__all__ = [
    "Most",
    "TrainingAsk",
    "TrainingBody",
    "open_training",
    "open_training_json",
    "peek_training",
    "sample_json",
    "sample_proto",
    "training_json",
    "training_proto",
]

_DTYPES: dict[int, tuple[str, TensorDtype]] = {schema.FLOAT32: ("<f4", "float32"), schema.INT64: ("<i8", "int64")}


@attrs.frozen
class TrainingAsk:
    """What a training request asks for."""

    data: tuple[Datum, ...]
    loss_fn: str
    config: dict[str, float | str]
    forward_only: bool


@attrs.frozen
class TrainingBody:
    """A body whose number could be read.

    Args:
        ask: gives the rest, or raises ``InvalidRequestError``.
    """

    model_id: str
    seq_id: int
    ask: Callable[[], TrainingAsk]


def open_training(body: bytes, most: Most = Most()) -> TrainingBody:  # noqa: B008  frozen
    """Read the model and the number of a protobuf body; what it holds is counted before it is read.

    Raises:
        InvalidRequestError: they can not be read.
    """
    try:
        check_counts(body, most)
    except InvalidRequestError as error:
        where = peek_training(body)
        if where is None:
            raise
        return TrainingBody(*where, partial(_refused, error))
    message = schema.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except (DecodeError, ValueError, RecursionError):
        where = peek_training(body)
        if where is None:
            raise InvalidRequestError("the body is no ForwardBackwardRequest") from None
        return TrainingBody(
            *where, partial(_refused, InvalidRequestError("the body is a damaged ForwardBackwardRequest"))
        )
    _check_number(message.model_id, message.seq_id)
    return TrainingBody(message.model_id, message.seq_id, lambda: _ask(message))


def _refused(error: InvalidRequestError) -> TrainingAsk:
    raise error


def _check_number(model_id: object, seq_id: object) -> None:
    if not isinstance(model_id, str) or not model_id:
        raise InvalidRequestError("is needed", field="model_id")
    if not isinstance(seq_id, int) or isinstance(seq_id, bool) or not 1 <= seq_id < 2**63:
        raise InvalidRequestError("a whole number from 1 is needed", field="seq_id")


def peek_training(prefix: bytes) -> tuple[str, int] | None:
    """Read the model and the number of a protobuf body from how it begins, where the official SDK puts them."""
    try:
        if prefix[:1] != b"\x0a":
            return None
        size, at = _varint(prefix, 1)
        model_id, at = prefix[at : at + size].decode(), at + size
        if prefix[at : at + 1] != b"\x10":
            return None
        seq_id, _ = _varint(prefix, at + 1)
        _check_number(model_id, seq_id)
    except (IndexError, UnicodeDecodeError, InvalidRequestError):
        return None
    return model_id, seq_id


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise IndexError(at)


def _ask(message: Any) -> TrainingAsk:
    for field in UnknownFieldSet(message):
        raise InvalidRequestError(f"field {field.field_number} of ForwardBackwardRequest is not known")
    data = tuple(_datum(item, index) for index, item in enumerate(message.data))
    return TrainingAsk(data, message.loss_fn, _config(message), message.forward_only)


def _config(message: Any) -> dict[str, float | str]:
    """Read the settings of a loss: newer SDKs send them twice, and then the newer form counts."""
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        kind = value.WhichOneof("alternative")
        if kind is None:
            raise InvalidRequestError("has no value", field=f"loss_fn_config[{key!r}]")
        found = getattr(value, kind)
        if key in config and config[key] != found:
            raise InvalidRequestError("is given twice, differently", field=f"loss_fn_config[{key!r}]")
        config[key] = found
    return config


def _datum(item: Any, index: int) -> Datum:
    try:
        for field in UnknownFieldSet(item):
            raise InvalidRequestError(f"field {field.field_number} of Datum is not known")
        chunks = tuple(_chunk(chunk, place) for place, chunk in enumerate(item.model_input))
        inputs = {name: _tensor(tensor, name) for name, tensor in item.loss_fn_inputs.items()}
        datum = Datum(ModelInput(chunks), inputs)
        _check_spans(item, datum)
        return datum
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), datum=index) from None


def _chunk(chunk: Any, place: int) -> EncodedTextChunk:
    kind = chunk.WhichOneof("alternative")
    if kind != "encoded_text":
        raise InvalidRequestError(
            f"{kind or 'nothing'!r} is not offered: chunks hold token ids", field=f"model_input.chunks[{place}]"
        )
    return EncodedTextChunk(_array(chunk.encoded_text.tokens, "<i4", f"model_input.chunks[{place}]").tolist())


def _array(data: bytes, kind: str, field: str) -> np.ndarray:
    if len(data) % np.dtype(kind).itemsize:
        raise InvalidRequestError(f"{len(data)} bytes are no whole number of {np.dtype(kind).name}", field=field)
    return np.frombuffer(data, kind)


def _tensor(tensor: Any, name: str) -> TensorData:
    field = f"loss_fn_inputs[{name!r}]"
    if tensor.dtype not in _DTYPES:
        raise InvalidRequestError("dtype must be float32 or int64", field=field)
    kind, dtype = _DTYPES[tensor.dtype]
    shape = list(tensor.shape)
    try:
        if tensor.WhichOneof("alternative") != "sparse_csr":
            return TensorData.from_bytes(tensor.dense, dtype, shape or None)
        parts = tensor.sparse_csr
        rows, columns = (_array(part, "<i8", field).tolist() for part in (parts.crow_indices, parts.col_indices))
        return TensorData(_array(parts.values, kind, field), dtype, shape, rows, columns)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error).removeprefix(f"{field}: "), field=field) from None
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(f"is no tensor: {error}", field=field) from None


def _check_spans(item: Any, datum: Datum) -> None:
    """Check provenance: both lists or neither, and each as long as what it describes. No loss reads it."""
    given, targets = item.model_input_spans, item.loss_fn_input_spans
    if bool(given) != bool(targets):
        raise InvalidRequestError("goes together with loss_fn_input_spans", field="model_input_spans")
    if not given:
        return
    wanted = datum.loss_fn_inputs.get("target_tokens")
    lengths = {"model_input_spans": datum.model_input.length, "loss_fn_input_spans": wanted.shape[0] if wanted else 0}
    for name, spans in (("model_input_spans", given), ("loss_fn_input_spans", targets)):
        total = sum(_span_length(span, name) for span in spans)
        if total != lengths[name]:
            raise InvalidRequestError(f"cover {total} of {lengths[name]} tokens", field=name)


def _span_length(span: Any, field: str) -> int:
    kind = span.WhichOneof("alternative")
    if kind is None or getattr(span, kind).length < 0 or getattr(span, kind).offset < 0:
        raise InvalidRequestError("holds what is no span", field=field)
    return int(getattr(span, kind).length)


def open_training_json(value: object, *, forward_only: bool) -> TrainingBody:
    """Read the model and the number of a JSON body, as SDKs before 0.25 send it.

    Raises:
        InvalidRequestError: they can not be read.
    """
    model_id, seq_id = number_of(value)
    _check_number(model_id, seq_id)
    return TrainingBody(model_id, seq_id, lambda: _ask_json(value, forward_only))


def _ask_json(value: object, forward_only: bool) -> TrainingAsk:
    found = pass_of(value, forward_only)
    data = tuple(item.datum(index) for index, item in enumerate(found.data))
    return TrainingAsk(data, found.loss_fn, dict(found.loss_fn_config or {}), forward_only)
