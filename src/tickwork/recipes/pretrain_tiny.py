"""Pretraining of the tiny byte-level Qwen3 base model: `python -m tickwork.recipes.pretrain_tiny --out DIR`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from tickwork.recipes.pretrain_data import (
    BOS_ID,
    EOS_ID,
    MAX_POSITIONS,
    PAD_ID,
    TEXT_ROWS,
    Corpus,
    Rows,
    batches,
    build_corpus,
    stdlib_root,
    text_stream,
)
from tickwork.recipes.pretrain_folder import Losses, Recipe, Run, model_card, save

VOCAB_SIZE = 264
DEFAULT_STEPS = 1900
MUON_LR, ADAMW_LR = 0.02, 3e-3
_WARM_UP_STEPS = 50
_DECAY_SHARE = 0.4
_MAX_GRAD_NORM = 1.0
_EVAL_BATCHES = 16
_LOG_EVERY = 50


def build_model() -> Qwen3ForCausalLM:
    """Build the untrained model in float32 from the global seed of torch.

    Returns:
        A Qwen3 causal language model of 1.87 million parameters.
    """
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen3ForCausalLM(config)


def build_optimizers(model: Qwen3ForCausalLM) -> list[Optimizer]:
    """Build Muon for the matrices of the layers and AdamW for embeddings, output head and norms.

    Args:
        model: The model to train.

    Returns:
        The two optimizers.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    in_muon = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in in_muon]
    return [
        Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def lr_factor(step: int, steps: int) -> float:
    """Compute the learning rate relative to its peak: linear warm-up, constant, linear decay to almost zero.

    Args:
        step: Index of the step, from 0.
        steps: Number of steps of the run.

    Returns:
        A factor above 0 and up to 1.
    """
    warm_up = (step + 1) / min(_WARM_UP_STEPS, max(1, steps // 4))
    decay = (steps - step) / max(1.0, steps * _DECAY_SHARE)
    return min(1.0, warm_up, decay)


def row_losses(model: Qwen3ForCausalLM, rows: Rows) -> tuple[Tensor, Losses]:
    """Compute the weighted loss of a batch and its parts.

    Args:
        model: The model.
        rows: The batch.

    Returns:
        The loss to minimise, a float32 scalar, and the mean losses of text and tasks.
    """
    # Without instructions for bfloat16 the products are emulated, at a tenth of float32's speed.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_has_bfloat16()):
        logits = model(input_ids=rows.ids[:, :-1], use_cache=False).logits
    targets, weights = rows.ids[:, 1:], rows.weights[:, 1:]
    token_losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    weighted = token_losses * weights
    parts = [weighted[part].sum() / weights[part].sum() for part in (slice(TEXT_ROWS), slice(TEXT_ROWS, None))]
    return weighted.sum() / weights.sum(), Losses(parts[0].item(), parts[1].item())


def _has_bfloat16() -> bool:
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001  no public name for it
    return supported


def train(model: Qwen3ForCausalLM, data: Iterator[Rows], steps: int) -> list[Losses]:
    """Train for a fixed number of steps and print the progress.

    Args:
        model: The model, updated in place.
        data: Batches, at least `steps` of them.
        steps: Number of optimizer steps.

    Returns:
        The losses of each step.
    """
    optimizers = build_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    history: list[Losses] = []
    start = time.perf_counter()
    for step, rows in enumerate(islice(data, steps)):
        loss, losses = row_losses(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * lr_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        history.append(losses)
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == steps:
            rate = (step + 1) * rows.ids[:, 1:].numel() / (time.perf_counter() - start)
            progress = f"step {step + 1}/{steps} text {losses.text:.3f} task {losses.task:.3f}"
            print(f"{progress} {rate:,.0f} tokens/s", flush=True)
    return history


def _mean(history: list[Losses]) -> Losses:
    return Losses(sum(one.text for one in history) / len(history), sum(one.task for one in history) / len(history))


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, corpus: Corpus, seed: int) -> Losses:
    """Measure the losses on held-out docstrings and on tasks over held-out words.

    Args:
        model: The model.
        corpus: The corpus it was trained on.
        seed: Seed of the draws.

    Returns:
        Mean losses over a fixed number of batches.
    """
    data = batches(text_stream(corpus.held_out_docstrings), corpus.words["held_out"], seed)
    return _mean([row_losses(model, rows)[1] for rows in islice(data, _EVAL_BATCHES)])


def pretrain(out: Path, steps: int, seed: int, root: Path) -> list[Losses]:
    """Train the tiny model from nothing and write it to a folder.

    Args:
        out: Folder to write.
        steps: Number of optimizer steps.
        seed: Seed of the splits, the weights and the batches.
        root: Folder of the modules whose docstrings are the text.

    Returns:
        The losses of each step.
    """
    corpus = build_corpus(seed, root)
    torch.manual_seed(seed)
    model = build_model()
    start = time.perf_counter()
    history = train(model, batches(text_stream(corpus.train_docstrings), corpus.words["train"], seed), steps)
    seconds = time.perf_counter() - start
    held_out = evaluate(model, corpus, seed)
    print(f"held out: text {held_out.text:.3f} task {held_out.task:.3f}", flush=True)
    recipe = Recipe(steps=steps, seed=seed, muon_lr=MUON_LR, adamw_lr=ADAMW_LR)
    run = Run(seconds, _mean(history[-100:]), held_out)
    save(model, corpus, model_card(model, corpus, recipe, run), out)
    return history


def main() -> None:
    """Run the command line: `--out DIR [--steps N] [--seed N]`."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.steps, arguments.seed, stdlib_root())


if __name__ == "__main__":
    main()
