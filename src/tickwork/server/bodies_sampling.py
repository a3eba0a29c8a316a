"""The JSON bodies of sampling, and of fetching results."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tickwork import requests, types
from tickwork.errors import InvalidRequestError
from tickwork.server.strict import Body, Items, Seq
from tickwork.tensors import TensorData

# Samples of one request; more are asked for in several.
MOST_SAMPLES = 16384


class CreateSamplingSession(Body):
    """A sampler of a checkpoint or of a base model."""

    session_id: str
    sampling_session_seq_id: Seq
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class JoinSamplingSession(Body):
    """One more client of a sampler."""

    sampling_session_id: str
    type: Literal["join_sampling_session"] = "join_sampling_session"


class RetrieveFuture(Body):
    """Which result is wanted."""

    request_id: str
    allow_metadata_only: bool = False


class FuturesTarget(Body):
    """Whose results: those of one client of a sampler."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: Seq = 0


class RetrieveFutures(Body):
    """Which completions are wanted, and which results may go."""

    target: FuturesTarget
    prev_cursor: Seq = 0
    timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    retrieved_request_ids: Items[str] = Field(default_factory=list)


class CancelFuture(Body):
    """Which sample is not wanted any more."""

    request_id: str


class TextChunk(Body):
    """A run of token ids."""

    tokens: Items[Seq]
    type: Literal["encoded_text"] = "encoded_text"


class ModelInput(Body):
    """A prompt."""

    chunks: Items[TextChunk] = Field(default_factory=list)

    @field_validator("chunks", mode="before")
    @classmethod
    def _text_only(cls, chunks: object) -> object:
        for chunk in chunks if isinstance(chunks, list) else []:
            kind = chunk.get("type", "encoded_text") if isinstance(chunk, dict) else "encoded_text"
            if isinstance(kind, str) and kind != "encoded_text":
                raise ValueError(f"{kind[:40]!r} is not offered: chunks hold token ids")
        return chunks


class SamplingParams(Body):
    """How to draw."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Items[str] | Items[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Tensor(Body):
    """A tensor, dense or in compressed sparse rows."""

    data: Items[int] | Items[float]
    dtype: Literal["float32", "int64"]
    shape: Items[Seq] | None = None
    sparse_crow_indices: Items[Seq] | None = None
    sparse_col_indices: Items[Seq] | None = None

    def tensor(self, field: str) -> TensorData:
        """Return it as ours.

        Raises:
            InvalidRequestError: its parts do not fit.
        """
        try:
            return TensorData(self.data, self.dtype, self.shape, self.sparse_crow_indices, self.sparse_col_indices)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), field=field) from None
        except (ValueError, OverflowError) as error:
            raise InvalidRequestError(f"is no tensor: {error}", field=field) from None


class Sample(Body):
    """A prompt, how to draw after it, and what to score of it."""

    num_samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 1
    prompt: ModelInput
    sampling_params: SamplingParams
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str
    seq_id: Seq
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Tensor | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"

    def payload(self, key: str) -> requests.Sample:
        """Return it as the engine takes it.

        Raises:
            InvalidRequestError: a field that is not offered, or whose parts do not fit.
        """
        for name in ("base_model", "model_path"):
            if getattr(self, name) is not None:
                raise InvalidRequestError("the sampling session says which weights: leave this out", field=name)
        if self.record_stability_info:
            raise InvalidRequestError(
                "serves 'stable_reinforce' only, which is not offered", field="record_stability_info"
            )
        targets = self.target_prompt_logprobs
        return requests.Sample(
            key,
            tuple(token for chunk in self.prompt.chunks for token in chunk.tokens),
            self.num_samples,
            self._params(),
            include_prompt_logprobs=bool(self.prompt_logprobs),
            topk_prompt_logprobs=self.topk_prompt_logprobs,
            topk_sample_logprobs=self.topk_sample_logprobs,
            prompt_logprobs_last_n=self.prompt_logprobs_last_n,
            target_prompt_logprobs=None if targets is None else targets.tensor("target_prompt_logprobs"),
            prompt_alt_tokens_k=self.prompt_alt_tokens_k,
        )

    def _params(self) -> types.SamplingParams:
        given = self.sampling_params
        return types.SamplingParams(
            given.max_tokens, given.seed, given.stop, given.temperature, given.top_k, given.top_p
        )
