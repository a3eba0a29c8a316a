"""``Trainable``: an adapter with its accumulated gradient and its AdamW state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tickwork.compute.lora import Adapter
from tickwork.types import AdamParams
from tickwork_kernels import adamw_step


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

    def accumulate(self, body: Sequence[torch.Tensor | None], head: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Add gradients: of ``adapter.body()`` in order, and of the head's ``a`` and ``b``."""
        views = self.adapter.named(self.grad).values()
        grads = [*body, *(head or ())]
        pairs = [(view, grad) for view, grad in zip(views, grads, strict=True) if grad is not None]
        if pairs:
            torch._foreach_add_([view for view, _ in pairs], [grad for _, grad in pairs])

    def step(self, params: AdamParams) -> dict[str, float]:
        """Clip, apply AdamW, clear the gradient.

        Without gradients, or with one that is not finite, nothing but the gradient changes.

        Returns:
            metrics: ``optim/applied`` 0 or 1, ``optim/grad_norm`` before clipping, ``optim/step``.
        """
        norm = float(torch.linalg.vector_norm(self.grad))
        applied = self.requests > 0 and math.isfinite(norm)
        if applied:
            self._apply(params, norm)
        self.grad.zero_()
        self.requests = 0
        return {"optim/applied": float(applied), "optim/grad_norm": norm, "optim/step": float(self.steps)}

    def _apply(self, params: AdamParams, norm: float) -> None:
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.grad), torch.zeros_like(self.grad)
        if params.grad_clip_norm > 0:
            # The small number is that of torch.nn.utils.clip_grad_norm_.
            self.grad.mul_(min(1.0, params.grad_clip_norm / (norm + 1e-6)))
        self.steps += 1
        adamw_step(
            self.adapter.arena,
            self.grad,
            self.exp_avg,
            self.exp_avg_sq,
            step=self.steps,
            learning_rate=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
