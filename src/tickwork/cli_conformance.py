"""``tickwork conformance``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click
from rich.console import Console

OURS = "tickwork/tiny"


@click.command()
@click.option("--base-url", envvar="TINKER_BASE_URL", help="The server to ask; without one, Tickwork asks itself.")
@click.option("--api-key", envvar="TINKER_API_KEY", default="tml-conformance", help="A key of that server.")
@click.option("--model", default=OURS, show_default=True, help="A base model that it serves.")
@click.option("--only", multiple=True, metavar="PROBE", help="Ask only this; may be given again.")
@click.option("--seconds", default=60.0, show_default=True, help="How long one answer may take.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here too.")
def conformance(
    base_url: str | None, api_key: str, model: str, only: tuple[str, ...], seconds: float, file: Path | None
) -> None:
    """Ask a Tinker-compatible server, through the official SDK, what it really does.

    The exit status is 1 if something is accepted and ignored, done wrong, or breaks.
    """
    try:
        import tinker  # noqa: PLC0415

        from tickwork.conformance import BAD, Finding, run, runner  # noqa: PLC0415
        from tickwork.server import Settings, serving  # noqa: PLC0415
        from tickwork.server.keys import Keys  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing: pip install 'tickwork[server]' tinker") from None
    if unknown := set(only) - {probe.name for probe in runner.probes()}:
        raise click.ClickException(f"no such probe: {', '.join(sorted(unknown))}")
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    console = Console(stderr=True)

    def tell(finding: Finding) -> None:
        console.print(f"{finding.verdict:8} {finding.name}")

    with contextlib.ExitStack() as stack:
        if base_url is None:
            own = Settings(models={model: model}, port=0, keys=Keys([api_key]))
            base_url = stack.enter_context(serving(own))
        findings = run(base_url.rstrip("/"), api_key, model, seconds=seconds, only=only, tell=tell)
    runner.show(findings, Console())
    if file is not None:
        runner.write(findings, file, {"base_url": base_url, "model": model, "sdk": tinker.__version__})
    if any(finding.verdict in BAD for finding in findings):
        raise SystemExit(1)
