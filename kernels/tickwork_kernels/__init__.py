"""Kernels for fine-tuning: fused linear logprobs, token losses, AdamW, multi-LoRA.

Stands alone on torch and, for the CUDA implementations, triton; nothing of tickwork. Each operation is defined by its
plain-torch reference, which is also the CPU path; other implementations stand beside it behind the same call, chosen
by ``impl=``, and are held to it by ``python -m tickwork_kernels.check``.
"""

from tickwork_kernels.adamw import (
    AdamWArena,
    AdamWReport,
    AdamWSettings,
    AdamWState,
    adamw_step,
    adamw_steps,
    explain_adamw,
)
from tickwork_kernels.head import Chunk, Head, HeadCase, HeadKernel, Lora, Rows, head_logits
from tickwork_kernels.head_calls import head_gradients, hold_logprobs
from tickwork_kernels.head_held import HeldLogprobs
from tickwork_kernels.head_sweep import HeadGradients
from tickwork_kernels.head_targets import Upstream
from tickwork_kernels.heads import choose_head, register_head_kernel
from tickwork_kernels.linear_logprob import LinearLogprobs, explain, linear_logprob
from tickwork_kernels.linear_token_loss import TokenLossResult, linear_token_loss
from tickwork_kernels.lora_linear import LoraStack, lora_linear
from tickwork_kernels.multi_lora import LoraSegment, explain_multi_lora, multi_lora
from tickwork_kernels.registry import Choice
from tickwork_kernels.token_losses import (
    BoundLoss,
    TokenLoss,
    bind,
    cispo,
    cross_entropy,
    dro,
    importance_sampling,
    ppo,
    register_token_loss,
    token_losses,
)

__all__ = [
    "AdamWArena",
    "AdamWReport",
    "AdamWSettings",
    "AdamWState",
    "BoundLoss",
    "Choice",
    "Chunk",
    "Head",
    "HeadCase",
    "HeadGradients",
    "HeadKernel",
    "HeldLogprobs",
    "LinearLogprobs",
    "Lora",
    "LoraSegment",
    "LoraStack",
    "Rows",
    "TokenLoss",
    "TokenLossResult",
    "Upstream",
    "adamw_step",
    "adamw_steps",
    "bind",
    "choose_head",
    "cispo",
    "cross_entropy",
    "dro",
    "explain",
    "explain_adamw",
    "explain_multi_lora",
    "head_gradients",
    "head_logits",
    "hold_logprobs",
    "importance_sampling",
    "linear_logprob",
    "linear_token_loss",
    "lora_linear",
    "multi_lora",
    "ppo",
    "register_head_kernel",
    "register_token_loss",
    "token_losses",
]
