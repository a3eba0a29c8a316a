"""``tickwork demo clients``: four clients at once, live on a terminal, and what each of them lost by the company."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import click
import trio
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

import tickwork
from tickwork.recipes.clients import Learner, Progress, Result, Settings, Watch, learn

LANE_COLUMNS = ("task", "step", "loss", "tokens", "cycles", "missed", "wait, ms", "device", "exact match", "hint")
# Lines that each client gets in a phase where there is no terminal.
LINES = 5


@click.command("clients")
@click.option("--seed", default=0, show_default=True, help="Seed of the adapters and the batches.")
@click.option("--steps", default=60, show_default=True, type=click.IntRange(1), help="Optimizer steps of each client.")
@click.option("--alone/--no-alone", default=True, help="Whether each client is then trained alone, to compare.")
def demo_clients(seed: int, steps: int, alone: bool) -> None:
    """Train four clients on four tasks at once, each as good as alone; exit with 1 where one is not."""
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()  # its bar for loading weights would tear ours
    console = Console(stderr=True)
    settings = Settings(steps=steps, seed=seed, alone=alone)

    async def go() -> Result:
        with _watching(console) as watch:
            async with tickwork.open_service() as service:
                return await learn(service, settings, watch)

    result = trio.run(go)
    console.print(summary(result))
    click.echo(json.dumps(attrs.asdict(result)))
    if result.worse:
        sys.exit(1)


@contextmanager
def _watching(console: Console) -> Iterator[Watch]:
    if not console.is_terminal:
        yield lambda progress: _line(console, progress)
        return
    with Live(console=console, auto_refresh=False) as live:
        shown = 0.0

        def watch(progress: Progress) -> None:
            nonlocal shown
            done = progress.moved.step == progress.moved.settings.steps
            # Drawing takes the interpreter from the device's thread, so not at every step.
            if done or progress.now.uptime - shown > 0.25:
                shown = progress.now.uptime
                live.update(view(progress), refresh=True)

        yield watch


def _line(console: Console, progress: Progress) -> None:
    """Print where one client is, some times in a phase."""
    moved, steps = progress.moved, progress.moved.settings.steps
    if moved.step % max(1, steps // LINES) == 0 or moved.step == steps:
        cells = zip(LANE_COLUMNS[1:], lane_cells(progress, moved)[1:], strict=True)
        told = "  ".join(f"{name} {cell}" for name, cell in cells if cell)
        console.print(f"{progress.phase}  {moved.task}: {told}", highlight=False, soft_wrap=True)


def view(progress: Progress) -> Group:
    """Lay out a line on the engine and a row for each lane."""
    lanes = Table(*LANE_COLUMNS)
    for learner in progress.learners:
        lanes.add_row(*lane_cells(progress, learner))
    now, begun = progress.now, progress.begun
    told = f"{progress.phase}: {now.cycles - begun.cycles} cycles, {now.passes - begun.passes} passes, "
    told += f"{progress.tokens_per_second:,.0f} tokens/s, {progress.lanes_per_pass:.2f} lanes per pass"
    return Group(Text(told), lanes)


def lane_cells(progress: Progress, learner: Learner) -> list[str]:
    """Return the cells of one lane, as ``LANE_COLUMNS`` names them.

    Its wait is the mean of its requests, its share of the device that of the seconds the device was at work.
    """
    lane = progress.lane(learner)
    busy = max(progress.now.busy - progress.begun.busy, 1e-9)
    return [
        learner.task,
        f"{learner.step}/{learner.settings.steps}",
        "" if learner.loss is None else f"{learner.loss:.3f}",
        f"{lane.tokens:,}",
        f"{lane.cycles:,}",
        f"{lane.missed:,}",
        f"{1e3 * lane.waited / max(lane.requests, 1):.1f}",
        f"{lane.device / busy:.0%}",
        "" if learner.exact_match is None else f"{learner.exact_match:.2f}",
        lane.hint or "",
    ]


def summary(result: Result) -> Table:
    """Lay out exact match by task, and the two times; what was worse together is red."""
    table = Table("", "before", "together", "alone")
    for name, each in result.tasks.items():
        alone = "" if each.alone is None else f"{each.alone:.2f}"
        style = "bold red" if name in result.worse else ""
        table.add_row(f"exact match, {name}", f"{each.before:.2f}", f"{each.together:.2f}", alone, style=style)
    apart = "" if result.seconds_alone is None else f"{result.seconds_alone:.1f} in all"
    table.add_row("seconds", "", f"{result.seconds_together:.1f}", apart)
    return table
