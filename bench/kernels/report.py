"""Results for people and for programs: tables, JSON, CSV and charts."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import record
from bench.kernels.cases import Case
from bench.kernels.job import MODES
from bench.kernels.sweep import Row
from bench.kernels.wanted import Wanted, judge

COLUMNS = ("provider", "mode", "", "ms p50", "p20 - p80", "TFLOP/s", "GB/s", "of floor", "vs anchor", "extra MiB")
ERRORS = ("logp error", "dx error", "same bits")
COLORS = {"registered": "#2b6cb0", "naive": "#a0aec0", "anchor": "#dd6b20", "base": "#718096"}


def save(about: dict[str, Any], rows: list[Row], folder: Path) -> Path:
    """Write JSON and CSV; return the former's path."""
    wanted = [{**vars(each), "met": each.met} for each in judge(rows)]
    path = record.save("kernels", {**about, "wanted": wanted}, rows, folder)
    with path.with_suffix(".csv").open("w", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)
    return path


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print a table for each case, and what was wanted."""
    for title in dict.fromkeys(map(_title, rows)):
        table = Table(*COLUMNS, *ERRORS, title=title, title_justify="left")
        some = [row for row in rows if _title(row) == title]
        for row in (row for row in some if row["seconds_p50"] is not None):
            table.add_row(*map(escape, _cells(row)), style="bold" if row["chosen"] else "")
        console.print(table)
        for row in (row for row in some if row["seconds_p50"] is None):
            style = "bold red" if row["status"].startswith("failed") else "dim"
            console.print(f"  {escape(row['provider'])}: {escape(row['status'])}", style=style, soft_wrap=True)
    if found := judge(rows):
        console.print(_wanted(found))


def _title(row: Row) -> str:
    return Case(row["operation"], row["N"], row["D"], row["V"], row["dtype"], row["rank"]).name


def _cells(row: Row) -> list[str]:
    def number(name: str, form: str = ".2f", factor: float = 1.0) -> str:
        return "" if row[name] is None else format(row[name] * factor, form)

    name = row["provider"] + (" (scalar)" if row["upstream"] == "scalar" else "")
    spread = (
        ""
        if row["seconds_p20"] is None
        else f"{number('seconds_p20', '.3g', 1e3)} - {number('seconds_p80', '.3g', 1e3)}"
    )
    return [
        name, row["mode"], row["temperature"], number("seconds_p50", ".4g", 1e3), spread,
        number("useful_tflops", ".3g"), number("useful_gb_per_s", ".3g"), number("floor_fraction"),
        number("ratio_to_best_anchor"), number("extra_bytes", ",.1f", 2**-20), number("logp_error", ".1e"),
        number("dx_error", ".1e"), {True: "yes", False: "no", None: ""}[row["deterministic"]],
    ]  # fmt: skip


def _wanted(found: Sequence[Wanted]) -> Table:
    table = Table("what", "ours", "against", "ratio", "wanted", title="wanted", title_justify="left")
    for each in found:
        cells = (each.what, each.measured, each.against, f"{each.ratio:.3g}", each.limit)
        table.add_row(*cells, style="" if each.met else "bold red")
    return table


def plot(path: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw one chart for each case beside the result file; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    import_module("matplotlib").use("Agg")
    drawn = []
    for title in dict.fromkeys(map(_title, rows)):
        some = [
            row for row in rows
            if _title(row) == title and row["temperature"] == "hot" and row["seconds_p50"] is not None
        ]  # fmt: skip
        if some:
            drawn.append(path.with_name(f"{path.stem}-{title}.png"))
            _draw(drawn[-1], title, some)
    return drawn


def _draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """One panel for each mode: milliseconds by provider, and the floor as a line."""
    pyplot = import_module("matplotlib.pyplot")
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    figure, axes = pyplot.subplots(1, len(modes), figsize=(4.5 * len(modes), 3.6), squeeze=False)
    for mode, axis in zip(modes, axes[0], strict=True):
        some = [row for row in rows if row["mode"] == mode]
        names = [row["provider"] for row in some]
        axis.bar(names, [1e3 * row["seconds_p50"] for row in some], color=[COLORS[row["kind"]] for row in some])
        if some[0]["floor_seconds"] is not None:
            axis.axhline(1e3 * some[0]["floor_seconds"], color="#c53030", linestyle="--", label="floor")
            axis.legend()
        axis.set_title(mode)
        axis.set_ylabel("ms")
        axis.tick_params(axis="x", rotation=60)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
