"""Four clients at once: each learns a task of its own, with its own data, adapter, optimizer and evaluation.

All share one engine, and so each other's passes. Then each learns its task alone, from the same seeds and data: it
must not have been better off.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import trio

import tickwork
from tickwork.engine.statistics import EngineStatistics, LaneStatistics
from tickwork.recipes.examples import MODEL, decayed, greedy_texts, supervised_datum, weight
from tickwork.recipes.tasks import new_examples

# Task -> rank of its adapter: adapters of different ranks share a pass, too.
RANKS = {"pig latin": 16, "shout backwards": 8, "hide vowels": 4, "spell loud": 8}
# What exact match may lose by the company. Sums of floats in passes of other shapes round otherwise, and
# training magnifies that; on 100 words a few fall to the other side.
MARGIN = 0.05


@attrs.frozen
class Settings:
    """The size of the run, the same for each client."""

    steps: int = 60
    batch: int = 24
    learning_rate: float = 5e-3
    warmup: int = 10
    held_out: int = 100
    seed: int = 0
    alone: bool = True


@attrs.frozen
class TaskResult:
    """Exact match of one client on words it was not trained on; ``alone`` is None where that was left out."""

    before: float
    together: float
    alone: float | None


@attrs.frozen
class Result:
    """What the run has shown.

    Args:
        worse: tasks whose exact match together is below that alone by more than ``margin``.
        seconds_together: of training and the evaluation after it, all clients at once.
        seconds_alone: the sum of the same, one client after the other.
        tokens_per_second: trained on, of all clients together.
        lanes_per_pass: clients whose rows shared a pass together, on average.
    """

    tasks: dict[str, TaskResult]
    worse: list[str]
    margin: float
    seconds_together: float
    seconds_alone: float | None
    tokens_per_second: float
    lanes_per_pass: float


@attrs.define(eq=False)
class Learner:
    """One client and its task, and how far it is.

    Args:
        data: what it draws its batches from.
        loss: mean of the last batch per completion token, in nats.
        passes: of its requests, those that have been through a pass.
        exact_match: of the last evaluation.
    """

    task: str
    client: tickwork.TrainingClient
    data: list[tickwork.Datum]
    settings: Settings
    step: int = 0
    loss: float | None = None
    passes: int = 0
    exact_match: float | None = None

    async def evaluate(self) -> float:
        """Return the share of held-out words whose greedy completion is exactly right."""
        tokenizer = self.client.get_tokenizer()
        examples = new_examples(self.task, "held_out", self.settings.held_out, 0)
        sampler = await self.client.save_weights_and_get_sampling_client_async()
        texts = await greedy_texts(sampler, tokenizer, [prompt for prompt, _ in examples])
        right = sum(got == want for got, (_, want) in zip(texts, examples, strict=True))
        self.exact_match = right / len(examples)
        return self.exact_match

    async def train(self, moved: Callable[[], None]) -> None:
        """Run all steps, one in flight ahead, so that the engine never waits for this client's Python."""
        batches = self._batches()
        data = next(batches)
        ahead = self._submit(data, 0)
        for step in range(1, self.settings.steps + 1):
            flying, trained = ahead, data
            if step < self.settings.steps:
                data = next(batches)
                ahead = self._submit(data, step)
            self.loss = (await flying).metrics["loss:sum"] / weight(trained)
            self.step, self.passes = step, self.passes + 1
            moved()

    def _submit(self, data: list[tickwork.Datum], step: int) -> tickwork.Future[tickwork.ForwardBackwardOutput]:
        settings = self.settings
        rate = decayed(settings.learning_rate, step, settings.steps, settings.warmup)
        loss = self.client.forward_backward(data, "cross_entropy")
        self.client.optim_step(tickwork.AdamParams(learning_rate=rate, eps=1e-8, grad_clip_norm=1.0))
        return loss

    def _batches(self) -> Iterator[list[tickwork.Datum]]:
        chance = random.Random(self.settings.seed)
        while True:
            yield chance.sample(self.data, self.settings.batch)


@attrs.frozen
class Progress:
    """What there is to show after something has moved.

    Args:
        phase: ``together`` or ``alone``.
        moved: the learner that did.
        learners: all of this phase.
        begun: counters at the phase's begin.
        now: counters now.
    """

    phase: str
    moved: Learner
    learners: Sequence[Learner]
    begun: EngineStatistics
    now: EngineStatistics

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return self.now.uptime - self.begun.uptime

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on in this phase."""
        return (self.now.tokens - self.begun.tokens) / max(self.seconds, 1e-9)

    @property
    def lanes_per_pass(self) -> float:
        """Clients whose rows shared a pass of this phase, on average."""
        return sum(learner.passes for learner in self.learners) / max(self.now.passes - self.begun.passes, 1)

    def lane(self, learner: Learner) -> LaneStatistics:
        """Return what a learner's lane has had of this phase."""
        name = learner.client.model_id
        nothing = LaneStatistics(0, 0)  # before its first pass a lane has no record
        now, begun = (figures.lanes.get(name, nothing) for figures in (self.now, self.begun))
        return LaneStatistics(
            cycles=now.cycles - begun.cycles,
            missed=now.missed - begun.missed,
            requests=now.requests - begun.requests,
            tokens=now.tokens - begun.tokens,
            waited=now.waited - begun.waited,
            device=now.device - begun.device,
            hint=now.hint,
        )


Watch = Callable[[Progress], None]


async def learn(service: tickwork.ServiceClient, settings: Settings, watch: Watch) -> Result:
    """Train all clients together, then each alone; return what came of it."""
    learners = [await _learner(service, task, settings) for task in RANKS]
    before = {learner.task: await learner.evaluate() for learner in learners}
    together = await _phase(service, "together", learners, watch)
    alone = [
        await _phase(service, "alone", [await _learner(service, task, settings)], watch)
        for task in (RANKS if settings.alone else ())
    ]
    best = {phase.moved.task: phase.moved.exact_match for phase in alone}
    tasks = {
        each.task: TaskResult(before[each.task], each.exact_match or 0.0, best.get(each.task)) for each in learners
    }
    return Result(
        tasks=tasks,
        worse=worse(tasks),
        margin=MARGIN,
        seconds_together=together.seconds,
        seconds_alone=sum(phase.seconds for phase in alone) if alone else None,
        tokens_per_second=together.tokens_per_second,
        lanes_per_pass=together.lanes_per_pass,
    )


def worse(tasks: Mapping[str, TaskResult]) -> list[str]:
    """Return the tasks that were learnt worse together than alone, by more than the margin."""
    return [name for name, each in tasks.items() if each.alone is not None and each.together < each.alone - MARGIN]


async def _learner(service: tickwork.ServiceClient, task: str, settings: Settings) -> Learner:
    client = await service.create_lora_training_client_async(MODEL, rank=RANKS[task], seed=settings.seed)
    tokenizer = client.get_tokenizer()
    examples = new_examples(task, "train", 2000, settings.seed)
    return Learner(task, client, [supervised_datum(tokenizer, *example) for example in examples], settings)


async def _phase(service: tickwork.ServiceClient, name: str, learners: Sequence[Learner], watch: Watch) -> Progress:
    """Let some learners train and evaluate at the same time; return the last progress."""
    begun = service.statistics()

    def progress(learner: Learner) -> Progress:
        return Progress(name, learner, learners, begun, service.statistics())

    async def course(learner: Learner) -> None:
        await learner.train(lambda: watch(progress(learner)))
        await learner.evaluate()
        watch(progress(learner))

    async with trio.open_nursery() as nursery:
        for learner in learners:
            nursery.start_soon(course, learner)
    return progress(learners[-1])
