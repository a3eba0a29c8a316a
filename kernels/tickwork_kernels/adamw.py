"""AdamW on one flat arena of parameters."""

from __future__ import annotations

import torch


def adamw_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update ``param``, ``exp_avg`` and ``exp_avg_sq`` in place, bit-equal to ``torch.optim.AdamW`` on CPU.

    Semantics: ``torch.optim.AdamW([param], lr, (beta1, beta2), eps, weight_decay).step()``.

    Args:
        param: parameters, ``[P]`` float32.
        grad: their gradient, ``[P]`` float32; read only.
        exp_avg: first moment, ``[P]`` float32.
        exp_avg_sq: second moment, ``[P]`` float32.
        step: number of this step, from 1.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101; the order of the
    operations is that of torch's single-tensor implementation.
    """
    param.mul_(1 - learning_rate * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root_correction = (1 - beta2**step) ** 0.5
    denominator = (exp_avg_sq.sqrt() / root_correction).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-(learning_rate / (1 - beta1**step)))
