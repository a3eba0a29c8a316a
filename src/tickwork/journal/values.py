"""The closed table of what is stored: each class by its name, and how it is taken apart and built again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np

from tickwork import errors, requests, results, types
from tickwork.errors import JournalError
from tickwork.journal import records
from tickwork.journal.columns import Column, Columns, columns_of, datums_of, mapping_of, mappings_of
from tickwork.journal.fields import check_fields, fields
from tickwork.journal.losses import GraphLoss, PastLoss, stored
from tickwork.tensors import TensorData


@attrs.frozen(eq=False)
class _Pass:
    """``requests.ForwardBackward`` without what can not be stored."""

    model_id: str
    data: tuple[types.Datum, ...] | Columns
    loss_fn: str | GraphLoss | PastLoss
    config: Mapping[str, Any]
    backward: bool


@attrs.frozen(eq=False)
class _Outputs:
    """``results.ForwardBackwardOutput``, output by output or name by name."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]] | Mapping[str, Column]
    metrics: dict[str, float]


@attrs.frozen(eq=False)
class _Tensor:
    """``TensorData`` by the arguments that make it."""

    data: np.ndarray
    dtype: str
    shape: tuple[int, ...]
    sparse_crow_indices: tuple[int, ...] | None
    sparse_col_indices: tuple[int, ...] | None


@attrs.frozen
class Kind:
    """How values of one class are stored.

    Args:
        form: the class whose fields are stored.
        apart: its value from the stored value's.
        build: the value from the fields.
    """

    name: str
    form: type
    apart: Callable[[Any], Any]
    build: Callable[..., Any]

    def take_apart(self, value: Any) -> dict[str, Any]:
        """Return the fields of a value.

        Raises:
            JournalError: one is not of its type.
        """
        form = self.apart(value)
        found = {name: getattr(form, name) for name in fields(self.form)}
        check_fields(self.form, found)
        return found

    def put_together(self, found: Mapping[str, Any]) -> Any:
        """Return the value of the fields.

        Raises:
            JournalError: one is missing, unknown, or not of its type.
        """
        if found.keys() != fields(self.form).keys():
            odd = ", ".join(sorted(found.keys() ^ fields(self.form).keys()))
            raise JournalError(f"{self.name} has fields too many or too few: {odd:.200}")
        check_fields(self.form, found)
        return self.build(**found)


def _pass(ask: requests.ForwardBackward) -> _Pass:
    data = columns_of(ask.data)
    return _Pass(ask.model_id, ask.data if data is None else data, stored(ask.loss_fn), ask.config, ask.backward)


def _forward_backward(*, data: tuple[types.Datum, ...] | Columns, **found: Any) -> requests.ForwardBackward:
    datums = datums_of(data) if isinstance(data, Columns) else data
    # A graph reads the datums; what a callable was given can not be had again.
    return requests.ForwardBackward(data=datums, given=datums, **found)


def _outputs(output: results.ForwardBackwardOutput) -> _Outputs:
    named = mapping_of(output.loss_fn_outputs)
    return _Outputs(output.loss_fn_output_type, output.loss_fn_outputs if named is None else named, output.metrics)


def _forward_backward_output(*, loss_fn_outputs: Any, **found: Any) -> results.ForwardBackwardOutput:
    if isinstance(loss_fn_outputs, Mapping):
        count = max((len(column.shapes) for column in loss_fn_outputs.values()), default=0)
        loss_fn_outputs = mappings_of(loss_fn_outputs, count)
    return results.ForwardBackwardOutput(loss_fn_outputs=loss_fn_outputs, **found)


def _tensor(tensor: TensorData) -> _Tensor:
    rows, columns = tensor.sparse_crow_indices, tensor.sparse_col_indices
    values = tensor.to_numpy() if rows is None else np.array(tensor.data, tensor.dtype)
    return _Tensor(values.reshape(-1), tensor.dtype, tensor.shape, rows, columns)


def _itself(value: Any) -> Any:
    return value


_PLAIN: tuple[type, ...] = (
    *(requests.CreateModel, requests.OptimStep, requests.Save, requests.Load, requests.OpenSampler, requests.Release),
    *(requests.Sample, requests.LossNode, requests.LossGraph, requests.MakeLoss),
    *(types.EncodedTextChunk, types.ModelInput, types.Datum, types.AdamParams, types.AdamOptimizerConfig),
    *(types.LoraConfig, types.SamplingParams),
    *(results.OptimStepResponse, results.LoadWeightsResponse),
    *(results.SaveWeightsResponse, results.SaveWeightsForSamplerResponse, results.SaveWeightsExternalResponse),
    *(results.ModelData, results.GetInfoResponse, results.SampledSequence, results.PromptAltTokens),
    *(results.SampleResponse, GraphLoss, PastLoss, Column, Columns),
    *(records.SessionRecord, records.LaneRecord, records.SamplerRecord, records.LossRecord),
)

BY_CLASS: dict[type, Kind] = {cls: Kind(cls.__name__, cls, _itself, cls) for cls in _PLAIN} | {
    requests.ForwardBackward: Kind("ForwardBackward", _Pass, _pass, _forward_backward),
    results.ForwardBackwardOutput: Kind("ForwardBackwardOutput", _Outputs, _outputs, _forward_backward_output),
    TensorData: Kind("TensorData", _Tensor, _tensor, TensorData),
}
BY_NAME: dict[str, Kind] = {kind.name: kind for kind in BY_CLASS.values()}

# The fields that an error has besides its message.
ERRORS: dict[type[errors.TickworkError], tuple[str, ...]] = {
    errors.TickworkError: (),
    errors.ClosedError: (),
    errors.QueueFullError: (),
    errors.WrongThreadError: (),
    errors.RequestFailedError: (),
    errors.InvalidRequestError: ("field", "datum"),
    errors.LossError: (),
    errors.CheckpointError: (),
    errors.ModelLoadError: (),
    errors.CapacityError: (),
    errors.DivergedError: (),
    errors.RequestCancelledError: (),
    errors.JournalError: ("lane", "number"),
    errors.EngineStoppedError: (),
}
ERROR_NAMES: dict[str, type[errors.TickworkError]] = {cls.__name__: cls for cls in ERRORS}
