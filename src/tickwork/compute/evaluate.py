"""The losses of a pass: logprobs of every part, its loss, and the gradients at the head.

Built-in losses of all parts, of whatever kind, go through the head in one call; each row carries its loss and its
inputs. A custom loss is called with the rows of its own request alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from tickwork.compute.failure import out_of_memory
from tickwork.compute.losses import BUILT_IN, guarded, settings, token_loss
from tickwork.compute.parts import Part
from tickwork.errors import LossError, RequestFailedError
from tickwork_kernels import (
    BoundLoss,
    HeadGradients,
    LoraSegment,
    TokenLoss,
    Upstream,
    bind,
    head_gradients,
    hold_logprobs,
)
from tickwork_kernels.token_losses import Config, Inputs, Pair

# Exponentials of the head kept between a custom loss's forward and backward; what is over is computed again.
KEEP_BYTES = 2**28


def evaluate(parts: Sequence[Part], hidden: torch.Tensor) -> None:
    """Compute every part's logprobs and loss and, where wanted, its gradients; what goes wrong fails its own part.

    Args:
        hidden: ``[T, D]`` of the whole pass, detached.
    """
    alike: dict[tuple[int, bool], list[Part]] = defaultdict(list)
    for part in parts:
        if part.piece.phase == "run" and isinstance(part.progress.payload.loss_fn, str):
            alike[part.targets.shape[1], part.wants_gradient].append(part)
            continue
        try:
            _take(part, _alone(part, hidden[part.start : part.stop]))
        except RequestFailedError as error:
            part.progress.fail(error)
    for (_, gradient), group in alike.items():
        _built_in(sorted(group, key=lambda part: part.start), hidden, gradient)


def _built_in(group: Sequence[Part], hidden: torch.Tensor, gradient: bool) -> None:
    """Evaluate the built-in losses of parts with equally many targets per token."""
    spans = [(part.start, part.stop) for part in group]
    if group[-1].stop - group[0].start == sum(stop - start for start, stop in spans):
        spans = [(group[0].start, group[-1].stop)]  # side by side: nothing need be copied
    rows = _joined([hidden[start:stop] for start, stop in spans])
    targets = _joined([part.targets for part in group])
    head, adapters = group[0].progress.base.head, _segments(group)
    mixture = _Mixture.of(group)
    if gradient:
        chunk, gradients = head_gradients(rows, targets, head, mixture.bound, adapters)
        logprobs, losses, slope = chunk.logprobs, chunk.losses, chunk.upstream
    else:
        gradients = None
        logprobs = hold_logprobs(rows, targets, head, adapters).logprobs
        losses, slope = (mixture.bound.mask(each) for each in mixture.bound.evaluate(logprobs))
    assert losses is not None
    assert slope is not None
    finite = bool(torch.isfinite(slope).all())
    pairs = iter((gradients.adapters if gradients else None) or ())
    start = 0
    for index, part in enumerate(group):
        mine = slice(start, start + part.stop - part.start)
        start = mine.stop
        pair = next(pairs, None) if part.progress.model.adapter.head is not None else None
        error = mixture.errors.get(index) or (None if finite else _overflow(part, slope[mine]))
        if error is not None:
            part.progress.fail(error)
            continue
        part.loss = float(losses[mine].sum(dtype=torch.float64))
        part.keep(logprobs[mine])
        if gradients is not None:
            assert gradients.hidden is not None
            part.hidden, part.head = gradients.hidden[mine], pair


def _overflow(part: Part, slope: torch.Tensor) -> LossError | None:
    if bool(torch.isfinite(slope).all()):
        return None
    return LossError(f"the gradient of {part.progress.payload.loss_fn} is not finite: the importance ratio overflows")


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _padding(group: Sequence[Part]) -> torch.Tensor | None:
    """Return which cells hold no target; what a loss makes of their zeros must not count."""
    masks = [part.padding for part in group]
    if all(mask is None for mask in masks):
        return None
    none = [torch.zeros_like(part.targets, dtype=torch.bool) for part in group]
    return _joined([mine if mask is None else mask for mask, mine in zip(masks, none, strict=True)])


def _segments(group: Sequence[Part]) -> list[LoraSegment]:
    segments, start = [], 0
    for part in group:
        lora, stop = part.progress.model.adapter.head, start + part.stop - part.start
        if lora is None:
            segments.append(LoraSegment(start, stop, None, None, 1.0))
        else:
            segments.append(LoraSegment(start, stop, lora.a, lora.b, lora.scale))
        start = stop
    return segments


@dataclass
class _Mixture:
    """Built-in losses of several parts as one loss of all their rows.

    Args:
        members: the losses, and the parts that each serves. A loss that a user has registered serves one part, so
            that its errors are that part's alone.
        bound: all of them together.
        errors: of registered losses, by part.
    """

    members: list[tuple[BoundLoss, list[int]]] = field(default_factory=list)
    errors: dict[int, LossError] = field(default_factory=dict)
    bound: BoundLoss = field(init=False)

    @classmethod
    def of(cls, group: Sequence[Part]) -> _Mixture:
        """Bind the losses of some parts."""
        kinds: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index, part in enumerate(group):
            name, config = str(part.progress.payload.loss_fn), settings(part.progress.payload)
            kinds[name, *config.items(), None if name in BUILT_IN else index].append(index)
        found = cls()
        for indices in kinds.values():
            payload = group[indices[0]].progress.payload
            loss = token_loss(str(payload.loss_fn))
            laid = [group[index].inputs(loss.inputs) for index in indices]
            inputs = {key: _joined([each[key] for each in laid]) for key in loss.inputs}
            found.members.append((bind(guarded(loss), inputs, settings(payload)), indices))
        alone = len(found.members) == 1 and found.members[0][0].loss.name in BUILT_IN
        bound = found.members[0][0] if alone else found._mixed(group)
        found.bound = replace(bound, ignored=_padding(group))
        return found

    def _mixed(self, group: Sequence[Part]) -> BoundLoss:
        """Return one loss whose rows know which member they belong to, and where in it they lie."""
        shape = (sum(part.stop - part.start for part in group), group[0].targets.shape[1])
        which, place = (torch.zeros(shape, dtype=torch.int64, device=group[0].targets.device) for _ in range(2))
        live = torch.ones(shape, device=which.device)
        starts = [0]
        for part in group:
            starts.append(starts[-1] + part.stop - part.start)
        for number, (member, indices) in enumerate(self.members):
            rows = torch.cat([torch.arange(starts[i], starts[i + 1], device=which.device) for i in indices])
            which[rows] = number
            place[rows] = torch.arange(len(rows), device=which.device)[:, None]
            if (silent := member.loss.zero_when) is not None:
                live[rows] = member.inputs[silent].to(live.dtype)
        names = ("which", "place", "live")
        loss = TokenLoss("mixed", self._evaluate, names, zero_when="live")
        return BoundLoss(loss, dict(zip(names, (which, place, live), strict=True)), {})

    def _evaluate(self, logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:  # noqa: ARG002
        losses, slopes = torch.zeros_like(logp), torch.zeros_like(logp)
        for number, (member, indices) in enumerate(self.members):
            rows = (inputs["which"][:, 0] == number).nonzero()[:, 0]
            if not len(rows):
                continue
            try:
                found = member.take(inputs["place"][rows, 0]).evaluate(logp[rows])
            except LossError as error:
                self.errors[indices[0]] = error
            except Exception as error:
                if out_of_memory(error):
                    raise
                self.errors[indices[0]] = LossError(str(error))
            else:
                losses[rows], slopes[rows] = found
        return losses, slopes


def _alone(part: Part, hidden: torch.Tensor) -> HeadGradients | None:
    """Compute a custom loss's part, or one of its phases, in a call of its own."""
    progress, wanted = part.progress, part.wants_gradient
    head, lora = progress.base.head, progress.model.adapter.head
    if part.piece.phase == "apply":
        upstream = _upstream(part, progress.call_loss())
        return head_gradients(hidden, part.targets, head, upstream, lora)[1] if wanted else None
    held = hold_logprobs(hidden, part.targets, head, lora, cache_bytes=KEEP_BYTES if wanted else None)
    part.keep(held.logprobs)
    if part.piece.phase == "probe":
        return None
    gradients = progress.call_loss()
    return held.backward(Upstream(_upstream(part, gradients))) if wanted else None


def _take(part: Part, gradients: HeadGradients | None) -> None:
    if gradients is not None:
        part.hidden, part.head = gradients.hidden, gradients.adapters[0] if gradients.adapters else None


def _upstream(part: Part, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return part.lay_out([grad.cpu().numpy() for grad in gradients[part.piece.start : part.piece.stop]])
