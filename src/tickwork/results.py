"""The values Tickwork answers with. Frozen; names and fields are those of the Tinker SDK."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import attrs

from tickwork.errors import InvalidRequestError
from tickwork.tensors import TensorData
from tickwork.types import AdamOptimizerConfig, StopReason

CheckpointType = Literal["training", "sampler", "external"]
KIND_TYPES: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


@attrs.frozen
class ForwardBackwardOutput:
    """What a forward or forward_backward computed.

    Args:
        loss_fn_output_type: always ``"ArrayRecord"``.
        loss_fn_outputs: one per datum, in order; ``"logprobs"`` is float32 of the targets' shape.
        metrics: ``loss:sum`` over all tokens and datums, ``clock_cycle:unique``, and what a custom loss returned.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]


@attrs.frozen
class OptimStepResponse:
    """Metrics of one optimizer step: ``optim/applied`` (0 or 1), ``optim/grad_norm``, ``optim/step``."""

    metrics: dict[str, float]


@attrs.frozen
class SaveWeightsResponse:
    """Where a training checkpoint lies, as a ``tinker://`` path."""

    path: str


@attrs.frozen
class SaveWeightsForSamplerResponse:
    """Where a sampler checkpoint lies; None for an ephemeral one, which only its sampling client can reach."""

    path: str | None
    sampling_session_id: str | None = None


@attrs.frozen
class SaveWeightsExternalResponse:
    """Where a checkpoint for download lies, and its size in bytes."""

    path: str
    size_bytes: int | None = None


@attrs.frozen
class ExternalWeightsUrlsResponse:
    """Where to fetch the files of a checkpoint for download, by name, and until when."""

    urls: dict[str, str]
    expires: datetime


@attrs.frozen
class LoadWeightsResponse:
    """What was loaded, into which model."""

    path: str
    model_id: str


@attrs.frozen
class ModelData:
    """The base model behind a training client."""

    arch: str
    model_name: str
    tokenizer_id: str


@attrs.frozen
class GetInfoResponse:
    """What a training client trains.

    Args:
        hint: one sentence if the client loses time by waiting for each result while others are busy, else None.
    """

    model_data: ModelData
    model_id: str
    model_name: str
    is_lora: bool = True
    lora_rank: int | None = None
    seed: int | None = None
    optimizer_config: AdamOptimizerConfig = attrs.Factory(AdamOptimizerConfig)
    hint: str | None = None


@attrs.frozen
class SampledSequence:
    """One drawn sequence.

    Args:
        stop_reason: ``"stop"`` or ``"length"``.
        tokens: new token ids, with what stopped the sequence at the end.
        logprobs: of each token, under the temperature-scaled distribution over the whole vocabulary.
        topk_logprobs: per token the most likely ``(id, logprob)``, when asked for.
        sequence_id: ``request:index``.
    """

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float]
    topk_logprobs: list[list[tuple[int, float]]] | None = None
    sequence_id: str = ""


@attrs.frozen
class PromptAltTokens:
    """Tokens drawn beside those of a prompt.

    Args:
        tokens: int64 [len(prompt) - 1, k].
        logprobs: float32 of the same shape, each under the distribution it was drawn from.
    """

    tokens: TensorData
    logprobs: TensorData


@attrs.frozen
class SampleResponse:
    """The sequences of one sampling request.

    Args:
        sequences: ``num_samples`` of them.
        prompt_logprobs: one per prompt token under the plain distribution, None where not scored (always the first).
        topk_prompt_logprobs: per prompt token the most likely ``(id, logprob)``, None where not scored.
        prompt_cache_hit_tokens: prompt tokens that needed no computing; 0, since no cache outlives a request.
        target_prompt_logprobs: float32 of the shape and layout asked for, 0.0 where nothing was.
        prompt_alt_tokens: when asked for.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    prompt_cache_hit_tokens: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None


@attrs.frozen
class SupportedModel:
    """A base model that can be named without a network."""

    model_name: str
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


@attrs.frozen
class GetServerCapabilitiesResponse:
    """The shipped base models and those loaded so far; any local path or hub name works besides."""

    supported_models: list[SupportedModel]


@attrs.frozen
class WeightsInfoResponse:
    """What a checkpoint was trained from."""

    base_model: str
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    is_lora: bool = True
    optimizer_config: AdamOptimizerConfig = attrs.Factory(AdamOptimizerConfig)


@attrs.frozen
class Checkpoint:
    """One saved checkpoint; ``checkpoint_id`` is ``kind/name``."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


@attrs.frozen
class TrainingRun:
    """One training client's run, as far as its checkpoints tell."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: datetime
    lora_rank: int | None = None
    corrupted: bool = False
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


@attrs.frozen
class Cursor:
    """Which part of a listing an answer holds."""

    offset: int
    limit: int
    total_count: int


@attrs.frozen
class TrainingRunsResponse:
    """A page of training runs, newest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@attrs.frozen
class CheckpointsListResponse:
    """Checkpoints, newest first."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@attrs.frozen
class ParsedCheckpointTinkerPath:
    """The three parts of ``tinker://RUN/KIND/NAME``."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @property
    def kind(self) -> str:
        """``weights``, ``sampler_weights`` or ``external_weights``."""
        return self.checkpoint_id.split("/")[0]

    @property
    def name(self) -> str:
        """The name the checkpoint was saved under."""
        return self.checkpoint_id.split("/")[1]

    @classmethod
    def from_tinker_path(cls, path: str) -> ParsedCheckpointTinkerPath:
        """Parse a path.

        Raises:
            InvalidRequestError: not of the form ``tinker://RUN/KIND/NAME``.
        """
        parts = path.removeprefix("tinker://").split("/") if isinstance(path, str) else []
        plain = all(part and not part.startswith(".") for part in parts)  # a leading dot could leave the store
        if len(parts) != 3 or not path.startswith("tinker://") or parts[1] not in KIND_TYPES or not plain:
            raise InvalidRequestError(
                f"{path!r} is not of the form tinker://RUN/KIND/NAME, where KIND is one of {', '.join(KIND_TYPES)}",
                field="path",
            )
        run, kind, name = parts
        return cls(path, run, KIND_TYPES[kind], f"{kind}/{name}")


def as_json(value: Any) -> Any:
    """Turn any of these values into what ``json.dumps`` takes."""
    if attrs.has(type(value)):
        return {field.name: as_json(getattr(value, field.name)) for field in attrs.fields(type(value))}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value
