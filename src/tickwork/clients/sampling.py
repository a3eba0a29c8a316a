"""``SamplingClient``: draws tokens from fixed weights and scores prompts."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from tickwork import build
from tickwork.clients.host import Door, Host
from tickwork.clients.ready import Ready
from tickwork.convert import as_prompt, as_sampling_params
from tickwork.engine.request import Request
from tickwork.futures import Future
from tickwork.models import load_tokenizer
from tickwork.requests import Sample
from tickwork.results import SampleResponse
from tickwork.tensors import TensorData, as_tensor_data
from tickwork.types import ModelInput, SamplingParams

SCORE_ONLY = SamplingParams(max_tokens=1, seed=0)


class SamplingClient(Ready):
    """Samples from one snapshot of weights: training on does not change it.

    Room: any thread, asyncio loop or Trio run. The weights are freed when the client is no longer referenced.
    """

    def __init__(self, door: Door, key: str, lane: str, ready: Future[Any], base_model: str | None) -> None:
        super().__init__(door, ready)
        self._key, self._lane, self._base_model = key, lane, base_model
        weakref.finalize(self, door.forget, key, lane).atexit = False

    def __repr__(self) -> str:
        return f"<SamplingClient {self._key}>"

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> Future[SampleResponse]:
        """Draw sequences after a prompt.

        Args:
            prompt: at least one token.
            num_samples: sequences to draw, each from random numbers of its own.
            sampling_params: how to draw.
            include_prompt_logprobs: also score each prompt token (the first has no score).
            topk_prompt_logprobs: also return that many most likely tokens at each prompt position.
            topk_sample_logprobs: also return that many most likely tokens at each drawn position.
            target_prompt_logprobs: int64 ``[len(prompt) - 1, K]``, dense or sparse: tokens to score at each prompt
                position after the first; -1, or not listed, asks for nothing.
            prompt_alt_tokens_k: also draw that many tokens at each prompt position after the first, at the request's
                temperature.
            prompt_logprobs_last_n: score only that many prompt tokens, from the end.

        Returns:
            a future; its ``cancel()`` ends the drawing before the next token.
        """
        scores = (include_prompt_logprobs, topk_prompt_logprobs, topk_sample_logprobs, prompt_logprobs_last_n)
        others = (target_prompt_logprobs, prompt_alt_tokens_k)
        return self._door.submit(partial(self._request, prompt, num_samples, sampling_params, scores, others))

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> SampleResponse:
        """Draw sequences and wait for them; arguments as for ``sample``.

        Cancel: the drawing is abandoned, since nobody else holds its future.
        """
        scores = (include_prompt_logprobs, topk_prompt_logprobs, topk_sample_logprobs, prompt_logprobs_last_n)
        others = (target_prompt_logprobs, prompt_alt_tokens_k)
        build = partial(self._request, prompt, num_samples, sampling_params, scores, others)
        future: Future[SampleResponse] = await self._door.submit_async(build)
        try:
            return await future
        finally:
            future.cancel()

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> Future[list[float | None]]:
        """Score each token of a prompt given those before it, at temperature 1.

        Returns:
            one logprob per prompt token, None where not scored (always the first).
        """
        response = self.sample(prompt, 1, SCORE_ONLY, True, prompt_logprobs_last_n=prompt_logprobs_last_n)
        return response.then(lambda sampled: sampled.prompt_logprobs or [])

    async def compute_logprobs_async(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> list[float | None]:
        """Score a prompt and wait for it; as ``compute_logprobs``."""
        sampled = await self.sample_async(prompt, 1, SCORE_ONLY, True, prompt_logprobs_last_n=prompt_logprobs_last_n)
        return sampled.prompt_logprobs or []

    def get_base_model(self) -> str:
        """Return the base model's name; waits for the weights if only their checkpoint knows it."""
        if self._base_model is None:
            self._base_model = str(self._ready.result())
        return self._base_model

    async def get_base_model_async(self) -> str:
        """Return the base model's name."""
        await self.result_async()
        return self.get_base_model()

    def get_tokenizer(self) -> Any:
        """Return the base model's transformers tokenizer."""
        return load_tokenizer(self.get_base_model())

    async def get_tokenizer_async(self) -> Any:
        """Return the base model's transformers tokenizer."""
        return load_tokenizer(await self.get_base_model_async())

    def _request(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        scores: tuple[bool, int, int, int | None],
        others: tuple[Any, int],
    ) -> Request:
        tokens = as_prompt(prompt)
        targets = None if others[0] is None else as_tensor_data(others[0], "target_prompt_logprobs")
        params = as_sampling_params(sampling_params)
        payload = Sample(self._key, tokens, num_samples, params, *scores, targets, others[1])
        return Request("sample", self._lane, payload, tokens=len(tokens))


def open_sampler(host: Host, path: str | None, base_model: str | None) -> SamplingClient:
    """Return a sampling client of a checkpoint or of a bare base model."""
    key = host.next_id("sample")
    return SamplingClient(host, key, key, host.submit(partial(build.open_sampler, key, path, base_model)), base_model)
