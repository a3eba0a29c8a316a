"""What was asked of the kernels at certain shapes, beside what was measured there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.kernels.cases import ADAMW, HEAD, MULTI_LORA
from bench.kernels.job import FORWARD, FULL
from bench.kernels.sweep import Row


@dataclass(frozen=True)
class Wanted:
    """A limit, and how a run meets it.

    Args:
        what: is limited.
        measured: what of ours, in words.
        against: what of theirs, or the number that was set.
        ratio: of the two.
        limit: ``">= 3"`` or ``"<= 1"``.
    """

    what: str
    measured: str
    against: str
    ratio: float
    limit: str

    @property
    def met(self) -> bool:
        """Whether the ratio is on the right side."""
        sign, number = self.limit.split()
        return self.ratio >= float(number) if sign == ">=" else self.ratio <= float(number)


def judge(rows: Sequence[Row]) -> list[Wanted]:
    """Return every limit that these rows say something about; all are of hot runs."""
    measured = [row for row in rows if row["temperature"] == "hot" and row["seconds_p50"] is not None]
    found: list[Wanted] = []
    shapes = {(row["operation"], row["N"], row["D"], row["V"], row["rank"], row["dtype"]) for row in measured}
    for shape in sorted(shapes):
        some = [row for row in measured if _shape(row) == shape]
        for rule in RULES:
            found += rule(some, shape)
    return found


Shape = tuple[str, int, int, int, int, str]
Rule = Callable[[Sequence[Row], Shape], Iterator[Wanted]]


def _shape(row: Row) -> Shape:
    return (row["operation"], row["N"], row["D"], row["V"], row["rank"], row["dtype"])


def _one(rows: Sequence[Row], mode: str, name: str = "") -> Row | None:
    """Return the row of a provider, or of the implementation chosen; the fastest if several names begin so."""
    able = [
        row for row in rows
        if row["mode"] == mode and row["upstream"] == "vector"
        and (row["provider"].startswith(name) if name else row["chosen"])
    ]  # fmt: skip
    return min(able, key=lambda row: float(row["seconds_p50"]), default=None)


def _times(what: str, ours: Row | None, theirs: Row | None, limit: str, inverse: bool = False) -> Iterator[Wanted]:
    """Yield a limit of a ratio of times: theirs over ours, or the inverse."""
    if ours is None or theirs is None:
        return
    mine, other = ours["seconds_p50"], theirs["seconds_p50"]
    yield Wanted(what, _label(ours), _label(theirs), mine / other if inverse else other / mine, limit)


def _label(row: Row) -> str:
    return f"{row['provider']} {milliseconds(row['seconds_p50'])}"


def milliseconds(seconds: float) -> str:
    """Return a time for people."""
    return f"{1000 * seconds:,.4g} ms"


def _cpu_head(rows: Sequence[Row], shape: Shape) -> Iterator[Wanted]:
    if shape[:5] != (HEAD, 1024, 512, 65536, 0):
        return
    ours, naive, where = _one(rows, FULL), _one(rows, FULL, "naive"), f"head {shape[5]}, full"
    yield from _times(where, ours, naive, "<= 1.0", inverse=True)
    chunked = next((row for row in rows if row["provider"] == "torch-chunked" and row["mode"] == FULL), None)
    yield from _times(where, ours, chunked, ">= 3.0")
    if ours and naive and ours["extra_bytes"] and naive["extra_bytes"]:
        mine, other = (f"{row['provider']} {row['extra_bytes'] / 2**20:,.1f} MiB" for row in (ours, naive))
        yield Wanted(f"head {shape[5]}, memory", mine, other, ours["extra_bytes"] / naive["extra_bytes"], "<= 0.2")


def _gpu_head(rows: Sequence[Row], shape: Shape) -> Iterator[Wanted]:
    limits = {4096: {FULL: 0.028, FORWARD: 0.014}, 1024: {FULL: 0.0085}}.get(shape[2], {})
    if (shape[0], shape[1], shape[3], shape[4]) != (HEAD, 8192, 151936, 0):
        return
    for mode, seconds in limits.items():
        if (ours := _one(rows, mode)) is not None:
            what, ratio = f"head D={shape[2]}, {mode}", ours["seconds_p50"] / seconds
            yield Wanted(what, _label(ours), milliseconds(seconds), ratio, "<= 1.0")
    yield from _times(f"head D={shape[2]}, full", _one(rows, FULL), _one(rows, FULL, "liger"), ">= 1.9")


def _adamw(rows: Sequence[Row], shape: Shape) -> Iterator[Wanted]:
    ours = _one(rows, FULL)
    if shape[:4] != (ADAMW, 16, 500, 50_000) or ours is None:
        return
    label = f"{ours['provider']} {ours['useful_gb_per_s']:,.0f} GB/s"
    yield Wanted("adamw, bandwidth", label, "a copy", ours["floor_fraction"], ">= 0.8")
    yield from _times("adamw", ours, _one(rows, FULL, "torch-fused"), ">= 5.0")


def _multi_lora(rows: Sequence[Row], shape: Shape) -> Iterator[Wanted]:
    if shape[0] != MULTI_LORA or (shape[1], shape[4]) != (8192, 32):
        return
    for mode in (FORWARD, FULL):
        what = f"multi_lora {shape[2]}x{shape[3]}, {mode}, overhead"
        yield from _times(what, _one(rows, mode), _one(rows, mode, "base GEMM"), "<= 0.1", inverse=True)


RULES: tuple[Rule, ...] = (_cpu_head, _gpu_head, _adamw, _multi_lora)
