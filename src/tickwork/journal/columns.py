"""``Column``: one loss input of all datums of a pass as one array, since each value of its own costs time to store."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import chain

import attrs
import numpy as np

from tickwork.errors import JournalError
from tickwork.tensors import TensorData
from tickwork.types import Datum, EncodedTextChunk, ModelInput


@attrs.frozen(eq=False)
class Column:
    """Dense tensors of one dtype and as many dimensions, one after the other.

    Args:
        values: of shape ``(all,)``.
        shapes: of shape ``(tensors, dimensions)``.
    """

    dtype: str
    values: np.ndarray
    shapes: np.ndarray


@attrs.frozen(eq=False)
class Columns:
    """Datums of one chunk of tokens each and the same loss inputs.

    Args:
        tokens: of all datums, of shape ``(all,)``.
        lengths: how many are each datum's.
        inputs: the loss inputs by name.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    inputs: Mapping[str, Column]


def columns_of(data: Sequence[Datum]) -> Columns | None:
    """Return datums field by field; None if they are not alike."""
    chunks = [datum.model_input.chunks[0] for datum in data if len(datum.model_input.chunks) == 1]
    inputs = mapping_of([datum.loss_fn_inputs for datum in data])
    if len(chunks) != len(data) or inputs is None:
        return None
    tokens = list(chain.from_iterable(chunk.tokens for chunk in chunks))
    if set(map(type, tokens)) != {int}:
        return None
    try:
        narrow = array("i", tokens)
    except OverflowError:
        return None
    return Columns(np.array(narrow, "<i4"), np.array([chunk.length for chunk in chunks], "<i8"), inputs)


def datums_of(columns: Columns) -> tuple[Datum, ...]:
    """Return the datums that ``columns_of`` was given.

    Raises:
        JournalError: the columns do not fit together.
    """
    parts = _split(columns.tokens, columns.lengths)
    inputs = mappings_of(columns.inputs, len(parts))
    chunks = [EncodedTextChunk(part.tolist()) for part in parts]
    return tuple(Datum(ModelInput((chunk,)), given) for chunk, given in zip(chunks, inputs, strict=True))


def mapping_of(items: Sequence[Mapping[str, TensorData]]) -> dict[str, Column] | None:
    """Return what mappings of the same names hold, name by name; None if they are not alike."""
    names = list(items[0]) if items else []
    if not names or any(list(item) != names for item in items):
        return None
    columns = {name: _column([item[name] for item in items]) for name in names}
    return {name: column for name, column in columns.items() if column is not None} if all(columns.values()) else None


def mappings_of(columns: Mapping[str, Column], count: int) -> list[dict[str, TensorData]]:
    """Return the mappings that ``mapping_of`` was given.

    Raises:
        JournalError: there are not ``count`` of them in each column, or values too many or too few.
    """
    found = {name: _tensors(column) for name, column in columns.items()}
    if any(len(tensors) != count for tensors in found.values()):
        raise JournalError(f"not every column holds {count} tensors")
    return [{name: tensors[i] for name, tensors in found.items()} for i in range(count)]


def _column(tensors: Sequence[TensorData]) -> Column | None:
    first = tensors[0]
    kinds = {(type(t), t.dtype, len(t.shape), t.sparse_crow_indices is None) for t in tensors}
    if kinds != {(TensorData, first.dtype, len(first.shape), True)} or not first.shape:
        return None
    values = np.concatenate([tensor.flat for tensor in tensors])
    return Column(first.dtype, values, np.array([tensor.shape for tensor in tensors], "<i8"))


def _tensors(column: Column) -> list[TensorData]:
    if column.shapes.ndim != 2 or column.dtype != column.values.dtype:
        raise JournalError("a column is not of its dtype, or its shapes are no table")
    parts = _split(column.values, np.prod(column.shapes, axis=1))
    shapes = column.shapes.tolist()
    return [TensorData(part, column.dtype, shape) for part, shape in zip(parts, shapes, strict=True)]  # type: ignore[arg-type]


def _split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    if values.ndim != 1 or lengths.ndim != 1 or lengths.dtype.kind != "i":
        raise JournalError("a column is no row of values")
    if lengths.min(initial=0) < 0 or sum(lengths.tolist()) != len(values):
        raise JournalError(f"a column of {len(values)} values is cut into others")
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
