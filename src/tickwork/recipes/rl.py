"""On-policy reinforcement learning with a verifiable reward.

The task asks for a word beginning with a letter; the reward also wants it to end in a certain one, which the
prompt does not say. Each step draws groups of completions from the newest weights; a group is trained on as soon
as enough groups have come back, while the rest are still being decoded.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import attrs
import trio

import tickwork
from tickwork.recipes.examples import MODEL, RANK, Report, Tell, greedy_texts, prompt_input, text
from tickwork.recipes.tasks import rl_prompts, rl_reward


@attrs.frozen
class Settings:
    """The size of the run.

    Args:
        groups: prompts of one step.
        samples: completions of one prompt, whose mean reward is the baseline.
        together: groups that go into one forward_backward.
    """

    steps: int = 80
    groups: int = 16
    samples: int = 8
    together: int = 8
    learning_rate: float = 1e-3
    max_tokens: int = 16
    seed: int = 0


@attrs.frozen
class Result:
    """What the run has shown; rewards are means over all prompts."""

    greedy_before: float
    greedy_after: float
    sampled_first: float
    sampled_last: float
    seconds: float
    checkpoint: str
    folder: str


@attrs.frozen
class Group:
    """The completions of one prompt and their rewards."""

    prompt: list[int]
    sequences: list[tickwork.SampledSequence]
    rewards: list[float]

    def data(self) -> list[tickwork.Datum]:
        """Return one datum per completion; none where all rewards are equal and nothing can be learnt."""
        spread = statistics.pstdev(self.rewards)
        if spread == 0:
            return []
        mean = statistics.fmean(self.rewards)
        return [
            rl_datum(self.prompt, sequence, (reward - mean) / spread)
            for sequence, reward in zip(self.sequences, self.rewards, strict=True)
        ]


def rl_datum(prompt: list[int], sequence: tickwork.SampledSequence, advantage: float) -> tickwork.Datum:
    """Return a datum over exactly the tokens that were drawn."""
    tokens = prompt + sequence.tokens
    unscored = [0.0] * (len(prompt) - 1)
    return tickwork.Datum(
        model_input=tickwork.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": unscored + sequence.logprobs,
            "advantages": unscored + [advantage] * len(sequence.tokens),
        },
    )


async def reinforce(service: tickwork.ServiceClient, settings: Settings, tell: Tell) -> Result:
    """Train, with a greedy evaluation before and after, and save."""
    begun = time.perf_counter()
    client = await service.create_lora_training_client_async(MODEL, rank=RANK, seed=settings.seed)
    tokenizer = client.get_tokenizer()
    before = await greedy_reward(client, tokenizer)
    tell(Report("before", 1, 1, {"greedy reward": before}))
    rewards = await train(client, tokenizer, settings, tell)
    after = await greedy_reward(client, tokenizer)
    tell(Report("after", 1, 1, {"greedy reward": after}))
    checkpoint = (await client.save_state("rl")).path
    return Result(
        greedy_before=before,
        greedy_after=after,
        sampled_first=statistics.fmean(rewards[:10]),
        sampled_last=statistics.fmean(rewards[-10:]),
        seconds=time.perf_counter() - begun,
        checkpoint=checkpoint,
        folder=str(service.host.catalogue.folder(checkpoint)),
    )


async def greedy_reward(client: tickwork.TrainingClient, tokenizer: Any) -> float:
    """Return the mean reward of the greedy completions of all prompts."""
    sampler = await client.save_weights_and_get_sampling_client_async()
    prompts = rl_prompts()
    texts = await greedy_texts(sampler, tokenizer, prompts)
    return statistics.fmean(rl_reward(*pair) for pair in zip(prompts, texts, strict=True))


async def train(client: tickwork.TrainingClient, tokenizer: Any, settings: Settings, tell: Tell) -> list[float]:
    """Run all steps; return the mean sampled reward of each."""
    chance = random.Random(settings.seed)
    rewards: list[float] = []
    begun = time.perf_counter()
    for step in range(settings.steps):
        prompts = chance.choices(rl_prompts(), k=settings.groups)
        sampler = client.save_weights_and_get_sampling_client()
        rewards.append(await train_on(client, sampler, tokenizer, prompts, settings, step))
        figures = {"reward": rewards[-1], "steps/s": (step + 1) / (time.perf_counter() - begun)}
        tell(Report("train", step + 1, settings.steps, figures))
    return rewards


async def train_on(
    client: tickwork.TrainingClient,
    sampler: tickwork.SamplingClient,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Settings,
    step: int,
) -> float:
    """Sample groups and train on them as they come; return their mean reward."""
    put, take = trio.open_memory_channel[Group](len(prompts))

    async def draw(prompt: str, seed: int) -> None:
        await put.send(await sample_group(sampler, tokenizer, prompt, seed, settings))

    rewards: list[float] = []
    waiting: list[tickwork.Datum] = []
    async with trio.open_nursery() as nursery:
        for index, prompt in enumerate(prompts):
            nursery.start_soon(draw, prompt, (settings.seed * 1000 + step) * 1000 + index)
        for arrived in range(1, len(prompts) + 1):
            group = await take.receive()
            rewards += group.rewards
            waiting += group.data()
            if waiting and (arrived % settings.together == 0 or arrived == len(prompts)):
                client.forward_backward(waiting, "importance_sampling")
                waiting = []
    adam = tickwork.AdamParams(learning_rate=settings.learning_rate, eps=1e-8, grad_clip_norm=1.0)
    await client.optim_step(adam)
    return statistics.fmean(rewards)


async def sample_group(
    sampler: tickwork.SamplingClient, tokenizer: Any, prompt: str, seed: int, settings: Settings
) -> Group:
    """Draw the completions of one prompt and reward them."""
    params = tickwork.SamplingParams(max_tokens=settings.max_tokens, temperature=1.0, seed=seed)
    tokens = prompt_input(tokenizer, prompt)
    response = await sampler.sample_async(tokens, settings.samples, params)
    rewards = [rl_reward(prompt, text(tokenizer, sequence)) for sequence in response.sequences]
    return Group(tokens.to_ints(), response.sequences, rewards)
