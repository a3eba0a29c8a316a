"""Supervised fine-tuning: the tiny model learns pig latin, which it has never seen.

The loop submits one step ahead of the one it waits for, so that the device never waits for Python, and ends
with a few steps under a custom loss.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

import tickwork
from tickwork.recipes.examples import MODEL, RANK, Report, Tell, decayed, greedy_texts, supervised_datum, weight
from tickwork.recipes.tasks import pig_latin_examples

Example = tuple[str, str]


@attrs.frozen
class Settings:
    """The size of the run."""

    steps: int = 90
    custom_steps: int = 10
    batch: int = 64
    learning_rate: float = 5e-3
    warmup: int = 10
    held_out: int = 200
    seed: int = 0


@attrs.frozen
class Result:
    """What the run has shown; losses are means per completion token, in nats."""

    loss_before: float
    loss_after: float
    exact_match_before: float
    exact_match_after: float
    seconds: float
    tokens_per_second: float
    checkpoint: str
    folder: str


async def fine_tune(service: tickwork.ServiceClient, settings: Settings, tell: Tell) -> Result:
    """Train, with an evaluation before and after, and save."""
    begun = time.perf_counter()
    client = await service.create_lora_training_client_async(MODEL, rank=RANK, seed=settings.seed)
    tokenizer = client.get_tokenizer()
    held_out = pig_latin_examples("held_out", settings.held_out, 0)
    before = await evaluate(client, tokenizer, held_out, "before", tell)
    tokens, seconds = await train(service, client, tokenizer, settings, tell)
    after = await evaluate(client, tokenizer, held_out, "after", tell)
    checkpoint = (await client.save_state("pig-latin")).path
    return Result(
        loss_before=before[0],
        loss_after=after[0],
        exact_match_before=before[1],
        exact_match_after=after[1],
        seconds=time.perf_counter() - begun,
        tokens_per_second=tokens / seconds,
        checkpoint=checkpoint,
        folder=str(service.host.catalogue.folder(checkpoint)),
    )


async def evaluate(
    client: tickwork.TrainingClient, tokenizer: Any, examples: Sequence[Example], phase: str, tell: Tell
) -> tuple[float, float]:
    """Return the loss per completion token and the share of completions that are exactly right."""
    data = [supervised_datum(tokenizer, *example) for example in examples]
    loss = client.forward(data, "cross_entropy")
    sampler = client.save_weights_and_get_sampling_client()
    texts = await greedy_texts(sampler, tokenizer, [prompt for prompt, _ in examples])
    right = sum(got == want for got, (_, want) in zip(texts, examples, strict=True))
    figures = {"loss": (await loss).metrics["loss:sum"] / weight(data), "exact match": right / len(examples)}
    tell(Report(phase, 1, 1, figures))
    return figures["loss"], figures["exact match"]


async def train(
    service: tickwork.ServiceClient, client: tickwork.TrainingClient, tokenizer: Any, settings: Settings, tell: Tell
) -> tuple[int, float]:
    """Run all steps, one in flight ahead; return the tokens trained on and the seconds it took."""
    total = settings.steps + settings.custom_steps
    batches = batch_stream(tokenizer, settings)
    begun, tokens = time.perf_counter(), 0
    ahead: tuple[Any, list[tickwork.Datum]] | None = None
    for step in range(total + 1):
        flying, ahead = ahead, None
        if step < total:
            data = next(batches)
            ahead = submit(client, data, step, settings), data
        if flying is not None:
            loss = (await flying[0]).metrics["loss:sum"] / weight(flying[1])
            tokens += sum(datum.model_input.length for datum in flying[1])
            figures = {"loss": loss, "tokens/s": tokens / (time.perf_counter() - begun)}
            tell(Report("train", step, total, {**figures, "cycles": service.statistics().cycles}))
    return tokens, time.perf_counter() - begun


def submit(client: tickwork.TrainingClient, data: list[tickwork.Datum], step: int, settings: Settings) -> Any:
    """Submit one step and return the future of its loss; the last steps use the custom loss."""
    total = settings.steps + settings.custom_steps
    rate = decayed(settings.learning_rate, step, total, settings.warmup)
    if step < settings.steps:
        loss = client.forward_backward(data, "cross_entropy")
    else:
        loss = client.forward_backward_custom(data, focal_loss)
    client.optim_step(tickwork.AdamParams(learning_rate=rate, eps=1e-8, grad_clip_norm=1.0))
    return loss


def focal_loss(data: Sequence[Any], logprobs: list[Any]) -> tuple[Any, Mapping[str, float]]:
    """Cross-entropy that weighs a token down once the model is sure of it: ``-(1 - p) * log p``.

    Source: Lin et al., Focal Loss for Dense Object Detection, arXiv 1708.02002, with gamma 1.
    """
    loss = 0
    for datum, logp in zip(data, logprobs, strict=True):
        weights = logp.new_tensor(datum.loss_fn_inputs["weights"].data)
        loss = loss - (weights * (1 - logp.detach().exp()) * logp).sum()
    return loss, {"datums:sum": float(len(data))}


def batch_stream(tokenizer: Any, settings: Settings) -> Any:
    """Yield batches of training examples without end."""
    examples = pig_latin_examples("train", 2000, settings.seed)
    data = [supervised_datum(tokenizer, *example) for example in examples]
    chance = random.Random(settings.seed)
    while True:
        yield chance.sample(data, settings.batch)
