"""From text to datums and back, for the tiny model's tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

import tickwork

MODEL = "tickwork/tiny"
RANK = 16
GREEDY = tickwork.SamplingParams(max_tokens=24, temperature=0.0)


@attrs.frozen
class Report:
    """One line of progress: what is done, of how much, and the figures to show."""

    phase: str
    done: int
    total: int
    figures: dict[str, float]


Tell = Callable[[Report], None]


def supervised_datum(tokenizer: Any, prompt: str, completion: str) -> tickwork.Datum:
    """Return a datum whose loss is on the completion and the end of the sequence alone."""
    before = tokenizer.encode(prompt)
    after = [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
    tokens = before + after
    return tickwork.Datum(
        model_input=tickwork.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "weights": [0.0] * (len(before) - 1) + [1.0] * len(after),
        },
    )


def prompt_input(tokenizer: Any, prompt: str) -> tickwork.ModelInput:
    """Return a prompt's tokens."""
    return tickwork.ModelInput.from_ints(tokenizer.encode(prompt))


def text(tokenizer: Any, sequence: tickwork.SampledSequence) -> str:
    """Return what a sampled sequence says."""
    return str(tokenizer.decode(sequence.tokens, skip_special_tokens=True))


async def greedy_texts(sampler: tickwork.SamplingClient, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Complete all prompts greedily, in one decode batch."""
    futures = [sampler.sample(prompt_input(tokenizer, prompt), 1, GREEDY) for prompt in prompts]
    return [text(tokenizer, (await future).sequences[0]) for future in futures]


def weight(data: Sequence[tickwork.Datum]) -> float:
    """Return the number of tokens that carry loss."""
    return sum(sum(datum.loss_fn_inputs["weights"].data) for datum in data)


def decayed(peak: float, step: int, steps: int, warmup: int) -> float:
    """Return a step's learning rate: it rises to the peak and falls towards 0, both linearly."""
    return peak * min(1.0, (step + 1) / warmup) * (1 - step / steps)
