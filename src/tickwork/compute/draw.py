"""``Draw``: one sampling request under way: its sequences, when they stop, and its prompt's scores."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection
from typing import Any

import attrs
import numpy as np

from tickwork.compute.cache import KVPool
from tickwork.compute.choose import Recipe
from tickwork.compute.lora import Adapter
from tickwork.compute.prompt import PromptScores, Ranked
from tickwork.convert import is_finite
from tickwork.engine.request import Request
from tickwork.errors import DivergedError, InvalidRequestError, RequestFailedError
from tickwork.requests import Sample
from tickwork.results import SampledSequence, SampleResponse
from tickwork.types import SamplingParams, StopReason
from tickwork_kernels import Lora

# Below this, but not at 0, float32 logits divided by the temperature overflow.
COLDEST = 1e-5
Decode = Callable[[list[int]], str]


@attrs.define(eq=False)
class Strand:
    """One sequence being drawn; ``length`` positions of it are cached in ``slot``.

    ``pending`` is the random number of its next token, kept until the token is taken: a step that runs out of
    memory is done again with the same one.
    """

    slot: int
    random: np.random.Generator
    length: int = 0
    tokens: list[int] = attrs.Factory(list)
    logprobs: list[float] = attrs.Factory(list)
    ranked: list[Ranked] = attrs.Factory(list)
    reason: StopReason | None = None
    pending: float | None = None

    def uniform(self) -> float:
        """Return the random number of the next token, in [0, 1)."""
        if self.pending is None:
            self.pending = float(self.random.random())
        return self.pending


@attrs.frozen
class StopRule:
    """When a sequence stops.

    Args:
        ids: token ids that stop it.
        strings: strings that stop it, wherever token borders fall.
        decode: token ids to text; needed with strings.
    """

    ids: Collection[int] = frozenset()
    strings: tuple[str, ...] = ()
    decode: Decode | None = None

    def met(self, tokens: list[int]) -> bool:
        """Whether the last token completes a stop."""
        if tokens[-1] in self.ids:
            return True
        if not self.strings or self.decode is None:
            return False
        # A character takes at most four byte tokens: only the tail can hold a stop that was not there before.
        tail = 4 * max(len(text) for text in self.strings) + 4
        text = self.decode(tokens[-tail:])
        return any(string in text for string in self.strings)


@attrs.define(eq=False)
class Draw:
    """A sampling request between its admission and its answer.

    Args:
        prompt: what is asked of the prompt.
        head: the adapter's part of the head.
        pool: where the keys and values of its sequences lie.
        prefilled: prompt tokens whose keys and values are cached.
        error: what it ran into.
    """

    request: Request
    payload: Sample
    adapter: Adapter | None
    recipe: Recipe
    stop: StopRule
    budget: int
    seed: int
    prompt: PromptScores
    head: Lora | None
    strands: list[Strand] = attrs.Factory(list)
    pool: KVPool = attrs.Factory(KVPool)
    prefilled: int = 0
    error: RequestFailedError | None = None

    @property
    def decoding(self) -> bool:
        """Whether the prompt is through."""
        return self.unfilled == 0

    @property
    def unfilled(self) -> int:
        """Prompt tokens that have not been through the model."""
        return len(self.payload.prompt) - self.prefilled

    @property
    def reach(self) -> int:
        """Positions that each of its slots may come to hold."""
        return len(self.payload.prompt) + self.budget

    @property
    def held(self) -> int:
        """Positions that its sequences under way may come to hold."""
        return self.reach * sum(strand.reason is None for strand in self.strands)

    @property
    def done(self) -> bool:
        """Whether it has failed, or every sequence has stopped."""
        return self.error is not None or all(strand.reason for strand in self.strands)

    def random(self, index: int) -> np.random.Generator:
        """Random numbers of one sequence: a function of the request's seed and its index alone."""
        return np.random.default_rng([self.seed, index])

    def take(self, strand: Strand, token: int, logprob: float, ranked: Ranked | None) -> None:
        """Append a drawn token.

        Raises:
            DivergedError: its logits were not finite.
        """
        if math.isnan(logprob):
            raise self._diverged()
        strand.pending = None
        strand.tokens.append(token)
        strand.logprobs.append(logprob)
        if ranked is not None:
            strand.ranked.append(ranked)
        if self.stop.met(strand.tokens):
            strand.reason = "stop"
        elif len(strand.tokens) == self.budget:
            strand.reason = "length"

    def answer(self) -> SampleResponse:
        """Build the response, once ``done``.

        Raises:
            RequestFailedError: what it ran into.
        """
        if self.error is not None:
            raise self.error
        if not self.prompt.sound():
            raise self._diverged()
        payload = self.payload
        name = secrets.token_hex(8)
        sequences = [
            SampledSequence(
                strand.reason or "length",
                strand.tokens,
                strand.logprobs,
                strand.ranked if payload.topk_sample_logprobs else None,
                f"{name}:{index}",
            )
            for index, strand in enumerate(self.strands)
        ]
        return SampleResponse(
            sequences,
            self.prompt.prompt_logprobs(),
            self.prompt.topk(),
            target_prompt_logprobs=self.prompt.targets(),
            prompt_alt_tokens=self.prompt.alt_tokens(),
        )

    def _diverged(self) -> DivergedError:
        why = "the base model overflows on this prompt" if self.adapter is None else "its adapter has diverged"
        return DivergedError(f"the logits of this sampler are not finite: {why}")

    def afresh(self) -> Draw:
        """Return the same request, not begun."""
        prompt = attrs.evolve(self.prompt, scores={}, ranked={})
        return attrs.evolve(self, prompt=prompt, strands=[], pool=KVPool(), prefilled=0)


def open_draw(
    request: Request, adapter: Adapter | None, vocab_size: int, context: int, stop_ids: Collection[int], decode: Decode
) -> Draw:
    """Check a sampling request and make its state.

    Args:
        decode: token ids to text; called only where stop strings need it.

    Raises:
        InvalidRequestError: naming the field and what is allowed.
    """
    payload: Sample = request.payload
    params = payload.params
    _check(payload, vocab_size, context)
    # A last token never goes through the model: even a full context leaves room to draw one, and so to be scored.
    room = max(1, context - len(payload.prompt))
    budget = room if params.max_tokens is None else params.max_tokens
    if not 1 <= budget <= room:
        raise InvalidRequestError(
            f"{len(payload.prompt)} prompt tokens leave room for {room} of the model's {context}; asked for {budget}",
            field="sampling_params.max_tokens",
        )
    recipe = Recipe(float(params.temperature), params.top_k, float(params.top_p))
    seed = secrets.randbits(63) if params.seed is None else params.seed
    stop = _stop_rule(params, vocab_size, stop_ids, decode)
    prompt = PromptScores.of(payload, recipe.temperature, seed, vocab_size)
    head = None if adapter is None else adapter.head
    return Draw(request, payload, adapter, recipe, stop, budget, seed, prompt, head)


def _check(payload: Sample, vocab_size: int, context: int) -> None:
    params = payload.params
    bad = next((i for i, token in enumerate(payload.prompt) if not 0 <= token < vocab_size), None)
    last_n = payload.prompt_logprobs_last_n
    rules = [
        (len(payload.prompt) > 0, "prompt", "is empty; at least one token is needed"),
        (bad is None, "prompt", f"token id out of 0 to {vocab_size - 1} at position {bad}"),
        (len(payload.prompt) <= context, "prompt", f"{len(payload.prompt)} tokens; the model's context is {context}"),
        (_whole(payload.num_samples, 1), "num_samples", f"{payload.num_samples!r}; at least 1 is needed"),
        (
            _real(params.temperature, 0) and (params.temperature == 0 or params.temperature >= COLDEST),
            "sampling_params.temperature",
            f"{params.temperature!r}; 0 (greedy), or at least {COLDEST}",
        ),
        (
            params.top_k == -1 or _whole(params.top_k, 1),
            "sampling_params.top_k",
            f"{params.top_k!r}; -1 (all) or at least 1",
        ),
        (_real(params.top_p, 0) and 0 < params.top_p <= 1, "sampling_params.top_p", f"{params.top_p!r}; 0 < p <= 1"),
        (params.seed is None or _whole(params.seed, 0), "sampling_params.seed", f"{params.seed!r}; an integer >= 0"),
        (
            params.max_tokens is None or _whole(params.max_tokens, 1),
            "sampling_params.max_tokens",
            f"{params.max_tokens!r}; at least 1 is needed",
        ),
        *[
            (_whole(getattr(payload, name), 0) and getattr(payload, name) <= vocab_size, name, f"0 to {vocab_size}")
            for name in ("topk_prompt_logprobs", "topk_sample_logprobs")
        ],
        (last_n is None or _whole(last_n, 1), "prompt_logprobs_last_n", f"{last_n!r}; at least 1 is needed"),
        (
            last_n is None or payload.include_prompt_logprobs or payload.topk_prompt_logprobs > 0,
            "prompt_logprobs_last_n",
            "needs include_prompt_logprobs or topk_prompt_logprobs",
        ),
    ]
    for fine, field, message in rules:
        if not fine:
            raise InvalidRequestError(message, field=field)


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= low


def _real(value: Any, low: float) -> bool:
    return is_finite(value) and bool(value >= low)


def _stop_rule(params: SamplingParams, vocab_size: int, stop_ids: Collection[int], decode: Decode) -> StopRule:
    stop = params.stop
    if stop is None:
        return StopRule(ids=stop_ids)
    items: list[Any] = [stop] if isinstance(stop, str) else list(stop)
    if all(isinstance(item, str) and item for item in items):
        return StopRule(strings=tuple(str(item) for item in items), decode=decode)
    if all(_whole(item, 0) and int(item) < vocab_size for item in items):
        return StopRule(ids=frozenset(int(item) for item in items))
    raise InvalidRequestError(
        f"{stop!r}; None, a non-empty string, a list of such strings, or a list of token ids below {vocab_size}",
        field="sampling_params.stop",
    )
