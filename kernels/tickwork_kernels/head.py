"""What a head is, what a chunk of rows asks of it, and what an implementation of it must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tickwork_kernels.lora_groups import alike, rows_of, stacked
from tickwork_kernels.multi_lora import LoraSegment
from tickwork_kernels.token_losses import BoundLoss

# Elements of one chunk of logits: 16 MiB of float32, but never fewer rows than a GEMM needs to be efficient.
CHUNK_ELEMENTS = 2**22
CHUNK_ROWS = (128, 1024)


@dataclass(frozen=True)
class Head:
    """A linear head.

    Args:
        weight: ``[V, D]``, float32, bfloat16 or float64.
        bias: ``[V]`` or None.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
        multiplier: factor of the logits, before the softcap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    multiplier: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """What logits and gradients are computed and returned in: float32, or float64 for a float64 weight."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Lora:
    """One adapter of the head for all rows: ``weight + scale * b @ a``, with ``a`` ``[r, D]`` and ``b`` ``[V, r]``."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


Adapters = Lora | Sequence[LoraSegment] | None


def as_segments(adapters: Adapters, rows: int) -> list[LoraSegment]:
    """Return adapters as segments of rows; one ``Lora`` is a segment of all of them."""
    if isinstance(adapters, Lora):
        return [LoraSegment(0, rows, adapters.a, adapters.b, adapters.scale)]
    return list(adapters or ())


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted; ``entropy`` if one will come in through the entropy."""

    hidden: bool = True
    adapters: bool = False
    weight: bool = False
    bias: bool = False
    entropy: bool = False

    @property
    def any(self) -> bool:
        """Whether there will be a backward."""
        return self.hidden or self.logits

    @property
    def logits(self) -> bool:
        """Whether the gradient of the logits itself is needed, not only its product with the weight."""
        return self.adapters or self.weight or self.bias


NOTHING = Needs(hidden=False)


@dataclass(frozen=True)
class Rows:
    """Tokens and the head they go through; all of a call's, or one chunk of them.

    Args:
        hidden: ``[n, D]`` in the weight's dtype.
        targets: ``[n, K]`` int64, within the vocabulary.
        head: the head.
        adapters: segments with an adapter of the head, in order; none where the base alone applies.
        temperature: ``[n]`` in ``head.dtype``, or None for 1. Divides the logits, after the softcap.
        entropy: whether the entropy is wanted.
        needs: the gradients that will be wanted.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    head: Head
    adapters: Sequence[LoraSegment] = ()
    temperature: torch.Tensor | None = None
    entropy: bool = False
    needs: Needs = field(default=Needs())

    def chunk(self, start: int, stop: int) -> Rows:
        """Return rows ``start`` to ``stop``."""
        adapters = [
            each._replace(start=max(each.start, start) - start, stop=min(each.stop, stop) - start)
            for each in self.adapters
            if each.a is not None and each.start < stop and each.stop > start
        ]
        temperature = None if self.temperature is None else self.temperature[start:stop]
        span = slice(start, stop)
        return replace(
            self, hidden=self.hidden[span], targets=self.targets[span], adapters=adapters, temperature=temperature
        )

    def take(self, index: torch.Tensor) -> Rows:
        """Return the rows of a sorted index."""
        bounds = [bound for each in self.adapters for bound in (each.start, each.stop)]
        places = torch.searchsorted(index, torch.tensor(bounds, dtype=index.dtype, device=index.device)).tolist()
        adapters = [
            each._replace(start=start, stop=stop)
            for each, start, stop in zip(self.adapters, places[::2], places[1::2], strict=True)
        ]
        temperature = None if self.temperature is None else self.temperature[index]
        return replace(
            self, hidden=self.hidden[index], targets=self.targets[index], adapters=adapters, temperature=temperature
        )


@dataclass
class Chunk:
    """What is known of a chunk after its forward.

    Args:
        logprobs: ``[n, K]`` of the targets.
        lse: ``[n]`` logsumexp of the logits.
        entropy: ``[n]`` in nats, where it was wanted.
        slope: ``[n, K]`` derivative of the softcap at the targets, or None without one.
        kept: whatever the implementation needs for ``bulk`` and ``through``.
        nbytes: size of ``kept``.
        losses: ``[n, K]`` of a loss that the implementation has fused, else None.
        upstream: ``[n, K]`` its derivative.
    """

    logprobs: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    kept: Any = None
    nbytes: int = 0
    losses: torch.Tensor | None = None
    upstream: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadCase:
    """What an implementation is asked whether it can do: the rows of a call, and its loss."""

    rows: Rows
    loss: BoundLoss | None = None

    @property
    def device(self) -> torch.device:
        """Where the call runs."""
        return self.rows.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """The weight's."""
        return self.rows.head.weight.dtype

    @property
    def shape(self) -> Mapping[str, int]:
        """``N`` tokens, ``D`` hidden size, ``V`` vocab, ``K`` targets of a token."""
        (n, d), (v, _), k = self.rows.hidden.shape, self.rows.head.weight.shape, self.rows.targets.shape[1]
        return {"N": n, "D": d, "V": v, "K": k}


class HeadKernel:
    """Base of all implementations of the head.

    With ``u`` the final logits of a row (adapters, bias, multiplier, softcap and temperature applied), ``p`` their
    softmax and ``slope`` the derivative of the softcap, an implementation computes logprobs in ``forward`` and,
    where asked, ``p * (alpha - beta * (log p + entropy)) * slope`` in ``bulk``. All else is common to all of them.

    Attributes:
        name: what ``impl=`` takes.
        numerics: how exact logits are, for the bench's table.
        invariant: whether a token's logprob is the same in every bit whatever the other rows are.
    """

    name: str
    numerics = "float32 logits"
    invariant = False

    def why_not(self, case: HeadCase) -> str | None:
        """Return why it can not run a case; None where it can."""
        return None

    def preference(self, case: HeadCase) -> int:
        """Return how well it suits a case; below 0 it runs only by name."""
        return -1

    def chunk_rows(self, rows: Rows) -> int:
        """Rows of one chunk; must depend on the head only, that results do not depend on the number of rows."""
        low, high = CHUNK_ROWS
        return max(low, min(high, CHUNK_ELEMENTS // rows.head.weight.shape[0]))

    def workspace(self, rows: Rows) -> int:
        """Bytes of the largest buffers of one chunk, for ``explain``."""
        return 2 * self.chunk_rows(rows) * rows.head.weight.shape[0] * 4

    def forward(self, rows: Rows, loss: BoundLoss | None) -> Chunk:
        """Return logprobs, lse and what was wanted besides; may evaluate ``loss`` too, in the same launch."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def bulk(self, rows: Rows, chunk: Chunk, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the untempered logits but for the targets' columns, which are 0.

        Args:
            alpha: ``[n]`` factor of the softmax.
            beta: ``[n]`` factor of the entropy's part, or None for 0.

        Returns:
            ``[n, V]``, in ``head.dtype`` or in the weight's dtype. May consume ``chunk.kept``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no bulk")

    def select(self, chunk: Chunk, index: torch.Tensor) -> Chunk | None:
        """Return the part of a chunk that belongs to some rows; None where all rows must go through the backward."""
        return None

    def through(self, rows: Rows, chunk: Chunk, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        """Return ``bulk(...) @ weight``, ``[n, D]`` in ``head.dtype``."""
        return rounded_matmul(self.bulk(rows, chunk, alpha, beta), rows.head.weight)


def matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x @ y``, accumulated and returned in float32 (float64 for float64); bfloat16 products are exact in it."""
    if x.dtype == y.dtype and x.dtype in (torch.float32, torch.float64):
        return x @ y
    if x.is_cuda:
        return torch.mm(x.to(y.dtype), y, out_dtype=torch.float32)
    return x.float() @ y.float()


def rounded_matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``matmul`` with ``x`` rounded to ``y``'s dtype and, on CPU, the sum as well; for gradients, not for logits.

    CPU has no bfloat16 product with a float32 result, and converting a whole weight costs more than the product.
    """
    if x.is_cuda or y.dtype in (torch.float32, torch.float64):
        return matmul(x, y)
    return (x.to(y.dtype) @ y).float()


def head_logits(hidden: torch.Tensor, head: Head, adapters: Adapters = None) -> torch.Tensor:
    """Return logits of all rows at once; for sampling, where rows are few, and for the reference.

    Semantics: ``softcap((hidden @ weight.T + scale * hidden @ a.T @ b.T + bias) * multiplier)``.

    Args:
        hidden: ``[N, D]`` in the weight's dtype.
        adapters: one for all rows, segments of rows with one each, or None.

    Returns:
        ``[N, V]`` in ``head.dtype``.
    """
    logits = matmul(hidden, head.weight.T)
    for group in alike([each for each in as_segments(adapters, len(hidden)) if each.a is not None]):
        a, b = stacked(group, logits.dtype)
        low = torch.bmm(rows_of(group, hidden).to(logits.dtype), a.transpose(1, 2))
        rows_of(group, logits).baddbmm_(low, b.transpose(1, 2), alpha=group[0].scale)
    if head.bias is not None:
        logits += head.bias.to(logits.dtype)
    if head.multiplier != 1.0:
        logits *= head.multiplier
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits
