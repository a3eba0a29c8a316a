"""The tables that benchmarks print."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COLUMNS = ("speed", "workload", "ours", "against", "ratio", "wanted")


def table(rows: list[dict[str, Any]]) -> Table:
    """Lay rows out; a ratio that misses what was wanted is red."""
    made = Table(*COLUMNS)
    for row in rows:
        made.add_row(*(str(row[column]) for column in COLUMNS), style="" if _met(row) else "bold red")
    return made


def _met(row: dict[str, Any]) -> bool:
    if not row["wanted"]:
        return True
    kind, limit = row["wanted"].split()
    return bool(row["ratio"] >= float(limit) if kind == ">=" else row["ratio"] <= float(limit))
