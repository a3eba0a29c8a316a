"""``tickwork serve`` and what belongs to it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import trio

if TYPE_CHECKING:
    from tickwork.server import Settings

KEYS_VARIABLE = "TICKWORK_API_KEYS"
# Any key is taken by an open server, but the SDK insists on one of this form.
ANY_KEY = "tml-local"

told = logging.getLogger("tickwork.server")

MIB = 2**20
# Seconds that the device thread may keep the interpreter once the server wants it; Python's own 5 ms would show.
SWITCH_SECONDS = 5e-4
# How often torch's idle worker threads look for work before they sleep, about 0.1 ms in all. Their own 3e5 times hold
# a core for longer than most pauses of a small pass, and clients on the same machine, and this server, wait for it.
SPINS = "30000"


@contextmanager
def server_extra() -> Iterator[None]:
    """Tell in one line that what the server needs is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing: pip install 'tickwork[server]'") from None


@click.command()
@click.option("--model", "models", multiple=True, required=True, metavar="NAME|PATH|NAME=PATH", help="A base model to serve; may be given again.")  # fmt: skip  # noqa: E501
@click.option(
    "--store",
    envvar="TICKWORK_STORE",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: Path.home() / ".tickwork",
    show_default="~/.tickwork",
    help="Folder of the checkpoints.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; only loopback without keys."
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--keys", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=f"File with one key's digest a line, 'DIGEST OWNER [SHARE]', made by `tickwork keys`. {KEYS_VARIABLE} adds keys or digests, separated by commas.")  # fmt: skip  # noqa: E501
@click.option("--device", help="cpu, cuda or cuda:N; the default takes CUDA where there is one.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the base models.")
@click.option("--cycle-period", default=0.0, show_default=True, help="Seconds that a window of arrivals stays open.")
@click.option("--max-tokens-per-pass", type=click.IntRange(1), help="Tokens that go through the model at once; the default measures how many fit.")  # fmt: skip  # noqa: E501
@click.option("--merge/--no-merge", default=True, show_default=True, help="Whether clients' rows may share a pass.")
@click.option("--invariant", is_flag=True, help="Results are bit-equal whoever else is served; implies --no-merge.")
@click.option("--checkpoint-activations", is_flag=True, help="Run layers again in the backward instead of keeping what they compute.")  # fmt: skip  # noqa: E501
@click.option("--adapter-memory-mib", type=click.IntRange(1), help="What adapters may take of the device; others wait in host memory.")  # fmt: skip  # noqa: E501
@click.option("--max-models", default=64, show_default=True, help="Training models that one key may hold.")
@click.option("--max-samplers", default=64, show_default=True, help="Samplers whose weights are held for one key.")
@click.option("--max-sessions", default=4096, show_default=True, help="Sessions of one key.")
@click.option("--max-tokens-in-flight", default=2**24, show_default=True, help="Tokens of one key that are accepted and not fetched.")  # fmt: skip  # noqa: E501
@click.option("--max-results", default=2**16, show_default=True, help="Requests of one key that are accepted and not fetched.")  # fmt: skip  # noqa: E501
@click.option("--max-requests", default=2048, show_default=True, help="HTTP requests of one key under way at once, held polls included.")  # fmt: skip  # noqa: E501
@click.option("--max-connections", default=4096, show_default=True, help="Connections at once; idle ones make room for new ones.")  # fmt: skip  # noqa: E501
@click.option("--max-body-mib", default=64, show_default=True, type=click.IntRange(1), help="Size of one request.")
@click.option("--max-decompressed-mib", default=256, show_default=True, type=click.IntRange(1), help="Size of one request, decompressed.")  # fmt: skip  # noqa: E501
@click.option("--max-bodies-mib", default=1024, show_default=True, type=click.IntRange(1), help="Size of all requests that are being read and answered.")  # fmt: skip  # noqa: E501
@click.option("--chunk-datums", default=100_000, show_default=True, help="Datums that clients put into one request; more are refused.")  # fmt: skip  # noqa: E501
@click.option("--gap-seconds", default=60.0, show_default=True, help="How long requests wait for an earlier one of their model.")  # fmt: skip  # noqa: E501
@click.option(
    "--session-seconds", default=3600.0, show_default=True, help="When a session without a sign of life ends."
)
@click.option("--result-seconds", default=3600.0, show_default=True, help="How long a result that nobody fetches is kept.")  # fmt: skip  # noqa: E501
@click.option("--journal", type=click.Choice(["process", "power", "off"]), default="process", show_default=True, help="What accepted work outlives: the end of the process, however it comes, that of the machine, or neither.")  # fmt: skip  # noqa: E501
@click.option("--journal-optional", is_flag=True, help="Go on in memory, and say so, where the journal can not be written; otherwise requests are refused then.")  # fmt: skip  # noqa: E501
@click.option("--snapshot-seconds", default=5.0, show_default=True, help="Seconds of the device that a model works between two snapshots, at least.")  # fmt: skip  # noqa: E501
@click.option("--log", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of what is logged to standard error.")  # fmt: skip  # noqa: E501
def serve(
    max_body_mib: int,
    max_decompressed_mib: int,
    max_bodies_mib: int,
    adapter_memory_mib: int | None,
    keys: Path | None,
    journal: Literal["process", "power", "off"],
    log: Literal["text", "json"],
    **given: Any,
) -> None:
    """Serve base models to the official tinker SDK, its CLI and its cookbook."""
    _spin_less()
    with server_extra():
        from tickwork.server import Settings  # noqa: PLC0415
        from tickwork.server.keys import read_keys  # noqa: PLC0415
        from tickwork.server.logs import configure  # noqa: PLC0415
    given |= {"max_body": max_body_mib * MIB, "max_decompressed": max_decompressed_mib * MIB}
    given["max_bodies"] = max_bodies_mib * MIB
    given["adapter_memory"] = None if adapter_memory_mib is None else adapter_memory_mib * MIB
    given["journal"] = None if journal == "off" else journal
    settings = Settings(keys=read_keys(keys, os.environ.get(KEYS_VARIABLE)), **given)
    configure(log)
    if log == "json":
        _no_bars()
    sys.setswitchinterval(SWITCH_SECONDS)
    if code := trio.run(_serve, settings):
        raise SystemExit(code)


def _spin_less() -> None:
    """Bound the spinning of OpenMP's threads, unless the user has said how they wait; read when torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _no_bars() -> None:
    """Keep transformers from drawing a bar between the lines."""
    from transformers.utils import logging as bars  # noqa: PLC0415

    bars.disable_progress_bar()


async def _serve(settings: Settings) -> int:
    """Serve until a signal, then drain; a second signal ends it at once. Return the exit status."""
    asked = trio.Event()
    signals_seen: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, nursery.cancel_scope, asked, signals_seen)
        await _run(settings, asked)
        nursery.cancel_scope.cancel("the server has ended")
    return 128 + signals_seen[1] if len(signals_seen) > 1 else 0


async def _run(settings: Settings, asked: trio.Event) -> None:
    from tickwork.server import run  # noqa: PLC0415

    told.info("loading %s", ", ".join(settings.models))
    async with trio.open_nursery() as nursery:
        url = await nursery.start(run, settings, asked.wait)
        _freeze()
        _tell(settings, url)


def _freeze() -> None:
    """Let what is there for good be passed over by the collector of cycles, which takes 0.1 s to go through it."""
    gc.collect()
    gc.freeze()


async def _watch(scope: trio.CancelScope, asked: trio.Event, seen: list[int]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            seen.append(number)
            if asked.is_set():
                told.warning("ending at once")
                scope.cancel("a second signal came")
                return
            told.info("finishing what was accepted; a second signal ends it at once")
            asked.set()


def _tell(settings: Settings, url: str) -> None:
    name = next(iter(settings.models))
    key = ANY_KEY if settings.keys.open else "<one of your keys>"
    open_door = "No API keys: everybody on this machine may come in, nobody else.\n" if settings.keys.open else ""
    click.echo(
        f"""Tickwork serves {", ".join(settings.models)} at {url}
{open_door}
export TINKER_BASE_URL={url}
export TINKER_API_KEY={key}

import tinker
with tinker.ServiceClient() as service:
    client = service.create_lora_training_client("{name}", rank=16).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    print(sampler.sample(tinker.ModelInput.from_ints([1, 2, 3]), 1, tinker.SamplingParams(max_tokens=8)).result())
"""
    )
