"""One pass: packed rows of several requests through the model, their losses, and their gradients.

A request's gradient reaches its model only when its whole part of the pass has succeeded, and a request that
fails in a later pass takes back what its earlier ones added.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from tickwork.compute.failure import out_of_memory
from tickwork.compute.losses import call_custom, guarded, settings, token_loss
from tickwork.compute.model import BaseModel
from tickwork.compute.optimizer import Trainable
from tickwork.compute.rows import Row, pack
from tickwork.engine.plan import Phase, Piece
from tickwork.engine.request import Request
from tickwork.errors import CapacityError, LossError, RequestFailedError
from tickwork.requests import ForwardBackward
from tickwork.results import ForwardBackwardOutput
from tickwork.tensors import TensorData
from tickwork_kernels import HeadGradients, Upstream, bind, head_gradients, hold_logprobs

# Exponentials of the head kept between a custom loss's forward and backward; what is over is computed again.
KEEP_BYTES = 2**28


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

    def call_loss(self) -> list[torch.Tensor]:
        """Call the custom loss on all logprobs; return its gradient, kept for the next passes."""
        if self.gradients is None:
            assert callable(self.payload.loss_fn)
            leaves = [torch.from_numpy(values).to(self.base.device) for values in self.logprobs]
            self.loss, self.metrics, self.gradients = call_custom(self.payload.loss_fn, self.payload.given, leaves)
        return self.gradients


@attrs.define(eq=False)
class _Part:
    """One piece in a pass: where its tokens lie, and what its loss needs, in packed order."""

    progress: Progress
    piece: Piece
    spans: list[tuple[int, int]]  # packed tokens of each datum
    shapes: list[tuple[int, ...]]  # of each datum's targets
    targets: torch.Tensor  # [n, K], padded with token 0
    start: int
    stop: int
    loss: float = 0.0
    gradients: HeadGradients | None = None

    def lay_out(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        """Bring per-datum values into packed order, ``[n, K]``, padded with 0."""
        laid = np.zeros(self.targets.shape, dtype=arrays[0].dtype)
        for (start, stop), values in zip(self.spans, arrays, strict=True):
            flat = values.reshape(stop - start, -1)
            laid[start - self.start : stop - self.start, : flat.shape[1]] = flat
        return torch.from_numpy(laid).to(self.targets.device)

    def take_apart(self, values: torch.Tensor) -> list[np.ndarray]:
        """Cut ``[n, K]`` values in packed order into the datums' shapes."""
        host = values.cpu().numpy()
        return [
            host[start - self.start : stop - self.start, : (shape[1] if len(shape) == 2 else 1)].reshape(shape).copy()
            for (start, stop), shape in zip(self.spans, self.shapes, strict=True)
        ]


def run_pass(base: BaseModel, work: Sequence[tuple[Progress, Piece]]) -> None:
    """Run pieces of different requests of one base together; a pass too large for memory is run in halves."""
    work = [(progress, piece) for progress, piece in work if progress.error is None]
    if not work:
        return
    try:
        _run(base, work)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        halves = _halves(work)
        if not halves:
            work[0][0].fail(_too_large(*work[0]))
    else:
        base.budget.passed()
        return
    base.budget.failed(sum(piece.tokens for _, piece in work))
    # Outside the handler: the traceback would keep the failed pass's tensors alive.
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    for half in halves:
        run_pass(base, half)


def _run(base: BaseModel, work: Sequence[tuple[Progress, Piece]]) -> None:
    rows = [
        Row(np.asarray(datum.model_input.to_ints(), dtype=np.int64), progress.model.adapter)
        for progress, piece in work
        for datum in progress.payload.data[piece.start : piece.stop]
    ]
    packed = pack(rows, base.device)
    parts = _parts(work, packed.spans, base.device)
    with torch.set_grad_enabled(any(_wants_gradient(part) for part in parts)):
        hidden = base.hidden(packed)
    upstream = torch.zeros_like(hidden, dtype=torch.float32)
    for part in parts:
        try:
            part.gradients = _evaluate(part, hidden.detach()[part.start : part.stop])
        except RequestFailedError as error:
            part.progress.fail(error)
        if part.gradients is not None:
            assert part.gradients.hidden is not None
            upstream[part.start : part.stop] = part.gradients.hidden
    _accumulate(hidden, upstream, [part for part in parts if part.gradients is not None])
    for part in parts:  # only now: what ran out of memory on the way here is run again
        part.progress.loss += part.loss


def _parts(work: Sequence[tuple[Progress, Piece]], spans: list[tuple[int, int]], device: torch.device) -> list[_Part]:
    parts: list[_Part] = []
    used = 0
    for progress, piece in work:
        mine = spans[used : used + piece.stop - piece.start]
        used += len(mine)
        targets = [
            datum.loss_fn_inputs["target_tokens"].to_numpy()
            for datum in progress.payload.data[piece.start : piece.stop]
        ]
        shapes = [values.shape for values in targets]
        start, stop = min(span[0] for span in mine), max(span[1] for span in mine)
        width = max(shape[1] if len(shape) == 2 else 1 for shape in shapes)
        empty = torch.zeros((stop - start, width), dtype=torch.int64, device=device)
        part = _Part(progress, piece, mine, shapes, empty, start, stop)
        part.targets = part.lay_out(targets)
        parts.append(part)
    return parts


def _wants_gradient(part: _Part) -> bool:
    return part.progress.payload.backward and part.piece.phase != "probe"


def _evaluate(part: _Part, hidden: torch.Tensor) -> HeadGradients | None:
    """Compute a part's logprobs and loss and, where wanted, the gradients at the head."""
    if part.piece.phase == "apply":
        return _apply_known(part, hidden)
    if part.piece.phase == "probe" or callable(part.progress.payload.loss_fn):
        return _custom(part, hidden)
    return _built_in(part, hidden)


def _built_in(part: _Part, hidden: torch.Tensor) -> HeadGradients | None:
    progress, payload = part.progress, part.progress.payload
    assert isinstance(payload.loss_fn, str)
    data = payload.data[part.piece.start : part.piece.stop]
    names = token_loss(payload.loss_fn).inputs
    inputs = {key: part.lay_out([datum.loss_fn_inputs[key].to_numpy() for datum in data]) for key in names}
    loss = bind(guarded(token_loss(payload.loss_fn)), inputs, settings(payload))
    head, lora = progress.base.head, progress.model.adapter.head
    gradients = None
    if payload.backward:
        chunk, gradients = head_gradients(hidden, part.targets, head, loss, lora)
        logprobs, losses, slope = chunk.logprobs, chunk.losses, chunk.upstream
    else:
        logprobs = hold_logprobs(hidden, part.targets, head, lora).logprobs
        losses, slope = loss.evaluate(logprobs)
    assert losses is not None
    assert slope is not None
    if not bool(torch.isfinite(slope).all()):
        raise LossError(f"the gradient of {payload.loss_fn} is not finite: the importance ratio overflows")
    part.loss = float(losses.sum(dtype=torch.float64))
    progress.logprobs[part.piece.start : part.piece.stop] = part.take_apart(logprobs)
    return gradients


def _custom(part: _Part, hidden: torch.Tensor) -> HeadGradients | None:
    progress = part.progress
    wanted = _wants_gradient(part)
    head = hold_logprobs(
        hidden,
        part.targets,
        progress.base.head,
        progress.model.adapter.head,
        cache_bytes=KEEP_BYTES if wanted else None,
    )
    progress.logprobs[part.piece.start : part.piece.stop] = part.take_apart(head.logprobs)
    if part.piece.phase == "probe":
        return None
    gradients = progress.call_loss()
    return head.backward(Upstream(_upstream(part, gradients))) if wanted else None


def _apply_known(part: _Part, hidden: torch.Tensor) -> HeadGradients | None:
    progress = part.progress
    upstream = _upstream(part, progress.call_loss())
    if not progress.payload.backward:
        return None

    return head_gradients(hidden, part.targets, progress.base.head, upstream, progress.model.adapter.head)[1]


def _upstream(part: _Part, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return part.lay_out([grad.cpu().numpy() for grad in gradients[part.piece.start : part.piece.stop]])


def _accumulate(hidden: torch.Tensor, upstream: torch.Tensor, parts: Sequence[_Part]) -> None:
    """Backpropagate all parts at once, then add each one's gradients to its model."""
    leaves = [leaf for part in parts for leaf in part.progress.model.adapter.body()]
    grads: list[torch.Tensor | None] = [None] * len(leaves)
    if leaves and hidden.requires_grad:
        grads = list(torch.autograd.grad(hidden, leaves, upstream.to(hidden.dtype), allow_unused=True))
    for progress in (part.progress for part in parts):
        if progress.several and progress.before is None:
            progress.before = progress.model.grad.clone()
    # From here on nothing takes memory: running out between two models would count the first one twice.
    used = 0
    for part in parts:
        model, gradients = part.progress.model, part.gradients
        assert gradients is not None
        count = len(model.adapter.body())
        head = gradients.adapters[0] if gradients.adapters else None
        model.accumulate(grads[used : used + count], head)
        used += count


def _halves(work: Sequence[tuple[Progress, Piece]]) -> list[list[tuple[Progress, Piece]]]:
    """Split a pass in two; one row alone can not be split."""
    if len(work) > 1:
        middle = len(work) // 2
        return [list(work[:middle]), list(work[middle:])]
    progress, piece = work[0]
    if piece.stop - piece.start < 2:
        return []
    progress.several = True
    middle = (piece.start + piece.stop) // 2
    whole = piece.phase == "run" and piece.request.whole
    phases: tuple[Phase, ...] = ("probe", "apply") if whole else (piece.phase,)
    bounds = ((piece.start, middle), (middle, piece.stop))
    return [[(progress, attrs.evolve(piece, start=a, stop=b, phase=p))] for p in phases for a, b in bounds]


def _too_large(progress: Progress, piece: Piece) -> CapacityError:
    tokens = piece.request.rows[piece.start]
    return CapacityError(
        f"data[{piece.start}] of {tokens} tokens does not fit into the memory left on {progress.base.device}, "
        f"even in a pass of its own; shorten it (half of it may fit), lower the rank, or free other models"
    )
