"""``Trainable``: an adapter with its accumulated gradient and its AdamW state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from tickwork.compute.lora import Adapter
from tickwork.errors import InvalidRequestError
from tickwork.types import AdamParams
from tickwork_kernels import AdamWSettings, AdamWState, adamw_steps


class Trainable:
    """The state that training changes; its tensors are flat arenas laid out as the adapter's.

    ``grad`` is the sum of the gradients since the last step. It takes memory once it is asked for, the moments from
    the first step on.

    Room: the device thread.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._grad: torch.Tensor | None = None
        self.requests = 0
        self.steps = 0
        self.exp_avg: torch.Tensor | None = None
        self.exp_avg_sq: torch.Tensor | None = None

    @property
    def grad(self) -> torch.Tensor:
        """The accumulated gradient."""
        self.hold_grad()
        assert self._grad is not None
        return self._grad

    def hold_grad(self) -> None:
        """Take the memory of the gradient, so that adding to it takes none."""
        if self._grad is None:
            self._grad = torch.zeros_like(self.adapter.arena)

    def reset(self) -> None:
        """Forget the gradient, the moments and the number of steps."""
        self.requests, self.steps = 0, 0
        self._grad = self.exp_avg = self.exp_avg_sq = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.adapter.nbytes + sum(t.nbytes for t in self._extras() if t is not None)

    def move(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Lie in copies from now on, all but a gradient of zeros; where making one fails, nothing has changed."""
        grad, *moments = self._extras()
        kept = [None if grad is None or not bool(grad.any()) else grad, *moments]
        copies = [None if tensor is None else copy(tensor) for tensor in kept]
        self.adapter.move(copy)
        self._grad, self.exp_avg, self.exp_avg_sq = copies

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what there is of adapter, moments and gradient by name, but for a gradient of zeros."""
        parts = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "grad": self._grad if self.requests else None}
        return {"adapter": self.adapter.arena} | {name: part for name, part in parts.items() if part is not None}

    def resume(self, parts: Mapping[str, torch.Tensor], steps: int, requests: int) -> None:
        """Go on with moments and a gradient by name, and the number of steps and of requests since the last."""
        self._grad, self.exp_avg, self.exp_avg_sq = (parts.get(name) for name in ("grad", "exp_avg", "exp_avg_sq"))
        self.steps, self.requests = steps, requests

    def _extras(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        return self._grad, self.exp_avg, self.exp_avg_sq

    def accumulate(self, grad: torch.Tensor) -> None:
        """Add a gradient ``[P]``, laid out as the arena."""
        self.grad.add_(grad)

    def step(self, params: AdamParams) -> dict[str, float]:
        """Clip, apply AdamW, clear the gradient; see ``step_together``."""
        return step_together([(self, params)])[0]

    def prepare(self, params: AdamParams) -> tuple[AdamWState, AdamWSettings]:
        """Return what the kernels step; takes the memory of the moments where there are none yet.

        Raises:
            InvalidRequestError: a parameter that float32 can not hold; names it.
        """
        settings = self._settings(params)
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.grad), torch.zeros_like(self.grad)
        return AdamWState(self.adapter.arena, self.grad, self.exp_avg, self.exp_avg_sq), settings

    def _settings(self, params: AdamParams) -> AdamWSettings:
        try:
            return AdamWSettings(
                self.steps + 1,
                params.learning_rate,
                params.beta1,
                params.beta2,
                params.eps,
                params.weight_decay,
                clip_norm=params.grad_clip_norm if params.grad_clip_norm > 0 else None,
            )
        except ValueError as error:
            raise InvalidRequestError(str(error), field="adam_params") from None


def step_together(asks: Sequence[tuple[Trainable, AdamParams]]) -> list[dict[str, float]]:
    """Step several models at once: clip, apply AdamW, clear the gradient of each.

    Without gradients, or with one that is not finite, nothing but the gradient of that model changes.

    Returns:
        metrics of each: ``optim/applied`` 0 or 1, ``optim/grad_norm`` before clipping, ``optim/step``.
    """
    ready = [(state, state.prepare(params)) for state, params in asks if state.requests > 0]
    report = adamw_steps([tensors for _, (tensors, _) in ready], [settings for _, (_, settings) in ready])
    found = zip(report.norms.tolist(), report.applied.tolist(), strict=True)
    norms = {id(state): norm for (state, _), norm in zip(ready, found, strict=True)}
    metrics = []
    for state, _ in asks:
        norm, applied = norms.get(id(state), (0.0, False))
        state.steps += applied
        state.requests = 0
        metrics.append({"optim/applied": float(applied), "optim/grad_norm": norm, "optim/step": float(state.steps)})
    return metrics
