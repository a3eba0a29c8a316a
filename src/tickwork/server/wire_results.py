"""Results of passes and samples, as protobuf and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import orjson

from tickwork.results import ForwardBackwardOutput, SampledSequence, SampleResponse
from tickwork.server import schema
from tickwork.tensors import TensorData

# What stands for "no row" among the top logprobs; the SDK turns it into None.
NO_ROW = (0, -99999.0)
_KINDS = {"float32": ("<f4", schema.FLOAT32), "int64": ("<i8", schema.INT64)}


def training_proto(output: ForwardBackwardOutput) -> bytes:
    """Encode a pass's output."""
    message = schema.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type)
    message.metrics.update(output.metrics)
    # One record for each run of datums whose tensors have the same trailing shape: targets of different widths differ.
    for _, group in groupby(output.loss_fn_outputs, _layout):
        _write_record(message.loss_fn_outputs.add(type_tag=output.loss_fn_output_type), list(group))
    return bytes(message.SerializeToString())


def training_json(output: ForwardBackwardOutput) -> bytes:
    """Encode a pass's output for SDKs that read JSON."""
    outputs = [{name: _json(tensor) for name, tensor in item.items()} for item in output.loss_fn_outputs]
    kind = output.loss_fn_output_type
    found = {"loss_fn_output_type": kind, "loss_fn_outputs": outputs, "metrics": output.metrics}
    return orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY)


def sample_proto(response: SampleResponse, sequence_ids: Sequence[str]) -> bytes:
    """Encode samples; the client knows their ids already."""
    message = schema.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
    for sequence in response.sequences:
        _write_sequence(message.sequences.add(), sequence)
    if response.prompt_logprobs is not None:
        scores = [np.nan if score is None else score for score in response.prompt_logprobs]
        message.prompt_logprobs = np.array(scores, "<f4").tobytes()
    if response.topk_prompt_logprobs is not None:
        _write_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs)
    if response.target_prompt_logprobs is not None:
        _write_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs)
    if response.prompt_alt_tokens is not None:
        _write_tensor(message.prompt_alt_tokens.tokens, response.prompt_alt_tokens.tokens)
        _write_tensor(message.prompt_alt_tokens.logprobs, response.prompt_alt_tokens.logprobs)
    return bytes(message.SerializeToString())


def sample_json(response: SampleResponse, sequence_ids: Sequence[str]) -> bytes:
    """Encode samples for clients that read JSON."""
    sequences = [
        {
            "stop_reason": sequence.stop_reason,
            "sequence_id": name,
            "tokens": sequence.tokens,
            "logprobs": sequence.logprobs,
            "topk_logprobs": sequence.topk_logprobs,
        }
        for sequence, name in zip(response.sequences, sequence_ids, strict=True)
    ]
    targets, others = response.target_prompt_logprobs, response.prompt_alt_tokens
    found = {
        "type": "sample",
        "sequences": sequences,
        "prompt_logprobs": response.prompt_logprobs,
        "topk_prompt_logprobs": response.topk_prompt_logprobs,
        "prompt_cache_hit_tokens": response.prompt_cache_hit_tokens,
        "target_prompt_logprobs": None if targets is None else _json(targets),
        "prompt_alt_tokens": None
        if others is None
        else {"tokens": _json(others.tokens), "logprobs": _json(others.logprobs)},
    }
    return orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY)


def _layout(item: dict[str, TensorData]) -> tuple[Any, ...]:
    return tuple((name, tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in sorted(item.items()))


def _write_record(record: Any, items: list[dict[str, TensorData]]) -> None:
    record.num_datums = len(items)
    for name, first in items[0].items():
        kind, dtype = _KINDS[first.dtype]
        parts = [item[name].to_numpy().astype(kind, copy=False).tobytes() for item in items]
        batch = record.fields[name]
        batch.data = b"".join(parts)
        batch.offsets = np.cumsum([0, *map(len, parts)], dtype="<i8").tobytes()
        batch.dtype = dtype
        batch.trailing_shape.extend(first.shape[1:])


def _write_sequence(message: Any, sequence: SampledSequence) -> None:
    message.stop_reason = schema.STOP if sequence.stop_reason == "stop" else schema.LENGTH
    message.tokens = np.array(sequence.tokens, "<i4").tobytes()
    message.logprobs = np.array(sequence.logprobs, "<f4").tobytes()
    if sequence.topk_logprobs is not None:
        _write_topk(message.topk_sampled_logprobs, sequence.topk_logprobs)


def _write_topk(message: Any, rows: Sequence[Sequence[tuple[int, float]] | None]) -> None:
    width = max((len(row) for row in rows if row), default=0)
    message.k, message.length = width, len(rows)
    filled = [_padded(row or (), width) for row in rows]
    message.token_ids = np.array([[token for token, _ in row] for row in filled], "<i4").tobytes()
    message.logprobs = np.array([[score for _, score in row] for row in filled], "<f4").tobytes()


def _padded(row: Iterable[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    found = list(row)
    return found + [NO_ROW] * (width - len(found))


def _write_tensor(message: Any, tensor: TensorData) -> None:
    kind, dtype = _KINDS[tensor.dtype]
    message.dtype = dtype
    message.shape.extend(tensor.shape)
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        message.dense = tensor.to_numpy().astype(kind, copy=False).tobytes()
        return
    message.sparse_csr.values = np.array(tensor.data, kind).tobytes()
    message.sparse_csr.crow_indices = np.array(tensor.sparse_crow_indices, "<i8").tobytes()
    message.sparse_csr.col_indices = np.array(tensor.sparse_col_indices, "<i8").tobytes()


def _json(tensor: TensorData) -> dict[str, Any]:
    found: dict[str, Any] = {"data": tensor.data, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is not None:
        found["sparse_crow_indices"] = list(tensor.sparse_crow_indices)
        found["sparse_col_indices"] = list(tensor.sparse_col_indices)
    return found
