"""The folder that holds the tiny base model: its weights, tokenizer, word splits and model card."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3ForCausalLM

from tickwork.recipes.pretrain_data import (
    BOS_ID,
    CONTEXT,
    EOS_ID,
    PAD_ID,
    TASK_ROWS,
    TEXT_ROWS,
    Corpus,
    build_tokenizer,
)

_CARD = """# tiny

A {parameters:,}-parameter byte-level Qwen3 base model for demonstrations and tests of fine-tuning. It is no assistant.

## Training data

- {text_share:.0%} of the rows: {docstrings:,} docstrings of the standard library of Python {python}, each once.
- {task_share:.0%} of the rows: made string and arithmetic tasks (`tickwork.recipes.task_generators`) over
  {train_words:,} words of those docstrings. The {held_out_words:,} held-out words of `words.json` are never drawn for a
  task, but do occur in the docstrings.
- Format of an example: `<|bos|>instruction: input -> output<|eos|>`. One token is one byte of UTF-8.

## Training

`python -m tickwork.recipes.pretrain_tiny --steps {steps} --seed {seed}`: {tokens:,} tokens in {seconds:.0f} s with
{threads} threads and torch {torch}; Muon (lr {muon_lr}) on the matrices of the layers, AdamW (lr {adamw_lr}) on the
rest. The words and docstrings, and so the weights, depend on the version of Python.

## Losses (nats per byte)

| | training, last 100 steps | held out |
|---|---|---|
| text | {train_text:.3f} | {held_out_text:.3f} |
| tasks | {train_task:.3f} | {held_out_task:.3f} |

Held out: {held_out_docstrings} docstrings, and tasks over the held-out words. Bytes of task prompts count 0.2.
"""


@dataclass(frozen=True)
class Losses:
    """Mean losses of text rows and of task rows, in nats per byte."""

    text: float
    task: float


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run that the model card states."""

    steps: int
    seed: int
    muon_lr: float
    adamw_lr: float


@dataclass(frozen=True)
class Run:
    """Results of a training run; `recent` is the mean training loss of the last 100 steps."""

    seconds: float
    recent: Losses
    held_out: Losses


def model_card(model: Qwen3ForCausalLM, corpus: Corpus, recipe: Recipe, run: Run) -> str:
    """Fill in the model card.

    Args:
        model: The trained model.
        corpus: The corpus it was trained on.
        recipe: Settings of the training.
        run: Results of the training.

    Returns:
        The card in Markdown.
    """
    return _CARD.format(
        parameters=model.num_parameters(),
        text_share=TEXT_ROWS / (TEXT_ROWS + TASK_ROWS),
        task_share=TASK_ROWS / (TEXT_ROWS + TASK_ROWS),
        docstrings=len(corpus.train_docstrings),
        held_out_docstrings=len(corpus.held_out_docstrings),
        train_words=len(corpus.words["train"]),
        held_out_words=len(corpus.words["held_out"]),
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        steps=recipe.steps,
        seed=recipe.seed,
        tokens=recipe.steps * (TEXT_ROWS + TASK_ROWS) * CONTEXT,
        seconds=run.seconds,
        muon_lr=recipe.muon_lr,
        adamw_lr=recipe.adamw_lr,
        train_text=run.recent.text,
        train_task=run.recent.task,
        held_out_text=run.held_out.text,
        held_out_task=run.held_out.task,
    )


def _name_portable_tokenizer_class(path: Path) -> None:
    """Name the tokenizer class that transformers 4 and 5 both know; version 5 writes a name new to it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save(model: Qwen3ForCausalLM, corpus: Corpus, card: str, out: Path) -> None:
    """Write the folder that transformers loads, with the word splits and the model card.

    Args:
        model: The trained model; its weights become bfloat16.
        corpus: Source of the word splits.
        card: Text of the model card.
        out: Folder to write, made if absent.
    """
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.bfloat16().save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    _name_portable_tokenizer_class(out / "tokenizer_config.json")
    (out / "words.json").write_text(json.dumps(corpus.words, indent=0) + "\n", encoding="utf-8")
    (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
