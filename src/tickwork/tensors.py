"""``TensorData``: the values of a loss input, and what is accepted as one. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np

from tickwork.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["float32", "int64"]
_CODES: Mapping[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}

# Cells of what is laid out dense: a sparse tensor of few bytes may claim any shape.
MOST_CELLS = 2**26

# Which dtype a plain Python list gets, by the name of the loss input it is given for.
LIST_DTYPES: Mapping[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}


@attrs.frozen(eq=False, init=False)
class TensorData:
    """A tensor of float32 or int64 values, dense or in compressed sparse rows.

    Args:
        data: the values, flat and in row-major order; copied.
        dtype: ``"float32"`` or ``"int64"``.
        shape: the dense shape; None for a vector of ``len(data)``.
        sparse_crow_indices: row starts of a 2-D CSR tensor, ``rows + 1`` of them; cells not listed are 0.
        sparse_col_indices: column of each listed value.

    Raises:
        InvalidRequestError: unknown dtype, or a shape that the number of values does not fill.
    """

    _values: np.ndarray
    dtype: TensorDtype
    shape: tuple[int, ...]
    sparse_crow_indices: tuple[int, ...] | None
    sparse_col_indices: tuple[int, ...] | None

    def __init__(
        self,
        data: Sequence[float] | np.ndarray,
        dtype: TensorDtype,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        if dtype not in ("float32", "int64"):
            raise InvalidRequestError(f"dtype {dtype!r} is not one of 'float32', 'int64'", field="dtype")
        values = _cast(np.asarray(data), dtype)
        values.setflags(write=False)
        dims = tuple(map(int, shape)) if shape is not None else (values.size,)
        crow = None if sparse_crow_indices is None else tuple(int(i) for i in sparse_crow_indices)
        col = None if sparse_col_indices is None else tuple(int(i) for i in sparse_col_indices)
        _check_layout(values, dims, crow, col)
        self.__attrs_init__(values, dtype, dims, crow, col)

    @classmethod
    def from_bytes(cls, data: bytes, dtype: TensorDtype, shape: Sequence[int] | None = None) -> TensorData:
        """Take dense values as little-endian bytes, which can not change: nothing is copied.

        Raises:
            InvalidRequestError: as for the values themselves, or no whole number of them.
        """
        code = _CODES[dtype]
        if len(data) % code.itemsize:
            raise InvalidRequestError(f"{len(data)} bytes are no whole number of {dtype}", field="data")
        values = np.frombuffer(data, code)
        dims = (values.size,) if shape is None else tuple(shape)
        _check_layout(values, dims, None, None)
        made: TensorData = cls.__new__(cls)
        made.__attrs_init__(values, dtype, dims, None, None)
        return made

    @property
    def data(self) -> list[float] | list[int]:
        """The listed values, flat."""
        values: list[float] | list[int] = self._values.tolist()
        return values

    @property
    def flat(self) -> np.ndarray:
        """The listed values, flat and read-only."""
        return self._values

    def to_numpy(self) -> np.ndarray:
        """Return the dense array, of ``shape`` and ``dtype``; read-only unless it was sparse.

        Raises:
            InvalidRequestError: it is sparse, and dense it would have more than 2**26 cells.
        """
        if self.sparse_crow_indices is None or self.sparse_col_indices is None:
            return self._values.reshape(self.shape)
        if math.prod(self.shape) > MOST_CELLS:
            raise InvalidRequestError(f"{list(self.shape)} has more than {MOST_CELLS} cells", field="shape")
        dense = np.zeros(self.shape, dtype=self.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, list(self.sparse_col_indices)] = self._values
        return dense

    def to_torch(self) -> torch.Tensor:
        """Return the dense tensor, a copy."""
        import torch  # noqa: PLC0415  only callers that use torch pay for its import

        return torch.from_numpy(self.to_numpy().copy())

    def tolist(self) -> list[Any]:
        """Return the dense tensor as nested lists."""
        nested: list[Any] = self.to_numpy().tolist()
        return nested

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """Copy a numpy array: floats become float32, signed integers int64; other kinds are refused."""
        kind = np.asarray(array).dtype.kind
        if kind not in "fi":
            raise InvalidRequestError(f"numpy dtype {array.dtype} is neither float nor signed integer", field="dtype")
        return cls(array, "float32" if kind == "f" else "int64", array.shape)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """Copy a torch tensor; bfloat16 and float16 are widened, a tensor that requires grad is refused."""
        if tensor.requires_grad:
            raise InvalidRequestError("the tensor requires grad: pass tensor.detach()", field="tensor")
        wide = tensor.float() if tensor.is_floating_point() else tensor
        return cls.from_numpy(wide.cpu().numpy())

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor) -> TensorData:
        """Copy a torch tensor; one of two dimensions that is mostly zeros is kept in compressed sparse rows."""
        dense = cls.from_torch(tensor)
        array = dense.to_numpy()
        if array.ndim != 2 or len(array) + 1 + 2 * np.count_nonzero(array) >= array.size:
            return dense
        rows, columns = np.nonzero(array)
        starts = np.searchsorted(rows, np.arange(len(array) + 1))
        return cls(array[rows, columns], dense.dtype, array.shape, starts.tolist(), columns.tolist())


def _cast(given: np.ndarray, dtype: TensorDtype) -> np.ndarray:
    """Copy as a flat array of ``dtype``; what it can not hold is refused, not wrapped around or made infinite."""
    if given.dtype == _CODES[dtype]:
        return np.array(given).reshape(-1)
    good = given.size == 0 or given.dtype.kind in "fiu"
    if good and dtype == "int64" and given.dtype.kind != "i":
        good = bool(np.all((given == np.floor(given)) & (given >= -(2.0**63)) & (given < 2.0**63)))
    try:
        if good:
            with np.errstate(over="raise"):
                return np.array(given, dtype=dtype).reshape(-1)
    except FloatingPointError:
        pass
    raise InvalidRequestError(f"holds what is not {dtype}", field="data")


def _check_layout(
    values: np.ndarray, shape: tuple[int, ...], crow: tuple[int, ...] | None, col: tuple[int, ...] | None
) -> None:
    if (crow is None) != (col is None):
        raise InvalidRequestError("sparse_crow_indices and sparse_col_indices go together", field="sparse_crow_indices")
    if crow is None or col is None:
        if math.prod(shape) != values.size or min(shape, default=0) < 0:
            raise InvalidRequestError(f"shape {list(shape)} does not hold {values.size} values", field="shape")
        return
    good = len(shape) == 2 and len(crow) == shape[0] + 1 and len(col) == values.size == crow[-1] and crow[0] == 0
    if not good or any(a > b for a, b in pairwise(crow)):
        raise InvalidRequestError("the row starts do not describe a 2-D CSR tensor", field="sparse_crow_indices")
    if any(not 0 <= i < shape[1] for i in col):
        raise InvalidRequestError(f"a column lies outside 0..{shape[1] - 1}", field="sparse_col_indices")


def as_tensor_data(value: Any, key: str) -> TensorData:
    """Turn a tensor, array, list or the SDK's TensorData into ours.

    Args:
        value: what the caller gave.
        key: the loss input's name; a plain list takes its dtype from it.

    Raises:
        InvalidRequestError: a kind, dtype or shape that is not allowed, naming ``key``.
    """
    field = f"loss_fn_inputs[{key!r}]"
    try:
        if isinstance(value, TensorData):
            return value
        if hasattr(value, "sparse_crow_indices"):
            return TensorData(value.data, value.dtype, value.shape, value.sparse_crow_indices, value.sparse_col_indices)
        if hasattr(value, "detach"):
            return TensorData.from_torch(value)
        if isinstance(value, np.ndarray):
            return TensorData.from_numpy(value)
        if isinstance(value, list | tuple):
            return _from_list(value, key)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), field=field) from None
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"not a rectangular list of numbers ({error})", field=field) from None
    raise InvalidRequestError(
        f"{type(value).__name__} is not a TensorData, torch tensor, numpy array or list", field=field
    )


def _from_list(value: Sequence[Any], key: str) -> TensorData:
    if key not in LIST_DTYPES:
        raise InvalidRequestError("a plain list has no dtype under this name: pass a TensorData or an array")
    array = np.asarray(value)
    if LIST_DTYPES[key] == "int64" and array.size and array.dtype.kind not in "iu":
        raise InvalidRequestError(f"expects integers, got {array.dtype}")
    return TensorData(array, LIST_DTYPES[key], array.shape)
