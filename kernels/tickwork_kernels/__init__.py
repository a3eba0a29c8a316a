"""Kernels for fine-tuning: fused linear logprobs, token losses, AdamW, multi-LoRA.

Stands alone: torch only, nothing of tickwork. Each operation is defined here by its plain-torch reference, which
is also the CPU path; faster implementations stand beside it with the same signature.
"""

from tickwork_kernels.adamw import adamw_step
from tickwork_kernels.linear_logprob import (
    Head,
    HeadGradients,
    Lora,
    TargetLogprobs,
    head_logits,
    linear_token_loss,
)
from tickwork_kernels.multi_lora import LoraSegment, multi_lora
from tickwork_kernels.token_losses import (
    cispo,
    cross_entropy,
    dro,
    importance_sampling,
    ppo,
)

__all__ = [
    "Head",
    "HeadGradients",
    "Lora",
    "LoraSegment",
    "TargetLogprobs",
    "adamw_step",
    "cispo",
    "cross_entropy",
    "dro",
    "head_logits",
    "importance_sampling",
    "linear_token_loss",
    "multi_lora",
    "ppo",
]
