"""Kernels for fine-tuning: fused linear logprobs, token losses, AdamW, multi-LoRA.

Stands alone on torch and, for the CUDA implementations, triton; nothing of tickwork. Each operation is defined by its
plain-torch reference, which is also the CPU path; other implementations stand beside it behind the same call, chosen
by ``impl=``, and are held to it by ``python -m tickwork_kernels.check``.
"""

from tickwork_kernels.adamw import adamw_step
from tickwork_kernels.head import Chunk, Head, HeadCase, HeadKernel, Lora, Rows, head_logits
from tickwork_kernels.head_calls import head_gradients, hold_logprobs
from tickwork_kernels.head_held import HeldLogprobs
from tickwork_kernels.head_sweep import HeadGradients, Upstream
from tickwork_kernels.heads import choose_head, register_head_kernel
from tickwork_kernels.linear_logprob import LinearLogprobs, explain, linear_logprob
from tickwork_kernels.linear_token_loss import TokenLossResult, linear_token_loss
from tickwork_kernels.multi_lora import LoraSegment, multi_lora
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
