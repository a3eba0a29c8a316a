"""Running probes one after the other, and what came of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.table import Column, Table

from tickwork.conformance import adapters, losses, optimizer, protocol, sampling, training
from tickwork.conformance.probe import BAD, REGISTRY, Finding, FoundError, Probe, Verdict
from tickwork.conformance.target import Target

GROUPS = (training, losses, optimizer, adapters, sampling, protocol)
COLOURS = {Verdict.PASS: "green", Verdict.REFUSED: "yellow", Verdict.SKIPPED: "dim"}
SKIP = "SKIPPED: "


def probes(names: Sequence[str] = ()) -> list[Probe]:
    """Return all probes, or those of these names, group by group."""
    order = [module.__name__.rpartition(".")[2] for module in GROUPS]
    chosen = [probe for probe in REGISTRY if not names or probe.name in names]
    return sorted(chosen, key=lambda probe: order.index(probe.group))


def run(
    base_url: str,
    api_key: str,
    model: str,
    *,
    seconds: float = 60.0,
    only: Sequence[str] = (),
    tell: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """Ask a server.

    Args:
        model: base model that it serves; its vocabulary needs 50 tokens.
        seconds: how long one answer may take.
        only: names of probes; all where none is given.
        tell: called with each finding as it is made.

    Raises:
        ModuleNotFoundError: the official ``tinker`` package is not installed.
    """
    import tinker  # noqa: PLC0415  what is asked through, not what is needed to import this

    logging.getLogger("tinker").setLevel(logging.CRITICAL)
    target = Target(tinker, base_url, api_key, model, seconds)
    findings = []
    for probe in probes(only):
        findings.append(_ask(probe, target))
        tell(findings[-1])
    return findings


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print a report."""
    table = Table("group", Column("probe", no_wrap=True), "verdict", "found")
    for finding in findings:
        colour = COLOURS.get(finding.verdict, "bold red")
        table.add_row(finding.group, finding.name, f"[{colour}]{finding.verdict}[/]", finding.found)
    console.print(table)
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    console.print("  ".join(f"{verdict} {count}" for verdict, count in counts.items() if count))


def write(findings: Sequence[Finding], file: Path, about: dict[str, Any]) -> None:
    """Write a report as JSON."""
    bad = sum(finding.verdict in BAD for finding in findings)
    file.write_text(json.dumps({**about, "bad": bad, "findings": [attrs.asdict(f) for f in findings]}, indent=1) + "\n")


def _ask(probe: Probe, target: Target) -> Finding:
    def finding(verdict: Verdict, found: str) -> Finding:
        return Finding(probe.group, probe.name, verdict, found)

    try:
        with target.session():
            found = probe.act(target)
    except FoundError as other:
        return finding(other.verdict, str(other))
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        return finding(Verdict.REFUSED if target.is_refusal(error) else Verdict.BROKEN, what)
    if found.startswith(SKIP):
        return finding(Verdict.SKIPPED, found.removeprefix(SKIP))
    return finding(Verdict.PASS, found)
