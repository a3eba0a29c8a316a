"""Charts of speed and latency against the number of clients."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.clients.rows import IN_LINE, MERGED, Row

DASHES = {MERGED: "-", IN_LINE: "--"}


def plot(path: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw one chart for training and one for sampling beside the result file; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    import_module("matplotlib").use("Agg")
    drawn = []
    for part in ("training", "sampling"):
        some = [row for row in rows if row["speed"] == part and " to " not in row["rows"]]
        models = {name for name in (row["model"] for row in some) if sum(row["model"] == name for row in some) > 2}
        if models:
            drawn.append(path.with_name(f"{path.stem}-{part}.png"))
            _draw(drawn[-1], part, [row for row in some if row["model"] in models])
    return drawn


def _draw(path: Path, part: str, rows: Sequence[Row]) -> None:
    """One panel for tokens a second, one for the median latency."""
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, key, label in zip(axes, ("tokens_per_second", "p50"), ("tokens/s", "latency p50, ms"), strict=True):
        for index, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            for side, dashes in DASHES.items():
                _line(axis, [row for row in rows if row["model"] == model], side, key, (f"C{index}", dashes))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("clients")
        axis.set_title(label)
    axes[0].legend(fontsize="small")
    figure.suptitle(part)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _line(axis: Any, rows: Sequence[Row], side: str, key: str, style: tuple[str, str]) -> None:
    values = [row["figures"][side][key] for row in rows]
    name = f"{rows[0]['model']}, {side}"
    axis.plot([row["clients"] for row in rows], values, color=style[0], linestyle=style[1], marker="o", label=name)
