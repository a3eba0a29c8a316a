"""The head by one fused Triton GEMM: for small hidden sizes, where writing and reading logits costs as much as them."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from tickwork_kernels.head import HeadCase, Rows
from tickwork_kernels.head_split import SplitHead, Splits, features, inverse
from tickwork_kernels.support import interpreting

SMALL = 1536


@cache
def tiles(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Return block sizes and launch options, by hidden size and dtype; never by the number of rows.

    They stand in ``tiles.json``, which ``python -m bench kernels --tune`` measures.
    """
    table = json.loads(Path(__file__).with_name("tiles.json").read_text())["gemm_fold"]
    rows = table["interpreter" if interpreting() else str(dtype).removeprefix("torch.")]
    return next(row["tile"] for row in rows if dim <= row["dim"])


class FusedHead(SplitHead):
    """Logits folded in the registers that hold them: neither written nor read."""

    name = "triton"
    invariant = True

    def why_not(self, case: HeadCase) -> str | None:
        """See ``HeadKernel``."""
        if case.rows.adapters:
            return "lora: not fused; impl='cublas' and 'torch' take it"
        return super().why_not(case)

    def preference(self, case: HeadCase) -> int:
        """On CUDA, bfloat16, small hidden sizes; until measured, where the estimate of the README favours it."""
        small = case.shape["D"] <= SMALL and case.dtype == torch.bfloat16
        return -1 if case.device.type != "cuda" else 30 if small else 10

    def split_width(self, rows: Rows) -> int:
        """See ``SplitHead``."""
        return tiles(rows.hidden.shape[1], rows.hidden.dtype)["COLUMNS"]

    def fold(self, rows: Rows, splits: Splits) -> None:
        """See ``SplitHead``."""
        head, hidden, cool = rows.head, rows.hidden, inverse(rows)
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        targets, unread = rows.targets.contiguous(), splits.k
        terms = unread if splits.terms is None else splits.terms
        tile, count = tiles(hidden.shape[1], hidden.dtype), splits.k.shape[1]
        programs = -(-len(hidden) // tile["TOKENS"]) * count
        if programs == 0:
            return
        kernel = import_module("tickwork_kernels.head_gemm_triton").gemm_fold_kernel
        kernel[(programs,)](
            hidden, hidden.stride(0), weight, weight.stride(0), unread if head.bias is None else head.bias, targets,
            unread if cool is None else cool, terms, terms if splits.weighted is None else splits.weighted,
            terms.stride(0), splits.k, splits.total, splits.k if splits.spread is None else splits.spread, count,
            splits.target_w, splits.target_w if splits.slope is None else splits.slope,
            len(hidden), len(weight), hidden.shape[1], targets.shape[1], head.multiplier, head.softcap or 1.0,
            **features(rows), UPCAST=interpreting(), **tile,
        )  # fmt: skip
