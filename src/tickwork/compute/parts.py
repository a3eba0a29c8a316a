"""What is known of a request on its way through passes, and of its part in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from tickwork.compute.losses import call_custom
from tickwork.compute.model import BaseModel
from tickwork.compute.optimizer import Trainable
from tickwork.engine.plan import Piece
from tickwork.engine.request import Request
from tickwork.errors import RequestFailedError
from tickwork.requests import ForwardBackward
from tickwork.results import ForwardBackwardOutput
from tickwork.tensors import TensorData
from tickwork.types import Datum

Pair = tuple[torch.Tensor, torch.Tensor]


@attrs.define(eq=False)
class Progress:
    """How far a request has come through its passes.

    Args:
        logprobs: of each datum so far, float32 in the targets' shape.
        loss: sum so far, in float64.
        gradients: d loss / d logprobs of each datum, once a custom loss has been called.
        before: the model's accumulated gradient before this request, while it spans several passes.
    """

    request: Request
    base: BaseModel
    model: Trainable
    several: bool
    logprobs: list[np.ndarray] = attrs.field(init=False)
    loss: float = 0.0
    metrics: dict[str, float] = attrs.Factory(dict)
    gradients: list[torch.Tensor] | None = None
    before: torch.Tensor | None = None
    error: RequestFailedError | None = None

    def __attrs_post_init__(self) -> None:
        self.logprobs = [np.empty(0, np.float32)] * len(self.payload.data)
        if (known := self.payload.gradients) is not None:
            self.gradients = [torch.from_numpy(values).to(self.base.device) for values in known]

    @property
    def payload(self) -> ForwardBackward:
        """What was asked for."""
        payload: ForwardBackward = self.request.payload
        return payload

    def fail(self, error: RequestFailedError) -> None:
        """Fail the request and take back what it has added."""
        self.error = error
        if self.before is not None:
            self.model.grad.copy_(self.before)
            self.before = None

    def output(self, cycle: int) -> ForwardBackwardOutput:
        """Build the answer, once all passes are through."""
        outputs = [{"logprobs": TensorData.from_numpy(values)} for values in self.logprobs]
        metrics = {"loss:sum": self.loss, "clock_cycle:unique": float(cycle), **self.metrics}
        return ForwardBackwardOutput("ArrayRecord", outputs, metrics)

    def recorded(self) -> tuple[np.ndarray, ...] | None:
        """Return what a custom loss gave, where that is wanted."""
        if not self.request.recorded or self.gradients is None:
            return None
        return tuple(gradient.cpu().numpy() for gradient in self.gradients)

    def call_loss(self) -> list[torch.Tensor]:
        """Call the custom loss on all logprobs, unless its gradient is known; return that, kept for the next passes."""
        if self.gradients is None:
            assert callable(self.payload.loss_fn)
            leaves = [torch.from_numpy(values).to(self.base.device) for values in self.logprobs]
            self.loss, self.metrics, self.gradients = call_custom(self.payload.loss_fn, self.payload.given, leaves)
        return self.gradients


@attrs.define(eq=False)
class Part:
    """One piece in a pass: where its tokens lie, what its loss needs in packed order, and what came out.

    Args:
        spans: packed tokens of each of its datums.
        shapes: of each datum's targets.
        targets: ``[n, K]`` int64, padded with token 0.
        start: its first packed token.
        stop: one past its last.
        loss: of this part.
        hidden: ``[n, D]`` gradient of its hidden states, where it has one.
        head: gradients of its head's ``a`` and ``b``, likewise.
    """

    progress: Progress
    piece: Piece
    spans: list[tuple[int, int]]
    shapes: list[tuple[int, ...]]
    targets: torch.Tensor
    start: int
    stop: int
    loss: float = 0.0
    hidden: torch.Tensor | None = None
    head: Pair | None = None

    @property
    def data(self) -> Sequence[Datum]:
        """Its datums."""
        return self.progress.payload.data[self.piece.start : self.piece.stop]

    @property
    def wants_gradient(self) -> bool:
        """Whether there will be a backward."""
        return self.progress.payload.backward and self.piece.phase != "probe"

    def lay_out(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        """Bring per-datum values into packed order, ``[n, K]``, padded with 0."""
        laid = np.zeros(self.targets.shape, dtype=arrays[0].dtype)
        for (start, stop), values in zip(self.spans, arrays, strict=True):
            flat = values.reshape(stop - start, -1)
            laid[start - self.start : stop - self.start, : flat.shape[1]] = flat
        return torch.from_numpy(laid).to(self.targets.device)

    @property
    def padding(self) -> torch.Tensor | None:
        """Which cells hold no target of a datum, ``[n, K]`` bool; None if all do."""
        widths = [shape[1] if len(shape) == 2 else 1 for shape in self.shapes]
        if min(widths) == self.targets.shape[1]:
            return None
        ones = [np.ones((shape[0], width), np.bool_) for shape, width in zip(self.shapes, widths, strict=True)]
        return ~self.lay_out(ones)

    def inputs(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return inputs of its loss in packed order, ``[n, K]`` each."""
        return {key: self.lay_out([datum.loss_fn_inputs[key].to_numpy() for datum in self.data]) for key in names}

    def keep(self, logprobs: torch.Tensor) -> None:
        """Note the ``[n, K]`` logprobs of its tokens, in the datums' order and shapes."""
        host = logprobs.cpu().numpy()
        self.progress.logprobs[self.piece.start : self.piece.stop] = [
            host[start - self.start : stop - self.start, : (shape[1] if len(shape) == 2 else 1)].reshape(shape).copy()
            for (start, stop), shape in zip(self.spans, self.shapes, strict=True)
        ]


def parts_of(work: Sequence[tuple[Progress, Piece]], spans: list[tuple[int, int]], device: torch.device) -> list[Part]:
    """Return the part of each piece, given the packed tokens of all datums in the pieces' order."""
    parts: list[Part] = []
    used = 0
    for progress, piece in work:
        mine = spans[used : used + piece.stop - piece.start]
        used += len(mine)
        data = progress.payload.data[piece.start : piece.stop]
        targets = [datum.loss_fn_inputs["target_tokens"].to_numpy() for datum in data]
        shapes = [values.shape for values in targets]
        start, stop = min(span[0] for span in mine), max(span[1] for span in mine)
        width = max(shape[1] if len(shape) == 2 else 1 for shape in shapes)
        empty = torch.empty((stop - start, width), dtype=torch.int64, device=device)
        part = Part(progress, piece, mine, shapes, empty, start, stop)
        part.targets = part.lay_out(targets)
        parts.append(part)
    return parts
