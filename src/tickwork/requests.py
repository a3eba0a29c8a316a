"""What a request asks for: one frozen value each, built by the clients, read by the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs

from tickwork.types import AdamParams, Datum, LoraConfig, SamplingParams

# (data, logprobs of each datum) -> (scalar loss, metrics)
CustomLoss = Callable[[Sequence[Any], list[Any]], tuple[Any, Mapping[str, float]]]
CheckpointKind = Literal["weights", "sampler_weights"]


@attrs.frozen(eq=False)
class CreateModel:
    """Make a training model, fresh or from a checkpoint.

    Args:
        base_model: None takes the checkpoint's.
        lora: None takes the checkpoint's.
        path: checkpoint to start from, or None.
        with_optimizer: also restore the optimizer's state.
    """

    model_id: str
    base_model: str | None
    lora: LoraConfig | None
    path: str | None = None
    with_optimizer: bool = False
    user_metadata: Mapping[str, str] | None = None


@attrs.frozen(eq=False)
class ForwardBackward:
    """Compute a loss on datums; with ``backward``, add its gradient to the model's.

    Args:
        given: the datums as the caller gave them; what a custom loss is called with.
    """

    model_id: str
    data: tuple[Datum, ...]
    loss_fn: str | CustomLoss
    config: Mapping[str, Any]
    backward: bool
    given: Sequence[Any] = ()


@attrs.frozen(eq=False)
class OptimStep:
    """Apply and clear the accumulated gradient."""

    model_id: str
    params: AdamParams


@attrs.frozen(eq=False)
class Save:
    """Write a checkpoint to the store."""

    model_id: str
    kind: CheckpointKind
    name: str
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Mapping[str, str] | None = None


@attrs.frozen(eq=False)
class Load:
    """Load a checkpoint into a living model."""

    model_id: str
    path: str
    with_optimizer: bool


@attrs.frozen(eq=False)
class OpenSampler:
    """Make weights available for sampling under ``key``.

    Args:
        base_model: the bare base model, where neither ``path`` nor ``model_id`` is given.
        path: a checkpoint of either kind.
        model_id: a training model, of which a snapshot is taken.
    """

    key: str
    base_model: str | None = None
    path: str | None = None
    model_id: str | None = None


@attrs.frozen(eq=False)
class Release:
    """Forget a training model or a sampler that no client holds any more."""

    key: str


@attrs.frozen(eq=False)
class Sample:
    """Draw sequences after a prompt and score the prompt.

    Args:
        key: whose weights: a key of ``OpenSampler``.
        prompt: token ids.
        include_prompt_logprobs: score the prompt under the plain distribution.
        topk_prompt_logprobs: most likely tokens to return per scored prompt position.
        topk_sample_logprobs: most likely tokens to return per drawn token.
        prompt_logprobs_last_n: score only that many prompt tokens, from the end.
    """

    key: str
    prompt: tuple[int, ...]
    num_samples: int
    params: SamplingParams
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
