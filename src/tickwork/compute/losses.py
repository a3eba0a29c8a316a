"""Losses by name: their inputs, defaults and checks; and the calling of custom ones."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import tickwork_kernels as kernels
from tickwork.compute.failure import first_line, out_of_memory
from tickwork.convert import is_finite
from tickwork.errors import InvalidRequestError, LossError
from tickwork.requests import CustomLoss, ForwardBackward
from tickwork.tensors import MOST_CELLS, TensorData, TensorDtype
from tickwork.types import Datum
from tickwork_kernels.token_losses import Config, Inputs, Pair

# Every elementwise loss that the kernels know: the built-in ones and those a user has registered.
TOKEN_LOSSES: Mapping[str, kernels.TokenLoss] = kernels.token_losses()
# Those that are shipped: they can not fail.
BUILT_IN = {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro"}
# Of these the API takes targets (N,) only.
NARROW = {"importance_sampling", "ppo", "cispo", "dro"}

# Metrics that every result has.
RESERVED = {"loss:sum", "clock_cycle:unique"}

REFUSED = {
    "gspo": "its formula and defaults are unpublished; pass a custom loss with a sequence-level ratio, or use 'ppo'",
    "stable_reinforce": "its formula is unpublished; use 'importance_sampling' or 'cispo', or pass a custom loss",
    "custom": "pass the callable itself to forward_backward_custom",
}


def check(payload: ForwardBackward, vocab_size: int, context: int) -> None:
    """Check a request before any of it runs.

    Raises:
        InvalidRequestError: naming the field and the datum.
    """
    if not payload.data:
        raise InvalidRequestError("holds no datum; at least one is needed", field="data")
    if not callable(payload.loss_fn):
        _check_config(token_loss(payload.loss_fn), payload)
    elif payload.config:
        raise InvalidRequestError("a custom loss takes no configuration: bind it in the callable", field="config")
    _check_size(payload.data)
    for index, datum in enumerate(payload.data):
        try:
            _check_datum(datum, payload.loss_fn, vocab_size, context)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), datum=index) from None


def token_loss(name: str) -> kernels.TokenLoss:
    """Return a built-in loss.

    Raises:
        InvalidRequestError: unknown, or refused with the reason.
    """
    if isinstance(name, str) and name in TOKEN_LOSSES:
        return TOKEN_LOSSES[name]
    reason = REFUSED.get(name, "unknown") if isinstance(name, str) else "neither a name nor a callable"
    raise InvalidRequestError(f"{name!r}: {reason}. Losses: {', '.join(TOKEN_LOSSES)}", field="loss_fn")


def guarded(loss: kernels.TokenLoss) -> kernels.TokenLoss:
    """Return a loss whose errors are its request's alone; a registered one is a user's code."""

    def evaluate(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
        try:
            return kernels.BoundLoss(loss, inputs, config).evaluate(logp)
        except BaseException as error:  # SystemExit too: the device thread is not the caller's to end
            if out_of_memory(error):
                raise
            raise LossError(f"the loss {loss.name!r} raised {type(error).__name__}: {first_line(error)}") from error

    return replace(loss, evaluate=evaluate)


def settings(payload: ForwardBackward) -> dict[str, float]:
    """Return the loss's configuration with defaults filled in."""
    assert isinstance(payload.loss_fn, str)
    return {**token_loss(payload.loss_fn).config, **{key: float(value) for key, value in payload.config.items()}}


def _check_config(loss: kernels.TokenLoss, payload: ForwardBackward) -> None:
    for key, value in payload.config.items():
        field = f"loss_fn_config[{key!r}]"
        if key not in loss.config:
            allowed = ", ".join(loss.config) or "nothing"
            raise InvalidRequestError(f"{payload.loss_fn} takes no such setting, only {allowed}", field=field)
        if not is_finite(value):
            raise InvalidRequestError(f"{value!r} is not a finite number", field=field)


def _check_size(data: Sequence[Datum]) -> None:
    """Check what shapes claim before anything of that size is made: a sparse tensor of few bytes may claim any."""
    shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in data if "target_tokens" in datum.loss_fn_inputs]
    rows, width = sum(math.prod(shape[:1]) for shape in shapes), max((math.prod(s[1:]) for s in shapes), default=0)
    if rows * width > MOST_CELLS:
        raise InvalidRequestError(
            f"target_tokens of {rows} tokens, up to {width} each: at most {MOST_CELLS} cells in one request",
            field="data",
        )


def _check_datum(datum: Datum, loss_fn: str | CustomLoss, vocab_size: int, context: int) -> None:
    tokens = _ids(datum.model_input.to_ints())
    if not 0 < len(tokens) <= context:
        raise InvalidRequestError(f"has {len(tokens)} tokens; 1 to {context} are allowed", field="model_input")
    _check_ids(tokens, vocab_size, "model_input")
    targets = _input(datum, "target_tokens", "int64")
    _check_shape(targets.shape, len(tokens), wide=callable(loss_fn) or loss_fn not in NARROW)
    _check_ids(targets.to_numpy(), vocab_size, _field("target_tokens"))
    if isinstance(loss_fn, str):
        _check_inputs(datum, TOKEN_LOSSES[loss_fn].inputs, targets.shape, loss_fn)


def _check_shape(shape: tuple[int, ...], length: int, *, wide: bool) -> None:
    if len(shape) not in ((1, 2) if wide else (1,)) or shape[0] != length or 0 in shape:
        allowed = f"({length},)" + (f" or ({length}, K)" if wide else "")
        raise InvalidRequestError(
            f"shape {shape} does not fit model_input: {allowed} is allowed", field=_field("target_tokens")
        )


def _check_inputs(datum: Datum, inputs: Sequence[str], shape: tuple[int, ...], loss_fn: str) -> None:
    for key in datum.loss_fn_inputs:
        if key != "target_tokens" and key not in inputs:
            raise InvalidRequestError(
                f"{loss_fn} does not use it; its inputs are target_tokens, {', '.join(inputs)}", field=_field(key)
            )
    for key in inputs:
        tensor = _input(datum, key, "float32")
        if tensor.shape != shape:
            raise InvalidRequestError(f"shape {tensor.shape} is not that of target_tokens, {shape}", field=_field(key))
        values = tensor.to_numpy()
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise InvalidRequestError(
                f"{values.reshape(-1)[bad[0]]} at position {bad[0]}; values must be finite", field=_field(key)
            )


def _input(datum: Datum, key: str, dtype: TensorDtype) -> TensorData:
    if key not in datum.loss_fn_inputs:
        raise InvalidRequestError("is missing", field=_field(key))
    tensor = datum.loss_fn_inputs[key]
    if tensor.dtype != dtype:
        raise InvalidRequestError(f"dtype {tensor.dtype} where {dtype} is needed", field=_field(key))
    return tensor


def _ids(tokens: list[int]) -> np.ndarray:
    try:
        return np.asarray(tokens, dtype=np.int64)
    except OverflowError:  # an id may be too large for any dtype; it is refused by its value
        return np.asarray(tokens, dtype=object)


def _check_ids(ids: np.ndarray, vocab_size: int, field: str) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        raise InvalidRequestError(
            f"token id {ids.reshape(-1)[bad[0]]} at position {bad[0]}; ids are 0 to {vocab_size - 1}", field=field
        )


def _field(key: str) -> str:
    return f"loss_fn_inputs[{key!r}]"


def call_custom(
    loss_fn: CustomLoss, given: Sequence[Any], logprobs: list[torch.Tensor]
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Call a custom loss and differentiate it.

    Args:
        given: the caller's datums.
        logprobs: of each datum, shaped like its targets, float32.

    Returns:
        ``(loss, metrics, d loss / d logprobs of each datum)``; logprobs that the loss ignores get zeros.

    Raises:
        LossError: it raised, or returned what is not ``(scalar tensor that depends on logprobs, metrics)``.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in logprobs]
    with torch.enable_grad():
        try:
            answer = loss_fn(given, list(leaves))
        except BaseException as error:  # SystemExit too: the device thread is not the caller's to end
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise LossError(
                f"the custom loss raised {type(error).__name__}: {first_line(error)} "
                f"(line {last.lineno} of {last.filename})"
            ) from error
        loss, metrics = _unpack(answer)
        for leaf in leaves:
            leaf.grad = None  # a loss that has called backward itself must not count twice
        try:
            loss.backward()
        except BaseException as error:
            raise LossError(f"the custom loss could not be differentiated: {first_line(error)}") from error
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    for index, (grad, given_logprobs) in enumerate(zip(grads, logprobs, strict=True)):
        if grad.shape != given_logprobs.shape:
            raise LossError(f"the custom loss has changed the shape of the logprobs of data[{index}]")
        if not bool(torch.isfinite(grad).all()):
            raise LossError(f"the gradient of the custom loss is not finite for data[{index}]")
    return float(loss.detach()), metrics, grads


def _unpack(answer: Any) -> tuple[torch.Tensor, dict[str, float]]:
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], Mapping):
        raise LossError(f"the custom loss must return (loss, metrics dict), not {type(answer).__name__}")
    loss, metrics = answer
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise LossError(f"the custom loss must be a scalar float tensor, not {shape}")
    if not loss.requires_grad:
        raise LossError("the custom loss is detached: it does not depend on the logprobs it was given")
    try:
        plain = {
            str(key): value.detach() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()
        }
        numbers = {key: float(value) for key, value in plain.items()}
    except BaseException as error:
        raise LossError(f"the metrics of a custom loss must be numbers: {first_line(error)}") from error
    if taken := RESERVED & numbers.keys():
        raise LossError(f"the metric {min(taken)!r} is Tickwork's own: give yours another name")
    return loss.reshape(()), numbers
