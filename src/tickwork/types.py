"""The values a caller builds: tokens, datums and parameters. Frozen, without torch.

Names, fields and defaults are those of the Tinker SDK, so that scripts written for it run unchanged. Values
of the official ``tinker`` package are taken by duck typing (``convert.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import attrs

from tickwork.tensors import TensorData, as_tensor_data

StopReason = Literal["stop", "length"]


def _ids(tokens: Iterable[SupportsIndex]) -> tuple[int, ...]:
    return tuple(map(operator.index, tokens))


def _chunks(chunks: Iterable[EncodedTextChunk]) -> tuple[EncodedTextChunk, ...]:
    return tuple(chunks)


@attrs.frozen
class EncodedTextChunk:
    """A run of token ids."""

    tokens: tuple[int, ...] = attrs.field(converter=_ids)
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


ModelInputChunk = EncodedTextChunk


@attrs.frozen
class ModelInput:
    """One sequence of tokens, as chunks that are read one after the other."""

    chunks: tuple[EncodedTextChunk, ...] = attrs.field(default=(), converter=_chunks)

    @classmethod
    def from_ints(cls, tokens: Iterable[int]) -> ModelInput:
        """Build from token ids."""
        return cls((EncodedTextChunk(tokens),))

    @classmethod
    def empty(cls) -> ModelInput:
        """Build the sequence of no tokens."""
        return cls()

    def to_ints(self) -> list[int]:
        """Return all token ids."""
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        """Return a new sequence with ``chunk`` at the end."""
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        """Return a new sequence with one token at the end."""
        return self.append(EncodedTextChunk((token,)))


def _coerce_inputs(inputs: Mapping[str, Any]) -> dict[str, TensorData]:
    return {key: as_tensor_data(value, key) for key, value in inputs.items()}


@attrs.frozen
class Datum:
    """One training sequence and the loss inputs that belong to it.

    Args:
        model_input: N tokens. Position i predicts ``target_tokens[i]``: the caller shifts, Tickwork never does.
        loss_fn_inputs: name -> values, of shape ``(N,)`` or ``(N, K)``; lists, arrays and tensors are converted.
    """

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = attrs.field(factory=dict, converter=_coerce_inputs)


@attrs.frozen
class AdamParams:
    """Hyper-parameters of one AdamW step, with Tinker's defaults.

    Args:
        learning_rate: step size, >= 0.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled decay per step, times the learning rate, >= 0.
        grad_clip_norm: greatest allowed global gradient norm; 0 turns clipping off.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@attrs.frozen
class AdamOptimizerConfig:
    """The choice of AdamW at a model's creation; the only optimizer Tickwork has."""

    type: Literal["adamw"] = "adamw"


@attrs.frozen
class LoraConfig:
    """The shape of an adapter: ``W' = W + (32 / rank) * B @ A``.

    Args:
        rank: rows of A, >= 1.
        seed: seed of A's initial values; None draws one, which ``get_info`` and checkpoints record.
        train_unembed: adapt the head.
        train_mlp: adapt the feed-forward projections.
        train_attn: adapt the attention projections.
    """

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@attrs.frozen
class SamplingParams:
    """How to draw tokens.

    Args:
        max_tokens: greatest number of new tokens, >= 1; None fills the model's context.
        seed: same seed, same tokens, whatever else is in the batch; None draws a new one.
        stop: None stops at the model's end-of-sequence tokens; a string, a list of strings (found also across
            token borders) or a list of token ids stops there instead; ``[]`` never stops early. What stopped a
            sequence is part of its tokens.
        temperature: 0 is greedy; logprobs are those of the distribution divided by it (of the plain one at 0).
        top_k: keep the k most likely tokens; -1 keeps all.
        top_p: keep the most likely tokens whose mass reaches p, in (0, 1].
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
