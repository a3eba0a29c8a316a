"""The head by cuBLAS and Triton: blocks of float32 logits that stay in the L2 cache, folded row by row."""

from __future__ import annotations

import torch

from tickwork_kernels.head import HeadCase, Rows, matmul
from tickwork_kernels.head_split import SplitHead, Splits, bias_of, features, inverse, launches, power_of_two, tile_rows
from tickwork_kernels.support import interpreting

# Bytes of a block of logits, under the 50 MB of an H100's L2; and the widest split a row kernel takes at once.
BLOCK_BYTES = 2**25
WIDEST = 8192


class CublasHead(SplitHead):
    """GEMMs by cuBLAS with float32 results, everything else in row kernels; adapters of the head too.

    Every chunk has the same number of rows, the last filled up with zeros: cuBLAS may choose another algorithm, with
    another order of summation, for another number of rows.
    """

    name = "cublas"
    invariant = True

    def preference(self, case: HeadCase) -> int:
        """On CUDA, where nothing is fused better."""
        return 20 if case.device.type == "cuda" else -1

    def split_width(self, rows: Rows) -> int:
        """See ``SplitHead``."""
        widest = 64 if interpreting() else WIDEST
        room = BLOCK_BYTES // 4 // self.chunk_rows(rows)
        return min(widest, power_of_two(len(rows.head.weight)), max(256, power_of_two(room + 1) // 2))

    def fold(self, rows: Rows, splits: Splits) -> None:
        """See ``SplitHead``."""
        head, hidden = rows.head, self._filled(rows)
        low = [
            hidden[each.start : each.stop].float() @ each.a.float().T for each in rows.adapters if each.a is not None
        ]
        cool = inverse(rows)
        targets = rows.targets.contiguous()
        for split, first in enumerate(range(0, len(head.weight), splits.width)):
            part = slice(first, first + splits.width)
            logits = matmul(hidden, head.weight[part].T)
            for each, thin in zip(rows.adapters, low, strict=True):
                assert each.b is not None
                logits[each.start : each.stop].addmm_(thin, each.b[part].float().T, alpha=each.scale)
            self._launch(rows, splits, logits, split, first, targets, cool)

    def _filled(self, rows: Rows) -> torch.Tensor:
        missing = self.chunk_rows(rows) - len(rows.hidden)
        if missing <= 0:
            return rows.hidden
        return torch.cat([rows.hidden, rows.hidden.new_zeros(missing, rows.hidden.shape[1])])

    def _launch(
        self, rows: Rows, splits: Splits, logits: torch.Tensor, split: int, first: int, targets: torch.Tensor,
        cool: torch.Tensor | None,
    ) -> None:  # fmt: skip
        head, unread = rows.head, logits
        if len(rows.hidden) == 0:
            return
        terms = unread if splits.terms is None else splits.terms
        launches().fold_kernel[(-(-len(rows.hidden) // tile_rows(1)),)](
            logits, logits.stride(0), bias_of(rows, unread), targets,
            unread if cool is None else cool, terms, terms if splits.weighted is None else splits.weighted,
            terms.stride(0), splits.k, splits.total, splits.k if splits.spread is None else splits.spread, split,
            splits.k.shape[1], splits.target_w, splits.target_w if splits.slope is None else splits.slope, first,
            len(rows.hidden), logits.shape[1], targets.shape[1], float(head.multiplier), float(head.softcap or 1),
            **features(rows), ROWS=tile_rows(1), BLOCK=power_of_two(splits.width), num_warps=8,
        )  # fmt: skip
