"""``--tune``: block sizes of the fused GEMM by hidden size and dtype, measured and written to ``tiles.json``.

Never by the number of rows: a token's logprob must not depend on how many others share its batch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from bench import record
from bench.kernels.cases import HEAD, Case
from bench.kernels.inputs import make
from bench.kernels.timing import Plan, describe, once, quantile, simple
from tickwork_kernels import head_fused
from tickwork_kernels.head import Chunk, Head, Rows

TILES = Path(head_fused.__file__).with_name("tiles.json")
KEY, LAST = "gemm_fold", 2**30
# Hidden size that is timed -> the largest for which its winner is taken.
BUCKETS = {1024: 1536, 2048: 3072, 4096: LAST}
ROWS, VOCAB, REPEATS, SOFTCAP = 4096, 32768, 7, 30.0
DEFAULT_SECONDS = 60.0
TOLERANCE = {"bfloat16": (1e-3, 2**-6), "float32": (1e-3, 1e-3)}

Tile = dict[str, int]


def _tiles(shapes: list[tuple[int, int, int, int]], stages: tuple[int, ...]) -> list[Tile]:
    names = ("TOKENS", "COLUMNS", "DEPTH", "num_warps", "num_stages", "GROUP")
    return [dict(zip(names, (*shape, depth, 16), strict=True)) for depth, shape in product(stages, shapes)]


_BFLOAT16 = [
    *_tiles([(128, 256, 64, 8), (128, 128, 64, 4), (128, 128, 64, 8), (256, 128, 64, 8), (64, 256, 64, 4)], (3, 4)),
    *_tiles([(128, 256, 32, 8), (128, 128, 128, 8)], (3,)),
]
_FLOAT32 = _tiles([(64, 64, 32, 4), (64, 64, 32, 8), (128, 64, 32, 8), (64, 128, 32, 8), (128, 128, 16, 8)], (3,))
CANDIDATES = {"bfloat16": _BFLOAT16, "bfloat16 wide": _BFLOAT16, "float32": _FLOAT32}
# Of the time left when its turn comes: the first kind is the one that matters.
SHARES = (0.6, 0.6, 1.0)


@dataclass
class Contest:
    """The candidates of one hidden size and dtype.

    Args:
        rows: what is computed.
        kind: of the table: a dtype, and whether its kernel is wide.
        wanted: logprobs and gradients by the tile in use so far.
        best: the fastest tile yet, with its seconds.
    """

    rows: Rows
    kind: str
    wanted: tuple[torch.Tensor, torch.Tensor]
    best: tuple[float, Tile]

    def enter(self, tile: Tile) -> float:
        """Time a tile; raises a ValueError if it computes something else."""
        found = run(self.rows, tile)
        for name, one, other, limit in zip(
            ("logprobs", "hidden"), found, self.wanted, TOLERANCE[self.kind.split()[0]], strict=True
        ):
            off = float((one - other).abs().max() / other.abs().max())
            if not off <= limit:
                raise ValueError(f"{name} are off by {off:.3g}, {limit:.3g} allowed")
        seconds = timed(self.rows, tile)
        self.best = min(self.best, (seconds, tile), key=lambda pair: pair[0])
        return seconds


def main(console: Console, device: torch.device, about: dict[str, Any], seconds: float, out: Path) -> int:
    """Measure within the time, write the table and a record; return 1 without a CUDA device."""
    if device.type != "cuda":
        console.print("--tune needs a CUDA device", style="bold red")
        return 1
    deadline = time.monotonic() + (DEFAULT_SECONDS if math.isinf(seconds) else seconds)
    rows: list[dict[str, Any]] = []
    for done, (kind, candidates) in enumerate(CANDIDATES.items()):
        left = deadline - time.monotonic()
        contests = {dim: contest(dim, kind, device) for dim in BUCKETS}
        if found := hold(contests, candidates, deadline - left * (1 - SHARES[done])):
            write(kind, {dim: each.best[1] for dim, each in contests.items()}, torch.cuda.get_device_name())
            rows += found
    head_fused.tiles.cache_clear()
    console.print(*(f"{row['kind']} D={row['D']} {row['tile']}: {row['result']}" for row in rows), sep="\n")
    path = record.save("tiles", about, rows, out)
    (out / "tiles.json").write_text(TILES.read_text())
    console.print(f"written to {TILES}; all times in {path}", soft_wrap=True)
    return 0


def contest(dim: int, kind: str, device: torch.device) -> Contest:
    """Return a contest of a kind of the table that begins with the tile in use; wide is a head with a softcap."""
    dtype, _, wide = kind.partition(" ")
    inputs = make(Case(HEAD, ROWS, dim, VOCAB, dtype), device)
    head = Head(inputs.weight, softcap=SOFTCAP if wide else None)
    rows = Rows(inputs.hidden.detach(), inputs.targets[:, None], head)
    tile = dict(head_fused.tile_of(rows))
    return Contest(rows, kind, run(rows, tile), (timed(rows, tile), tile))


def hold(contests: Mapping[int, Contest], candidates: list[Tile], deadline: float) -> list[dict[str, Any]]:
    """Let every tile, compiled once, run at each hidden size; return a row for each time or error."""
    rows = []
    for tile in candidates:
        if time.monotonic() > deadline:
            break
        for dim, each in contests.items():
            try:
                result = f"{1e3 * each.enter(tile):.3f} ms"
            except Exception as error:  # too large a tile raises whatever it likes
                result = describe(error)
            rows.append({"kind": each.kind, "D": dim, "tile": tile, "result": result})
    return rows


def run(rows: Rows, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs and the gradient of hidden of all rows by a tile."""
    kernel = head_fused.FusedHead()
    chunk = forward(kernel, rows, tile)
    return chunk.logprobs, kernel.through(rows, chunk, torch.ones_like(chunk.lse), None)


def timed(rows: Rows, tile: Tile) -> float:
    """Return the median seconds of a forward that keeps what a backward needs."""
    kernel = head_fused.FusedHead()
    way = simple(lambda: forward(kernel, rows, tile))
    plan = Plan(rows.hidden.device, REPEATS, 0.0, 0.0)
    return quantile([once(way, plan, cold=False)[0] for _ in range(REPEATS)], 0.5)


def forward(kernel: head_fused.FusedHead, rows: Rows, tile: Tile) -> Chunk:
    """Run the kernel with a tile in place of the table's."""
    with patch.object(head_fused, "tile_of", return_value=tile):
        return kernel.forward(rows, None)


def write(kind: str, winners: Mapping[int, Tile], device: str) -> None:
    """Replace the table's rows of a kind, one line each."""
    table = json.loads(TILES.read_text())
    source = f"measured on {device}"
    table[KEY][kind] = [{"dim": BUCKETS[dim], "tile": tile, "source": source} for dim, tile in sorted(winners.items())]
    parts = [
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
        for name, rows in table[KEY].items()
    ]
    TILES.write_text(f'{{\n  "{KEY}": {{\n' + ",\n".join(parts) + "\n  }\n}\n")
