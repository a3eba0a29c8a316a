"""The operations that a custom loss sent as a graph may use, by name; there are no others.

What is on the list reads its arguments and makes a value whose size follows from their shapes. Nothing on it writes
into a tensor, draws random numbers, leaves torch, or depends in its shape on what a tensor holds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from tickwork.errors import InvalidRequestError

_ELEMENTWISE = """
abs absolute acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad digamma div divide eq erf erfc erfinv exp
exp2 expm1 float_power floor floor_divide fmax fmin fmod frac ge greater greater_equal gt heaviside hypot isclose
isfinite isinf isnan le lerp less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and
logical_not logical_or logical_xor logit lt masked_fill maximum minimum mul multiply nan_to_num ne neg negative
not_equal positive pow rad2deg reciprocal relu remainder round rsqrt rsub sgn sigmoid sign sin sinc sinh sqrt square
sub subtract tan tanh true_divide trunc where xlogy
"""
_REDUCTIONS = """
all amax amin any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum diff log_softmax logcumsumexp
logsumexp max mean median min nanmean nansum norm prod softmax sort std sum topk var
"""
_SHAPES = """
broadcast_to cat chunk clone concat contiguous detach dim dot dsplit einsum expand expand_as flatten flip gather
index_select matmul mm movedim mv narrow ndimension numel outer permute ravel repeat reshape reshape_as roll select
size split squeeze stack swapaxes swapdims t tile transpose tril triu unbind unflatten unsqueeze view view_as
"""
_CASTS = """
bool double float int long to type_as
"""
_NEW = """
arange full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor tensor zeros zeros_like
"""
_FUNCTIONAL = """
binary_cross_entropy binary_cross_entropy_with_logits elu gelu huber_loss kl_div l1_loss leaky_relu log_sigmoid
logsigmoid mse_loss silu smooth_l1_loss softmin softplus
"""
_OPERATORS = """
abs add and_ eq floordiv ge getitem gt inv invert le lt matmul mod mul ne neg not_ or_ pos pow sub truediv xor
"""
_MATH = """
acos asin atan atan2 ceil cos cosh e erf erfc exp expm1 fabs floor fmod inf isfinite isinf isnan log log10 log1p
log2 pi pow sin sinh sqrt tan tanh
"""

ATTRIBUTES = frozenset({"T", "device", "dtype", "mT", "ndim", "shape"})
DTYPES = {
    name: getattr(torch, name) for name in ("bool", "float16", "bfloat16", "float32", "float64", "int32", "int64")
}
METHODS = frozenset(f"{_ELEMENTWISE} {_REDUCTIONS} {_SHAPES} {_CASTS} new_full new_ones new_zeros".split())

_TENSOR_NAMES = set(f"{_ELEMENTWISE} {_REDUCTIONS} {_SHAPES} {_NEW} {_FUNCTIONAL}".split())
_MODULES: dict[str, tuple[Any, set[str]]] = {
    "torch": (torch, _TENSOR_NAMES),
    "torch.functional": (torch.functional, _TENSOR_NAMES),
    "torch.nn.functional": (torch.nn.functional, _TENSOR_NAMES),
    "torch._C._nn": (torch._C._nn, _TENSOR_NAMES),  # noqa: SLF001  where torch.fx says that some functionals live
    "torch.special": (torch.special, _TENSOR_NAMES),
    "operator": (operator, set(_OPERATORS.split())),
    "math": (math, set(_MATH.split())),
}


def function(target: str) -> Callable[..., Any]:
    """Return a function by its qualified name.

    Raises:
        InvalidRequestError: it is not on the list.
    """
    if target == "getattr":
        return _attribute
    module, _, name = target.rpartition(".")
    home, names = _MODULES.get(module, (None, set()))
    found = getattr(home, name, None) if name in names else None
    if not callable(found):
        raise InvalidRequestError(f"{target!r:.100} is not among the operations that are offered", field="graph")
    return _on_numbers(found, target) if module in ("operator", "math") and name != "getitem" else found


def method(name: str) -> Callable[..., Any]:
    """Return a tensor's method by its name.

    Raises:
        InvalidRequestError: it is not on the list.
    """
    if name not in METHODS or not hasattr(torch.Tensor, name):
        raise InvalidRequestError(f"method {name!r:.100} is not among those that are offered", field="graph")

    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            raise InvalidRequestError(f"method {name!r} is called on what is no tensor", field="graph")
        return getattr(tensor, name)(*args, **kwargs)

    return call


def _attribute(value: Any, name: Any) -> Any:
    if not isinstance(value, torch.Tensor) or name not in ATTRIBUTES:
        raise InvalidRequestError(f"attribute {name!r:.100} is not among those that are offered", field="graph")
    return getattr(value, name)


def _on_numbers(act: Callable[..., Any], target: str) -> Callable[..., Any]:
    """Keep Python's own operators to numbers: texts and lists could be multiplied without end, and powers too."""

    def call(*args: Any) -> Any:
        for arg in args:
            if not isinstance(arg, torch.Tensor | int | float):
                raise InvalidRequestError(f"{target} is given a {type(arg).__name__}", field="graph")
        if any(isinstance(arg, torch.Tensor) for arg in args):
            return act(*args)
        found = act(*map(float, args)) if target.endswith("pow") else act(*args)
        if isinstance(found, int) and abs(found) >= 2**63:
            raise InvalidRequestError(f"{target} gives a number past 64 bits", field="graph")
        return found

    return call
