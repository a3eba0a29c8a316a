"""What a request asks for: one frozen value each, built by the clients, read by the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import numpy as np

from tickwork.tensors import TensorData
from tickwork.types import AdamParams, Datum, LoraConfig, SamplingParams

# (data, logprobs of each datum) -> (scalar loss, metrics)
CustomLoss = Callable[[Sequence[Any], list[Any]], tuple[Any, Mapping[str, float]]]
CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]


@attrs.frozen(eq=False)
class CreateModel:
    """Make a training model, fresh or from a checkpoint.

    Args:
        base_model: None takes the checkpoint's.
        lora: None takes the checkpoint's.
        path: checkpoint to start from, or None.
        with_optimizer: also restore the optimizer's state.
        owner: whose run it is; the empty one is that of clients in process.
        session_id: the session that it belongs to, if any.
        project_id: the project that it belongs to, if any.
    """

    model_id: str
    base_model: str | None
    lora: LoraConfig | None
    path: str | None = None
    with_optimizer: bool = False
    user_metadata: Mapping[str, str] | None = None
    owner: str = ""
    session_id: str = ""
    project_id: str | None = None


@attrs.frozen(eq=False)
class ForwardBackward:
    """Compute a loss on datums; with ``backward``, add its gradient to the model's.

    Args:
        given: the datums as the caller gave them; what a custom loss is called with.
        gradients: d loss / d logprobs of each datum, float32, in place of a custom loss that can not be called again.
    """

    model_id: str
    data: tuple[Datum, ...]
    loss_fn: str | CustomLoss
    config: Mapping[str, Any]
    backward: bool
    given: Sequence[Any] = ()
    gradients: tuple[np.ndarray, ...] | None = None


@attrs.frozen(eq=False)
class OptimStep:
    """Apply and clear the accumulated gradient."""

    model_id: str
    params: AdamParams


@attrs.frozen(eq=False)
class Save:
    """Write a checkpoint to the store.

    Args:
        recipients: age public keys that an external checkpoint is encrypted for; none leaves it plain.
        request_id: which request this is, where it may come again after a crash: it then replaces what it has saved.
    """

    model_id: str
    kind: CheckpointKind
    name: str
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: Mapping[str, str] | None = None
    recipients: tuple[str, ...] = ()
    request_id: str = ""


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
        inflight: follow the training model instead: all such samplers share its weights as of the last such request.
    """

    key: str
    base_model: str | None = None
    path: str | None = None
    model_id: str | None = None
    inflight: bool = False


@attrs.frozen(eq=False)
class Capture:
    """Copy the state of a training model, and of the samplers that were taken of it.

    Args:
        samplers: whether those belong to it; without, they end with the process.
    """

    model_id: str
    samplers: bool = True


@attrs.frozen(eq=False)
class Captured:
    """The state of a training model.

    Args:
        number: of the last request that it includes; -1 without one.
        arrays: float32 ``[P]`` each: ``adapter``, ``exp_avg``, ``exp_avg_sq``, ``grad`` as far as they are there,
            ``inflight``, and ``sampler KEY`` of each sampler.
        metadata: everything else, as JSON holds it.
    """

    number: int
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]


@attrs.frozen(eq=False)
class Restore:
    """Make a training model, and the samplers that were taken of it, of a captured state.

    Args:
        samplers: those that are still wanted.
    """

    model_id: str
    state: Captured
    samplers: frozenset[str] = frozenset()


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
        target_prompt_logprobs: int64 [len(prompt) - 1, K]; tokens to score at each prompt position after the first, -1
            for none.
        prompt_alt_tokens_k: tokens to draw at each prompt position after the first.
    """

    key: str
    prompt: tuple[int, ...]
    num_samples: int
    params: SamplingParams
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0


@attrs.frozen(eq=False)
class LossNode:
    """One operation of a traced custom loss, in the encoding of the official SDK.

    Args:
        op: ``placeholder``, ``call_function``, ``call_method``, ``get_attr`` or ``output``.
        name: how later nodes refer to it.
        target: the parameter, function, method or attribute.
        args: encoded arguments; ``{"ref": name}`` is another node's value.
        kwargs: the same by name.
    """

    op: str
    name: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]


@attrs.frozen(eq=False)
class LossGraph:
    """A traced custom loss of one datum: its inputs ``(name, rank)`` and its operations in order."""

    name: str
    inputs: tuple[tuple[str, int], ...]
    nodes: tuple[LossNode, ...]


@attrs.frozen(eq=False)
class MakeLoss:
    """Make a ``CustomLoss`` from a graph."""

    graph: LossGraph


def reads_checkpoint(payload: Any) -> bool:
    """Whether a request can not be done again once a checkpoint is gone."""
    return isinstance(payload, Load) or (isinstance(payload, CreateModel) and payload.path is not None)


def changes_model(payload: Any) -> bool:
    """Whether a request that has succeeded left its training model another than it was."""
    backward = isinstance(payload, ForwardBackward) and payload.backward
    return backward or isinstance(payload, CreateModel | OptimStep | Load)
