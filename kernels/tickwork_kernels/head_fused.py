"""The head by one fused Triton GEMM: for small hidden sizes, where writing and reading logits costs as much as them."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tickwork_kernels.head import HeadCase, Rows
from tickwork_kernels.head_split import SplitHead, Splits, bias_of, features, inverse
from tickwork_kernels.support import interpreting

SMALL = 1536


@cache
def tiles(dim: int, dtype: torch.dtype, wide: bool) -> dict[str, int]:
    """Return block sizes and launch options, by hidden size, dtype and features; never by the number of rows.

    They stand in ``tiles.json``, which ``python -m bench kernels --tune`` measures. ``wide`` is for a softcap or an
    entropy's gradient, which take registers of their own.
    """
    table = json.loads(Path(__file__).with_name("tiles.json").read_text())["gemm_fold"]
    kind = str(dtype).removeprefix("torch.") + " wide" * wide
    rows = table["interpreter" if interpreting() else kind]
    return next(row["tile"] for row in rows if dim <= row["dim"])


def tile_of(rows: Rows) -> dict[str, int]:
    """Return the tile for some rows."""
    wide = rows.head.softcap is not None or rows.needs.entropy
    return tiles(rows.hidden.shape[1], rows.hidden.dtype, wide)


class FusedHead(SplitHead):
    """Logits folded in the registers that hold them: neither written nor read."""

    name = "triton"
    invariant = True

    def why_not(self, case: HeadCase) -> str | None:
        """See ``HeadKernel``."""
        if case.rows.adapters:
            return "lora: not fused; impl='cublas' and 'torch' take it"
        step = 16 // case.rows.head.weight.element_size()
        if case.shape["D"] % step:
            return f"hidden: D = {case.shape['D']} is no multiple of {step}, which tensor descriptors need"
        return super().why_not(case)

    def preference(self, case: HeadCase) -> int:
        """On CUDA, bfloat16, small hidden sizes; until measured, where the estimate of the README favours it."""
        small = case.shape["D"] <= SMALL and case.dtype == torch.bfloat16
        return -1 if case.device.type != "cuda" else 30 if small else 10

    def split_width(self, rows: Rows) -> int:
        """See ``SplitHead``."""
        return tile_of(rows)["COLUMNS"]

    def fold(self, rows: Rows, splits: Splits) -> None:
        """See ``SplitHead``."""
        head, cool, targets, tile = rows.head, inverse(rows), rows.targets.contiguous(), tile_of(rows)
        unread, count = splits.k, splits.k.shape[1]
        terms = unread if splits.terms is None else splits.terms
        programs = -(-len(rows.hidden) // tile["TOKENS"]) * count
        if programs == 0:
            return
        kernel = import_module("tickwork_kernels.head_gemm_triton").gemm_fold_kernel
        kernel[(programs,)](
            descriptor(rows.hidden, tile["TOKENS"], tile["DEPTH"]),
            descriptor(head.weight, tile["COLUMNS"], tile["DEPTH"]),
            bias_of(rows, unread), targets, unread if cool is None else cool,
            terms, terms if splits.weighted is None else splits.weighted, terms.stride(0),
            splits.k, splits.total, splits.k if splits.spread is None else splits.spread, count,
            splits.target_w, splits.target_w if splits.slope is None else splits.slope,
            len(rows.hidden), len(head.weight), rows.hidden.shape[1], targets.shape[1], float(head.multiplier),
            float(head.softcap or 1), **features(rows), UPCAST=interpreting(), **tile,
        )  # fmt: skip


def descriptor(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    """Return a tensor descriptor of a matrix; what the copy engine can not address is copied first."""
    aligned = matrix.stride(1) == 1 and matrix.stride(0) % (16 // matrix.element_size()) == 0
    tensor = matrix if aligned and matrix.data_ptr() % 16 == 0 else matrix.clone(memory_format=torch.contiguous_format)
    return import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor(tensor, [rows, columns])
