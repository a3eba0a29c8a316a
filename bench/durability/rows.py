"""The rows of this bench's table."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def row(speed: str, workload: str, told: tuple[str, str], ratio: float, wanted: str = "", **figures: object) -> Row:
    """Return one row.

    Args:
        told: ours, and what it stands against.
        figures: kept in the file.
    """
    shown = {"speed": speed, "workload": workload, "ours": told[0], "against": told[1]}
    return shown | {"ratio": round(ratio, 3), "wanted": wanted, "figures": figures}
