"""One pass: packed rows of several requests through the model, their losses, and their gradients.

A request's gradient reaches its model only when its whole part of the pass has succeeded, and a request that
fails in a later pass takes back what its earlier ones added.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from tickwork.compute.evaluate import evaluate
from tickwork.compute.failure import out_of_memory
from tickwork.compute.model import BaseModel
from tickwork.compute.parts import Part, Progress, parts_of
from tickwork.compute.rows import Row, pack
from tickwork.compute.stacks import Stack
from tickwork.compute.threads import Threads
from tickwork.engine.plan import Phase, Piece
from tickwork.errors import CapacityError

Work = Sequence[tuple[Progress, Piece]]


def run_together(work: Work, threads: Threads) -> None:
    """Run pieces of different requests, those of one base in one pass, with as many threads as that is worth."""
    for base in dict.fromkeys(progress.base for progress, _ in work):
        run_pass(base, [(progress, piece) for progress, piece in work if progress.base is base], threads)


def run_pass(base: BaseModel, work: Work, threads: Threads) -> None:
    """Run pieces of different requests of one base together; a pass too large for memory is run in halves."""
    work = [(progress, piece) for progress, piece in work if progress.error is None]
    if not work:
        return
    try:
        _run(base, work, threads)
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
        run_pass(base, half, threads)


def _run(base: BaseModel, work: Work, threads: Threads) -> None:
    tokens = sum(piece.tokens for _, piece in work)
    threads.layers(base.parameters * tokens, {progress.payload.model_id for progress, _ in work})
    rows = [
        Row(np.asarray(datum.model_input.to_ints(), dtype=np.int64), progress.model.adapter)
        for progress, piece in work
        for datum in progress.payload.data[piece.start : piece.stop]
    ]
    gradient = any(progress.payload.backward and piece.phase != "probe" for progress, piece in work)
    packed = pack(rows, base.device, gradient=gradient)
    parts = parts_of(work, packed.spans, base.device)
    with torch.set_grad_enabled(gradient):
        hidden = base.hidden(packed)
    threads.head()
    evaluate(parts, hidden.detach())
    _accumulate(hidden, packed.stacks, [part for part in parts if part.hidden is not None])
    for part in parts:  # only now: what ran out of memory on the way here is run again
        part.progress.loss += part.loss


def _accumulate(hidden: torch.Tensor, stacks: Sequence[Stack], parts: Sequence[Part]) -> None:
    """Backpropagate all parts at once, then add each one's gradients to its model."""
    if not parts:
        return
    leaves = [leaf for stack in stacks for leaf in stack.leaves]
    if hidden.requires_grad:
        # What comes back is nothing: gradients go to the stacks' buffers.
        torch.autograd.grad(hidden, leaves, _upstream(hidden, parts), allow_unused=True)
    grads = {
        id(adapter): grad
        for stack in stacks
        if stack.grad is not None
        for adapter, grad in zip(stack.adapters, stack.grad, strict=True)
    }
    for progress in (part.progress for part in parts):
        if progress.several and progress.before is None:
            progress.before = progress.model.grad.clone()
    # From here on nothing takes memory: running out between two models would count the first one twice.
    for part in parts:
        adapter = part.progress.model.adapter
        grad = grads[id(adapter)]
        if part.head is not None:
            adapter.add_head(grad, part.head)
        part.progress.model.accumulate(grad)


def _upstream(hidden: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Return the gradient of the hidden states ``[T, D]``: zero where no part has one."""
    upstream = torch.zeros_like(hidden)
    for part in parts:
        assert part.hidden is not None
        upstream[part.start : part.stop] = part.hidden
    return upstream


def _halves(work: Work) -> list[Work]:
    """Split a pass in two; one row alone can not be split."""
    if len(work) > 1:
        middle = len(work) // 2
        return [work[:middle], work[middle:]]
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
