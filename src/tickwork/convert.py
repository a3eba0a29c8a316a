"""From what a caller hands over, ours or the official SDK's, to our values; and the checks that need no model."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tickwork.errors import InvalidRequestError
from tickwork.tensors import as_tensor_data
from tickwork.types import AdamParams, Datum, EncodedTextChunk, ModelInput, SamplingParams


def is_finite(value: Any) -> bool:
    """Whether a value is a real, finite number that a float can hold."""
    try:
        return not isinstance(value, bool | str | bytes) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def as_integer(value: Any, field: str) -> int:
    """Turn a whole number of any kind, numpy's too, into an int."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InvalidRequestError(f"{value!r} is not an integer", field=field)


def as_metadata(value: Any) -> dict[str, str]:
    """Turn user metadata into a plain dict of strings."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(x, str) for pair in value.items() for x in pair):
        raise InvalidRequestError(f"{value!r} is not a mapping of strings to strings", field="user_metadata")
    return dict(value)


def as_config(value: Any) -> dict[str, Any]:
    """Turn a loss's configuration into a plain dict."""
    if value is not None and not isinstance(value, Mapping):
        raise InvalidRequestError(f"{value!r} is not a mapping of settings", field="loss_fn_config")
    return dict(value or {})


def as_data(data: Any) -> tuple[Datum, ...]:
    """Turn a sequence of datums into copies of our own, which the caller can not change afterwards.

    Raises:
        InvalidRequestError: naming the datum and the field.
    """
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | dict):
        raise InvalidRequestError(f"{type(data).__name__} is not a list of Datum", field="data")
    return tuple(_as_datum(item, index) for index, item in enumerate(data))


def _as_datum(item: Any, index: int) -> Datum:
    if not hasattr(item, "model_input") or not hasattr(item, "loss_fn_inputs"):
        raise InvalidRequestError(f"{type(item).__name__} is not a Datum", datum=index)
    for name in ("model_input_spans", "loss_fn_input_spans"):
        if getattr(item, name, None) is not None:
            raise InvalidRequestError(
                "provenance spans serve 'stable_reinforce' only, which is not offered", field=name
            )
    try:
        inputs = {key: as_tensor_data(value, key) for key, value in item.loss_fn_inputs.items()}
        return Datum(as_model_input(item.model_input, "model_input"), inputs)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), datum=index) from None


def as_model_input(value: Any, field: str) -> ModelInput:
    """Turn a ModelInput into ours; chunks that are not text are refused by name."""
    if isinstance(value, ModelInput):
        return value
    if not hasattr(value, "chunks"):
        raise InvalidRequestError(f"{type(value).__name__} is not a ModelInput", field=field)
    for index, chunk in enumerate(value.chunks):
        if not hasattr(chunk, "tokens"):
            kind = getattr(chunk, "type", type(chunk).__name__)
            raise InvalidRequestError(
                f"{kind!r} is not offered: chunks hold token ids", field=f"{field}.chunks[{index}]"
            )
    return ModelInput(tuple(EncodedTextChunk(chunk.tokens) for chunk in value.chunks))


def as_adam_params(value: Any) -> AdamParams:
    """Turn AdamParams into ours and check their ranges.

    Raises:
        InvalidRequestError: naming the parameter and its range.
    """
    names = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
    if not all(hasattr(value, name) for name in names):
        raise InvalidRequestError(f"{type(value).__name__} is not AdamParams, the only optimizer", field="adam_params")
    params = {name: getattr(value, name) for name in names}
    for name, number in params.items():
        below = 1.0 if name.startswith("beta") else math.inf
        if not is_finite(number) or not 0 <= number < below:
            raise InvalidRequestError(f"{number!r}; a number in [0, {below})", field=f"adam_params.{name}")
    return AdamParams(**{name: float(number) for name, number in params.items()})


def as_sampling_params(value: Any) -> SamplingParams:
    """Turn SamplingParams into ours; ranges are checked against the model later."""
    names = ("max_tokens", "seed", "stop", "temperature", "top_k", "top_p")
    if not all(hasattr(value, name) for name in names):
        raise InvalidRequestError(f"{type(value).__name__} is not SamplingParams", field="sampling_params")
    stop = value.stop
    if stop is not None and not isinstance(stop, str | Sequence):
        raise InvalidRequestError(f"{type(stop).__name__} is not a string or a list", field="sampling_params.stop")
    params = {name: getattr(value, name) for name in names if name != "stop"}
    return SamplingParams(stop=stop if stop is None or isinstance(stop, str) else tuple(stop), **params)


def as_prompt(value: Any) -> tuple[int, ...]:
    """Turn a prompt into token ids."""
    try:
        return tuple(operator.index(token) for token in as_model_input(value, "prompt").to_ints())
    except TypeError as error:
        raise InvalidRequestError(f"holds what is not a token id: {error}", field="prompt") from None
