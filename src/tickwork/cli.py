"""The ``tickwork`` command: the only room that reads arguments and the environment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
import click
import trio
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import tickwork
from tickwork.catalogue import Catalogue
from tickwork.cli_clients import demo_clients
from tickwork.cli_conformance import conformance
from tickwork.cli_keys import keys
from tickwork.cli_runs import COLUMNS, listed
from tickwork.cli_server import serve
from tickwork.models import supported
from tickwork.results import as_json

store_option = click.option(
    "--store",
    envvar="TICKWORK_STORE",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: Path.home() / ".tickwork",
    show_default="~/.tickwork",
    help="Folder of the checkpoints.",
)
json_option = click.option("--json", "as_text", is_flag=True, help="Print JSON instead of a table.")


class Command(click.Group):
    """Shows Tickwork's own errors as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a TickworkError ends it with exit status 1."""
        try:
            return super().invoke(ctx)
        except (tickwork.TickworkError, OSError) as error:
            raise click.ClickException(str(error)) from None
        except BaseExceptionGroup as group:
            if group.subgroup(KeyboardInterrupt) is not None:
                raise click.Abort from None
            known, other = group.split((tickwork.TickworkError, OSError))
            if known is None or other is not None:
                raise
            raise click.ClickException(str(_first(known))) from None


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


@click.group(cls=Command)
@click.version_option(tickwork.__version__)
def main() -> None:
    """Fine-tune language models through a Tinker-shaped API, on your own hardware."""


main.add_command(serve)
main.add_command(keys)
main.add_command(conformance)


@main.group(invoke_without_command=True)
@store_option
@click.option("--seed", default=0, show_default=True, help="Seed of the adapter, the batches and the samples.")
@click.option("--steps", default=100, show_default=True, type=click.IntRange(1), help="Optimizer steps.")
@click.pass_context
def demo(context: click.Context, store: Path, seed: int, steps: int) -> None:
    """Fine-tune the shipped model on pig latin and show that it has learnt it; `demo rl`: RL; `demo clients`: four."""
    if context.invoked_subcommand is not None:
        given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"--{given[0]} belongs after {context.invoked_subcommand!r}")
        return
    from tickwork.recipes import sft  # noqa: PLC0415

    custom = max(1, steps // 10) if steps > 1 else 0
    settings = sft.Settings(steps=steps - custom, custom_steps=custom, seed=seed)
    _run(store, lambda service, tell: sft.fine_tune(service, settings, tell))


demo.add_command(demo_clients)


@demo.command("rl")
@store_option
@click.option("--seed", default=0, show_default=True, help="Seed of the adapter and the samples.")
@click.option("--steps", default=80, show_default=True, type=click.IntRange(1), help="Optimizer steps.")
def demo_rl(store: Path, seed: int, steps: int) -> None:
    """Teach the shipped model by reward alone."""
    from tickwork.recipes import rl  # noqa: PLC0415

    settings = rl.Settings(steps=steps, seed=seed)
    _run(store, lambda service, tell: rl.reinforce(service, settings, tell))


@main.command()
@json_option
def models(as_text: bool) -> None:
    """List the shipped base models; any local folder or hub name works besides."""
    _show(supported(), ["model_name", "max_context_length", "trainable", "sampleable"], as_text)


@main.command()
@store_option
@json_option
def runs(store: Path, as_text: bool) -> None:
    """List the training runs of a store, and what its journal tells of them, also while a server has it open."""
    found = listed(store, lambda what: click.echo(what, err=True))
    if as_text:
        click.echo(json.dumps([each.as_json() for each in found], indent=1))
    else:
        _table(COLUMNS, [list(map(_cell, each.cells())) for each in found])


@main.group()
def checkpoints() -> None:
    """List, describe, delete and export checkpoints."""


@checkpoints.command("list")
@click.option("--run", "run_id", help="Of this training run only.")
@store_option
@json_option
def list_checkpoints(run_id: str | None, store: Path, as_text: bool) -> None:
    """List checkpoints, newest first."""
    columns = ["tinker_path", "checkpoint_type", "size_bytes", "time", "expires_at", "public"]
    _show(Catalogue(store).checkpoints(run_id), columns, as_text)


@checkpoints.command()
@click.argument("path")
@store_option
@json_option
def info(path: str, store: Path, as_text: bool) -> None:
    """Describe one checkpoint by its tinker:// path."""
    catalogue = Catalogue(store)
    meta = {**as_json(catalogue.meta(path)), "folder": str(catalogue.folder(path))}
    if as_text:
        click.echo(json.dumps(meta, indent=1))
    else:
        _table(["field", "value"], [[key, str(value)] for key, value in meta.items()])


@checkpoints.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@store_option
def delete(paths: Sequence[str], yes: bool, store: Path) -> None:
    """Delete checkpoints by their tinker:// paths."""
    catalogue = Catalogue(store)
    paths = list(dict.fromkeys(paths))
    for path in paths:
        catalogue.meta(path)
    if not yes:
        click.confirm(f"Delete {len(paths)} checkpoint(s)?", abort=True)
    for path in paths:
        catalogue.delete(path)
        click.echo(f"deleted {path}")


@checkpoints.command()
@click.argument("path")
@click.option("--ttl", "ttl_seconds", type=click.IntRange(1), help="Seconds that the copy lives.")
@store_option
def copy(path: str, ttl_seconds: int | None, store: Path) -> None:
    """Copy a checkpoint into a run of its own, which outlives the first one's deletion."""
    click.echo(Catalogue(store).copy(path, ttl_seconds=ttl_seconds))


@checkpoints.command()
@click.argument("path")
@click.argument("destination", type=click.Path(path_type=Path))
@store_option
def export(path: str, destination: Path, store: Path) -> None:
    """Copy a checkpoint's adapter to DESTINATION, as a folder that peft.PeftModel loads."""
    files = Catalogue(store).files(path)
    if destination.exists():
        raise click.ClickException(f"{destination} exists")
    destination.mkdir(parents=True)
    for name, file in files.items():
        if name.startswith("adapter_"):
            shutil.copyfile(file, destination / name)
    click.echo(f"exported {path} to {destination}")


def _run(store: Path, recipe: Callable[[tickwork.ServiceClient, Callable[[Any], None]], Awaitable[Any]]) -> None:
    """Run a recipe in a Trio run of its own, with a progress bar; its result is the last line, as JSON."""
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()  # its bar for loading weights would tear ours
    console = Console(stderr=True)

    async def go() -> Any:
        with _bar(console) as bar:
            async with tickwork.open_service(store=store) as service:
                return await recipe(service, _teller(bar))

    result = trio.run(go)
    console.print(f"adapter: {result.folder}", highlight=False, soft_wrap=True)
    click.echo(json.dumps(attrs.asdict(result)))


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _teller(bar: Progress) -> Callable[[Any], None]:
    tasks: dict[str, TaskID] = {}

    def tell(report: Any) -> None:
        if report.phase not in tasks:
            tasks[report.phase] = bar.add_task(report.phase, total=report.total, figures="")
        figures = "  ".join(f"{name} {value:,.4g}" for name, value in report.figures.items())
        bar.update(tasks[report.phase], completed=report.done, figures=figures)

    return tell


def _show(rows: Sequence[Any], columns: Sequence[str], as_text: bool) -> None:
    if as_text:
        click.echo(json.dumps(as_json(list(rows)), indent=1))
    else:
        _table(columns, [[_cell(getattr(row, column)) for column in columns] for row in rows])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")  # a path must stay whole to be of use
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False).print(table)  # ids hold :train:, which would be shown as a tram


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone().isoformat(" ", "seconds")
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
