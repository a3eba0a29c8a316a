"""``Trainable``: an adapter with its accumulated gradient and its AdamW state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tickwork.compute.lora import Adapter
from tickwork.types import AdamParams
from tickwork_kernels import AdamWSettings, AdamWState, adamw_steps


class Trainable:
    """The state that training changes; its tensors are flat arenas laid out as the adapter's.

    ``grad`` is the sum of the gradients since the last step. The moments take memory from the first step on.

    Room: the device thread.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.grad = torch.zeros_like(adapter.arena)
        self.requests = 0
        self.steps = 0
        self.exp_avg: torch.Tensor | None = None
        self.exp_avg_sq: torch.Tensor | None = None

    def accumulate(self, grad: torch.Tensor) -> None:
        """Add a gradient ``[P]``, laid out as the arena."""
        self.grad.add_(grad)

    def step(self, params: AdamParams) -> dict[str, float]:
        """Clip, apply AdamW, clear the gradient; see ``step_together``."""
        return step_together([(self, params)])[0]

    def prepare(self, params: AdamParams) -> tuple[AdamWState, AdamWSettings]:
        """Return what the kernels step; takes the memory of the moments where there are none yet."""
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.grad), torch.zeros_like(self.grad)
        settings = AdamWSettings(
            self.steps + 1,
            params.learning_rate,
            params.beta1,
            params.beta2,
            params.eps,
            params.weight_decay,
            clip_norm=params.grad_clip_norm if params.grad_clip_norm > 0 else None,
        )
        return AdamWState(self.adapter.arena, self.grad, self.exp_avg, self.exp_avg_sq), settings


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
