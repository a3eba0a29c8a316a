"""Custom losses that arrive as graphs: interpreted from a list of operations, never evaluated as code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tickwork.compute.graph_ops import DTYPES, function, method
from tickwork.errors import InvalidRequestError
from tickwork.requests import CustomLoss, LossGraph, LossNode
from tickwork.types import Datum

MOST_NODES, MOST_INPUTS, DEEPEST = 2000, 16, 16
# Elements of all values of one datum together; autograd keeps them.
MOST_ELEMENTS = 2**27
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")


def make_loss(graph: LossGraph) -> CustomLoss:
    """Return the loss that a graph describes, tried on small tensors without memory.

    Returns:
        ``(data, logprobs) -> (loss, metrics)``: the graph's loss of each datum, summed; metrics ``:sum`` are summed,
        ``:mean`` averaged over datums.

    Raises:
        InvalidRequestError: an operation that is not offered, or what is no loss of one datum.
    """
    _check(graph)
    # Two datums of one shape would hide a loss that only fits one length.
    for tokens in (3, 5):
        _measure(graph, [(tokens, 2)[:rank] for _, rank in graph.inputs])
    seen: set[tuple[tuple[int, ...], ...]] = set()

    def loss(data: Sequence[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        parts = []
        for index, (datum, scores) in enumerate(zip(data, logprobs, strict=True)):
            inputs = [scores, *_inputs(graph, datum, scores, index)]
            shapes = tuple(tuple(value.shape) for value in inputs)
            if shapes not in seen:
                _measure(graph, shapes)
                seen.add(shapes)
            parts.append(_Run(graph, scores.device).result(inputs))
        total = torch.stack([part[0] for part in parts]).sum()
        return total, _metrics([part[1] for part in parts])

    return loss


def _check(graph: LossGraph) -> None:
    names = [name for name, _ in graph.inputs]
    if not names or names[0] != "logprobs" or len(names) > MOST_INPUTS or len(set(names)) != len(names):
        raise InvalidRequestError(f"'logprobs' first, at most {MOST_INPUTS} in all, no name twice", field="inputs")
    if not all(_INPUT.fullmatch(name) for name in names) or graph.inputs[0][1] == 0:
        raise InvalidRequestError("a name in lower case, and a rank of 1 or 2 for 'logprobs'", field="inputs")
    if not 0 < len(graph.nodes) <= MOST_NODES:
        raise InvalidRequestError(f"{len(graph.nodes)} operations; at most {MOST_NODES} are taken", field="graph")
    placeholders = [node.target for node in graph.nodes if node.op == "placeholder"]
    if placeholders != names:
        raise InvalidRequestError(f"takes {placeholders!r:.200} where inputs says {names}", field="graph")
    outputs = [place for place, node in enumerate(graph.nodes) if node.op == "output"]
    if outputs != [len(graph.nodes) - 1]:
        raise InvalidRequestError("exactly one output, at the end, is needed", field="graph")


def _inputs(graph: LossGraph, datum: Datum, scores: torch.Tensor, index: int) -> list[torch.Tensor]:
    if scores.ndim != graph.inputs[0][1]:
        raise InvalidRequestError(f"rank {scores.ndim}, not {graph.inputs[0][1]}", field="target_tokens", datum=index)
    found = []
    for name, rank in graph.inputs[1:]:
        if name not in datum.loss_fn_inputs:
            raise InvalidRequestError("is needed by this loss", field=f"loss_fn_inputs[{name!r}]", datum=index)
        tensor = datum.loss_fn_inputs[name].to_torch().to(scores.device)
        if tensor.ndim != rank:
            field = f"loss_fn_inputs[{name!r}]"
            raise InvalidRequestError(f"rank {tensor.ndim}, not {rank}", field=field, datum=index)
        found.append(tensor)
    return found


def _measure(graph: LossGraph, shapes: Sequence[Sequence[int]]) -> None:
    """Run a graph on tensors that have shapes but no memory, so that one too large fails before it is computed."""
    meta = torch.device("meta")
    inputs = [torch.empty(tuple(shape), device=meta) for shape in shapes]
    inputs[0].requires_grad_()
    loss, _ = _Run(graph, meta).result(inputs)
    if not loss.requires_grad:
        raise InvalidRequestError("the loss does not depend on logprobs", field="graph")


class _Run:
    """One run of a graph over one datum."""

    def __init__(self, graph: LossGraph, device: torch.device) -> None:
        self._graph, self._device = graph, device
        self._values: dict[str, Any] = {}
        self._elements = 0

    def result(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        given = iter(inputs)
        with self._device:
            for node in self._graph.nodes:
                if node.op == "placeholder":
                    self._values[node.name] = next(given)
                elif node.op == "output":
                    return _output(self._decode(node.args[0] if node.args else None))
                else:
                    self._values[node.name] = self._apply(node)
        raise InvalidRequestError("has no output", field="graph")

    def _apply(self, node: LossNode) -> Any:
        if node.op not in ("call_function", "call_method"):
            raise InvalidRequestError(f"{node.op!r:.40} is not offered", field="graph")
        act = function(node.target) if node.op == "call_function" else method(node.target)
        args = [self._decode(arg) for arg in node.args]
        kwargs = {key: self._decode(arg) for key, arg in node.kwargs.items()}
        try:
            value = act(*args, **kwargs)
        except InvalidRequestError:
            raise
        except (ArithmeticError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            what = str(error).partition("\n")[0][:200]
            raise InvalidRequestError(f"{node.name!r:.40} ({node.target:.60}): {what}", field="graph") from None
        self._count(value)
        return value

    def _count(self, value: Any) -> None:
        for part in value if isinstance(value, tuple | list) else (value,):
            self._elements += part.numel() if isinstance(part, torch.Tensor) else 0
        if self._elements > MOST_ELEMENTS:
            raise InvalidRequestError(f"needs more than {MOST_ELEMENTS} numbers for one datum", field="graph")

    def _decode(self, arg: Any, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise InvalidRequestError("an argument is nested too deeply", field="graph")
        if isinstance(arg, list):
            return [self._decode(item, depth + 1) for item in arg]
        if not isinstance(arg, dict):
            return arg
        if len(arg) != 1:
            raise InvalidRequestError("an argument has not exactly one key", field="graph")
        [(kind, value)] = arg.items()
        return self._decode_as(kind, value, depth + 1)

    def _decode_as(self, kind: str, value: Any, depth: int) -> Any:
        if kind == "ref" and isinstance(value, str) and value in self._values:
            return self._values[value]
        if kind == "tuple" and isinstance(value, list):
            return tuple(self._decode(item, depth) for item in value)
        if kind == "slice" and isinstance(value, list) and len(value) == 3:
            return slice(*(self._decode(item, depth) for item in value))
        if kind == "dict" and isinstance(value, dict):
            return {key: self._decode(item, depth) for key, item in value.items()}
        if kind == "ellipsis" and value is True:
            return ...
        if kind == "float" and value in ("inf", "-inf", "nan"):
            return float(value)
        if kind == "dtype" and value in DTYPES:
            return DTYPES[value]
        if kind == "device":
            return self._device  # wherever the loss was traced, it runs where the logprobs are
        raise InvalidRequestError(f"argument {kind!r:.40} is not known, or refers to nothing", field="graph")


def _output(value: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not isinstance(value[1], Mapping):
        raise InvalidRequestError("the output is not (loss, metrics)", field="graph")
    loss, metrics = value
    for name, scalar in (("loss", loss), *metrics.items()):
        if not isinstance(scalar, torch.Tensor) or scalar.ndim != 0:
            raise InvalidRequestError(f"{name!r:.100} is not a scalar tensor", field="graph")
        if name != "loss" and not _METRIC.fullmatch(name):
            raise InvalidRequestError(f"{name!r:.100} is not of the form custom/NAME:sum or :mean", field="graph")
    return loss, dict(metrics)


def _metrics(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    sums = {name: sum(float(part[name].detach()) for part in parts) for name in parts[0]} if parts else {}
    return {name: value / len(parts) if name.endswith(":mean") else value for name, value in sums.items()}
