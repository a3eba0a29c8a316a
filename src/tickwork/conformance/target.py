"""``Target``: the server under question, as probes see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tickwork.conformance.probe import FoundError, Verdict

TOKENS = (3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7)
OTHER = (1, 2, 3, 4, 5, 6)
# A large eps makes a step of AdamW proportional to the gradient, so that effects can be compared in size.
LINEAR = {"learning_rate": 5e-4, "eps": 1.0}

# Not authorised, too much at once, in conflict: those say nothing of what was asked for.
REFUSALS = (400, 404, 422)


class Target:
    """A server, asked through the official SDK.

    Args:
        tinker: the official package.
        model: base model that it serves.
        seconds: how long one answer may take.
    """

    def __init__(self, tinker: Any, base_url: str, api_key: str, model: str, seconds: float) -> None:
        self.tinker, self.types = tinker, tinker.types
        self.base_url, self.api_key, self.model, self.seconds = base_url, api_key, model, seconds
        self.service: Any = None

    @contextmanager
    def session(self) -> Iterator[Target]:
        """Open a session, and close it again: what one probe makes is gone before the next."""
        self.service = self.tinker.ServiceClient(base_url=self.base_url, api_key=self.api_key)
        try:
            yield self
        finally:
            self.service.close("success").result(self.seconds)

    def wait(self, future: Any) -> Any:
        """Return a result."""
        return future.result(self.seconds)

    def is_refusal(self, error: Exception) -> bool:
        """Whether an error says that the request was wrong, rather than that the server is."""
        if isinstance(error, self.tinker.RequestFailedError):
            return str(error.category) == "user"
        return isinstance(error, self.tinker.APIStatusError) and error.status_code in REFUSALS

    def client(self, **lora: Any) -> Any:
        """Return a new training client; each has the same seed unless told otherwise."""
        return self.wait(self.service.create_lora_training_client(self.model, **{"rank": 8, "seed": 1, **lora}))

    def datum(self, tokens: Sequence[int] = TOKENS, **inputs: Any) -> Any:
        """Return a datum that predicts each next token."""
        count = len(tokens) - 1
        if not inputs:
            inputs = {"weights": [1.0] * count}
        given = {"target_tokens": list(tokens[1:]), **inputs}
        return self.types.Datum(model_input=self.types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=given)

    def look(self, client: Any, data: Sequence[Any], loss: str = "cross_entropy", config: Any = None) -> Any:
        """Return ``(loss:sum, logprobs of each datum)`` without a gradient."""
        out = self.wait(client.forward(list(data), loss, config))
        return out.metrics["loss:sum"], [item["logprobs"].to_numpy() for item in out.loss_fn_outputs]

    def scores(self, client: Any) -> np.ndarray:
        """Return the logprobs of two fixed sequences: they tell whether a model has changed."""
        parts = self.look(client, [self.datum(), self.datum(OTHER)])[1]
        return np.concatenate(parts)

    def learn(self, client: Any, data: Sequence[Any], loss: str = "cross_entropy", config: Any = None) -> Any:
        """Add a gradient and return the output."""
        return self.wait(client.forward_backward(list(data), loss, config))

    def step(self, client: Any, **adam: Any) -> Any:
        """Take an optimizer step."""
        return self.wait(client.optim_step(self.types.AdamParams(**{**LINEAR, **adam})))

    def effect(self, *passes: Any, lora: Any = None, steps: int = 1, **adam: Any) -> np.ndarray:
        """Return how much a fresh client's logprobs change by a step on ``(data, loss, config)`` passes."""
        client = self.client(**(lora or {}))
        before = self.scores(client)
        for _ in range(steps):
            for given in passes or [([self.datum()],)]:
                self.learn(client, *given)
            self.step(client, **adam)
        changed: np.ndarray = self.scores(client) - before
        return changed

    def sampler(self) -> Any:
        """Return a sampler of a slightly trained client."""
        client = self.client()
        for _ in range(2):
            self.learn(client, [self.datum()])
            self.step(client, learning_rate=5e-3, eps=1e-8)
        return client, self.wait(client.save_weights_and_get_sampling_client())

    def checked_sample(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """Return a sampling response, where the SDK itself looks whether an option was honoured."""
        try:
            return self.sample(*args, **kwargs)
        except RuntimeError as error:
            raise FoundError(Verdict.IGNORED, f"{what} is not honoured: {error}") from None

    def sample(
        self, sampler: Any, count: int = 1, prompt: Sequence[int] = TOKENS, more: Any = None, **params: Any
    ) -> Any:
        """Return a sampling response."""
        settings = self.types.SamplingParams(**{"max_tokens": 8, "stop": [], **params})
        return self.wait(sampler.sample(self.types.ModelInput.from_ints(list(prompt)), count, settings, **(more or {})))
