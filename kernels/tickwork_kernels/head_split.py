"""What the CUDA implementations of the head share: buffers of splits, and the launches that finish a row."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from tickwork_kernels.head import Chunk, HeadCase, HeadKernel, Rows
from tickwork_kernels.support import interpreting, on_device, why_no_triton
from tickwork_kernels.token_losses import BoundLoss

# Bytes of the probabilities of one chunk; rows of a chunk are a multiple of ROW_STEP.
CHUNK_BYTES = 2**29
ROW_STEP, MOST_ROWS = 256, 4096
INTERPRETED_ROWS = 64


@dataclass
class Splits:
    """Buffers of one chunk.

    Args:
        width: columns of a split.
        terms: ``[n, V]`` terms of the softmax relative to their split's ``k``, times the softcap's slope; the targets
            are 0. In the weight's dtype. None where no gradient is wanted.
        weighted: ``[n, V]`` terms times their log2; None without an entropy's gradient.
        k: ``[n, S]``; ``total`` and ``spread`` likewise: see ``head_rows_triton``.
        target_w: ``[n, K]`` logits of the targets in log2.
        slope: ``[n, K]`` the softcap's slope there.
        peak: ``[n]`` of all splits and targets, in log2; ``log_total`` ``[n]`` log2 of the sum of terms over it.
    """

    width: int
    terms: torch.Tensor | None
    weighted: torch.Tensor | None
    k: torch.Tensor
    total: torch.Tensor
    spread: torch.Tensor | None
    target_w: torch.Tensor
    slope: torch.Tensor | None
    peak: torch.Tensor
    log_total: torch.Tensor

    @staticmethod
    def empty(rows: Rows, width: int) -> Splits:
        """Return buffers to fill. Nothing is read that was not written before."""
        (n, vocab), device = (len(rows.hidden), len(rows.head.weight)), rows.hidden.device
        # The interpreter truncates where a GPU rounds.
        dtype = torch.float32 if interpreting() else rows.head.weight.dtype

        def make(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        splits, count = -(-vocab // width), rows.targets.shape[1]
        return Splits(
            width,
            wide(rows, dtype) if rows.needs.any else None,
            wide(rows, dtype) if rows.needs.entropy else None,
            make(n, splits),
            make(n, splits),
            make(n, splits) if rows.entropy else None,
            make(n, count),
            make(n, count) if rows.head.softcap is not None else None,
            make(n),
            make(n),
        )


class SplitHead(HeadKernel):
    """Base of the implementations that fold logits split by split."""

    def why_not(self, case: HeadCase) -> str | None:
        """See ``HeadKernel``."""
        if case.dtype not in (torch.float32, torch.bfloat16):
            return f"weight: is {case.dtype}, not float32 or bfloat16"
        return why_no_triton(case.device)

    def chunk_rows(self, rows: Rows) -> int:
        """See ``HeadKernel``: a number of rows whose probabilities take a bounded number of bytes."""
        if interpreting():
            return INTERPRETED_ROWS
        bytes_per_row = len(rows.head.weight) * rows.head.weight.element_size()
        return max(ROW_STEP, min(MOST_ROWS, CHUNK_BYTES // bytes_per_row // ROW_STEP * ROW_STEP))

    def workspace(self, rows: Rows) -> int:
        """See ``HeadKernel``."""
        return self.chunk_rows(rows) * len(rows.head.weight) * rows.head.weight.element_size()

    def fold(self, rows: Rows, splits: Splits) -> None:
        """Fill the buffers."""
        raise NotImplementedError

    def split_width(self, rows: Rows) -> int:
        """Columns of a split; depends on the head only."""
        raise NotImplementedError

    def forward(self, rows: Rows, loss: BoundLoss | None) -> Chunk:
        """See ``HeadKernel``."""
        splits = Splits.empty(rows, self.split_width(rows))
        with on_device(rows.hidden.device):
            self.fold(rows, splits)
            chunk = _finish(rows, splits, loss)
        chunk.slope = splits.slope
        if rows.needs.any:
            chunk.kept = splits
            chunk.nbytes = sum(t.nbytes for t in (splits.terms, splits.weighted) if t is not None)
        return chunk

    def bulk(self, rows: Rows, chunk: Chunk, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        """See ``HeadKernel``; without ``beta`` what was kept is overwritten."""
        splits: Splits = chunk.kept
        assert splits.terms is not None
        out = splits.terms if beta is None else wide(rows, splits.terms.dtype)
        (n, count), height = splits.k.shape, tile_rows(1)
        if n == 0:
            return out
        with on_device(out.device):
            launches().probabilities_kernel[(-(-n // height), count)](
                splits.terms, *_or(splits.weighted, splits.terms), splits.terms.stride(0), out, out.stride(0),
                splits.k, count, splits.width, splits.peak, splits.log_total, *_or(chunk.entropy, chunk.lse), alpha,
                *_or(beta, alpha), n, out.shape[1], BETA=beta is not None, ROWS=height,
                BLOCK=min(4096, power_of_two(splits.width)), num_warps=8,
            )  # fmt: skip
        return out


def _finish(rows: Rows, splits: Splits, loss: BoundLoss | None) -> Chunk:
    (n, count), like = rows.targets.shape, splits.k
    twin = None if loss is None else loss.loss.jit()
    logprobs, lse = like.new_empty(n, count), like.new_empty(n)
    entropy = like.new_empty(n) if rows.entropy else None
    losses, upstream = (like.new_empty(n, count), like.new_empty(n, count)) if twin is not None else (None, None)
    inputs, config = like, like
    if loss is not None and twin is not None:
        inputs = torch.stack([loss.inputs[name] for name in loss.loss.inputs] or [like]).contiguous()
        config = torch.tensor([loss.config[name] for name in loss.loss.config] or [0.0], device=like.device)
    height = tile_rows(1)
    if n:
        launches().finish_kernel[(-(-n // height),)](
            splits.k, splits.total, *_or(splits.spread, like), splits.k.shape[1], splits.target_w,
            rows.targets.contiguous(), logprobs, lse, *_or(entropy, lse), splits.peak, splits.log_total, inputs, config,
            *_or(losses, lse), *_or(upstream, lse), n, count, ENTROPY=entropy is not None, LOSS=twin,
            INPUTS=len(loss.loss.inputs) if loss is not None else 0,
            SETTINGS=len(loss.loss.config) if loss is not None else 0,
            ROWS=height, SPLITS=power_of_two(splits.k.shape[1]), COUNT=power_of_two(count),
        )  # fmt: skip
    return Chunk(logprobs, lse, entropy, losses=losses, upstream=upstream)


def launches() -> Any:
    """Return the module of row kernels; importing it imports triton."""
    return import_module("tickwork_kernels.head_rows_triton")


def features(rows: Rows) -> dict[str, Any]:
    """Return what kernels are compiled for."""
    return {
        "BIAS": rows.head.bias is not None,
        "SOFTCAP": rows.head.softcap is not None,
        "TEMPERATURE": rows.temperature is not None,
        "ENTROPY": rows.entropy,
        "KEEP": rows.needs.any,
        "KEEP_WEIGHTED": rows.needs.entropy,
    }


def bias_of(rows: Rows, unread: torch.Tensor) -> torch.Tensor:
    """Return the bias as kernels read it, or what stands for one that is not read."""
    return unread if rows.head.bias is None else rows.head.bias.contiguous()


def inverse(rows: Rows) -> torch.Tensor | None:
    """Return 1 / temperature, ``[n]`` contiguous."""
    return None if rows.temperature is None else rows.temperature.reciprocal().contiguous()


def power_of_two(n: int) -> int:
    """Return the least power of two that is not less than ``n``."""
    return 1 << max(0, n - 1).bit_length()


def wide(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """Return an empty ``[n, V]`` whose rows begin at multiples of 16 elements, which GEMMs and copies want."""
    vocab = len(rows.head.weight)
    padded = torch.empty(len(rows.hidden), -(-vocab // 16) * 16, dtype=dtype, device=rows.hidden.device)
    return padded[:, :vocab]


def tile_rows(compiled: int) -> int:
    """Return how many rows a program takes: in the interpreter many, since each program costs milliseconds there."""
    return 64 if interpreting() else compiled


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> tuple[torch.Tensor]:
    """Return a tensor, or one that stands for an address which will not be read."""
    return (other if tensor is None else tensor,)
