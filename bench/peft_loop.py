"""The alternative: a plain training loop of transformers, PEFT and torch.optim.AdamW."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.workloads import RANK, Workload

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


class PeftLoop:
    """One padded batch per step: forward, summed cross-entropy, backward, AdamW.

    Args:
        dtype: of the base model; its adapters are float32 and, unless the model is too, run under autocast.
    """

    def __init__(
        self, workload: Workload, device: str = "cpu", dtype: torch.dtype = torch.float32, rank: int = RANK
    ) -> None:
        self._autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype)
        config = LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about a tied head, which is what is wanted here
            self.model: Any = get_peft_model(model, config).to(device).train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
        self._batch = _padded(workload, device)

    def step(self) -> float:
        """Train on the batch once and return the loss."""
        tokens, mask, labels = self._batch
        with self._autocast:
            logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def _padded(workload: Workload, device: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    longest = max(len(row) - 1 for row in workload.rows)
    tokens = np.zeros((len(workload.rows), longest), dtype=np.int64)
    labels = np.full_like(tokens, -100)
    mask = np.zeros_like(tokens)
    for index, (row, prompt) in enumerate(zip(workload.rows, workload.prompts, strict=True)):
        length = len(row) - 1
        tokens[index, :length], mask[index, :length] = row[:-1], 1
        labels[index, prompt - 1 : length] = row[prompt:]
    # Without padding the loop needs no mask and is faster without one.
    wanted = torch.from_numpy(mask).to(device) if (mask == 0).any() else None
    return torch.from_numpy(tokens).to(device), wanted, torch.from_numpy(labels).to(device)
