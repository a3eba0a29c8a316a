"""From figures to the rows of the table, which also carry the numbers that the charts need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from bench.clients.cases import Case
from bench.clients.drive import Figures

Row = dict[str, Any]

MERGED, IN_LINE, INVARIANT = "merged", "one by one", "invariant"


def speeds(part: str, case: Case, count: int, what: str, found: Mapping[str, Figures], wanted: float | None) -> Row:
    """Return the row of tokens a second."""
    ours, against = found[MERGED].tokens_per_second, found[IN_LINE].tokens_per_second
    limit = "" if wanted is None else f">= {wanted}"
    row = _row(part, case, count, what, (f"{ours:,.0f} tokens/s", f"{IN_LINE} {against:,.0f} tokens/s"))
    figures = {name: attrs.asdict(each) for name, each in found.items()}
    return row | {"ratio": round(ours / against, 3), "wanted": limit, "figures": figures}


def latencies(part: str, case: Case, count: int, what: str, found: Mapping[str, Figures], wanted: str = "") -> Row:
    """Return the row of how long a client waits; the ratio is that of the medians."""
    ours, against = found[MERGED], found[IN_LINE]
    told = (f"{ours.p50:.4g} ms p50, {ours.p95:.4g} p95", f"{IN_LINE} {against.p50:.4g}, {against.p95:.4g}")
    row = _row(f"{part}, latency", case, count, what, told)
    return row | {"ratio": round(ours.p50 / against.p50, 3), "wanted": wanted}


def passes(part: str, case: Case, count: int, what: str, found: Mapping[str, Figures]) -> Row:
    """Return the row of passes that a step took."""
    ours, against = found[MERGED].passes, found[IN_LINE].passes
    row = _row(f"{part}, passes", case, count, what, (f"{ours:.3f} per step", f"{IN_LINE} {against:.3f}"))
    return row | {"ratio": round(ours / against, 3), "wanted": ""}


def invariance(part: str, case: Case, count: int, what: str, found: Mapping[str, Figures]) -> Row:
    """Return the row of what it costs that company changes no bit: times, so more is worse."""
    ours, against = found[INVARIANT].tokens_per_second, found[MERGED].tokens_per_second
    told = (f"{ours:,.0f} tokens/s", f"{MERGED} {against:,.0f} tokens/s")
    row = _row(f"{part}, cost of invariant", case, count, what, told)
    return row | {"ratio": round(against / ours, 3), "wanted": ""}


def _row(speed: str, case: Case, count: int, what: str, told: tuple[str, str]) -> Row:
    clients = f"{count} client{'s' if count > 1 else ''}"
    about = {"model": case.name, "clients": count, "rows": what}
    return {
        "speed": speed,
        "workload": f"{case.name}, {clients} x {what}",
        "ours": told[0],
        "against": told[1],
        **about,
    }
