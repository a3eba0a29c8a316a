"""``python -m bench server``: the server against the floor of the SDK itself, or any two servers side by side."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from bench import record
from bench.server import decode, idle
from bench.server.shape import BLOCKS, OPTIM_STEP, PIPELINED, SAMPLING
from bench.table import table
from bench.workloads import make_qwen205k

HERE = Path(__file__).parent
KEY = "tml-bench"
MODEL = "bench/qwen3-205k"
WORKLOAD = "random 205k, 8 x 64 tokens, rank 8"

Row = dict[str, Any]
Figures = dict[str, float]


def main(arguments: Sequence[str]) -> int:
    """Measure what the arguments say, print the table and write it."""
    options = _parser().parse_args(arguments)
    if len(options.base_url) > 2:
        raise SystemExit("two servers at most: --base-url may be given twice")
    about = record.circumstances() | {"arguments": list(arguments)}
    rows = _others(options) if options.base_url else _ours(options.rounds)
    Console(width=160).print(table(rows))
    print(f"written to {record.save('server', about, rows)}", file=sys.stderr)
    return 0


def _ours(rounds: int) -> list[Row]:
    """Serve a random model, and put it beside the stub and beside the same engine in process."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_qwen205k(Path(folder) / "model"))
        kept, memory = _serving(model, f"{folder}/kept", "process"), _serving(model, f"{folder}/memory", "off")
        with kept as (pid, url), memory as (_, other), _stub() as floor:
            ways = {
                "ours": (url, KEY, MODEL),
                "no journal": (other, KEY, MODEL),
                "stub": (floor, KEY, "stub"),
                "in process": ("in-process", model),
                "in process, journal": ("in-process", model, f"{folder}/own"),
            }
            found = _in_turns(ways, rounds)
            busy = idle.share_of_a_core(pid, url, KEY, MODEL)
    ours, light, stub, inside, keeping = (found[way] for way in ways)
    bound, bound_kept = (each[PIPELINED] + 2 * stub[PIPELINED] for each in (inside, keeping))
    without, both, alone = (
        f"{WORKLOAD}, {how}" for how in ("no journal", "journal on both sides", "journal here alone")
    )
    return [
        _row(OPTIM_STEP, "one after the other", ours[OPTIM_STEP], "stub", stub[OPTIM_STEP], "<= 2"),
        _row(SAMPLING, "1 token each, all at once", ours[SAMPLING], "stub", stub[SAMPLING], "<= 1.5"),
        _row("body decoded, ms", f"{decode.ROWS} x {decode.LENGTH} tokens", decode.median_ms(), "wanted", 50.0, "<= 1"),
        _row("share of a core", f"{idle.CLIENTS} idle clients with open polls", busy, "wanted", 0.02, "<= 1"),
        # By default the server keeps a journal, and the engine in process keeps none.
        _row(PIPELINED, without, light[PIPELINED], "in process + 2 x stub", bound, "<= 1"),
        _row(PIPELINED, both, ours[PIPELINED], "in process + 2 x stub", bound_kept, "<= 1"),
        _row(PIPELINED, alone, ours[PIPELINED], "in process + 2 x stub", bound, "<= 1"),
        *(_row(name, WORKLOAD, ours[name], "stub", stub[name]) for name in ours),
        *(_row(name, WORKLOAD, ours[name], "in process", inside[name]) for name in ours),
        *(_row(name, WORKLOAD, ours[name], "no journal", light[name]) for name in ours),
    ]


def _others(options: argparse.Namespace) -> list[Row]:
    """Put one or two servers that run already into one table; a server alone stands beside the stub."""
    pythons = options.python + [sys.executable] * 2
    models = options.model + options.model[-1:]
    with _stub() as floor:
        servers = [
            (url, options.api_key, model, python)
            for url, model, python in zip(options.base_url, models, pythons, strict=False)
        ]
        servers = [*servers, (floor, KEY, "stub", sys.executable)][:2]
        found = _in_turns({server[0]: server for server in servers}, options.rounds)
    first, second = (found[server[0]] for server in servers)
    return [_row(name, servers[0][0], first[name], servers[1][0], second[name]) for name in first]


def _in_turns(ways: dict[str, tuple[str, ...]], rounds: int) -> dict[str, Figures]:
    """Measure the ways, each by new clients every round, and figure by figure in turns; return medians.

    A machine drifts within a second, so that what is compared must be measured side by side.
    """
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ways}
    for turn in range(rounds):
        with ExitStack() as clients:
            asks = {name: clients.enter_context(_client(*way)) for name, way in ways.items()}
            for figure in next(iter(asks.values())).figures:
                print(f"round {turn + 1} of {rounds}: {figure}", file=sys.stderr)
                for _ in range(BLOCKS.get(figure, 1)):
                    for name, ask in asks.items():
                        found[name][figure].append(ask(figure))
    return {
        name: {figure: statistics.median(several) for figure, several in figures.items()}
        for name, figures in found.items()
    }


class _Client:
    """One way of measuring, in a process of its own."""

    def __init__(self, child: subprocess.Popen[str], log: IO[str], name: str) -> None:
        self._child, self._log, self._name = child, log, name
        self.figures: list[str] = self._read()

    def __call__(self, figure: str) -> float:
        assert self._child.stdin is not None
        print(figure, file=self._child.stdin, flush=True)
        return float(self._read())

    def _read(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self._name} could not be measured:\n{self._log.read()[-2000:]}")
        return json.loads(line)


@contextmanager
def _client(*way: str) -> Iterator[_Client]:
    arguments, python = (way[:3], way[3]) if len(way) == 4 else (way, sys.executable)
    with tempfile.TemporaryFile("w+") as log:
        command, pipe = [python, str(HERE / "client.py"), *arguments], subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True) as child:
            try:
                yield _Client(child, log, way[0])
            finally:
                child.kill()


def _row(speed: str, workload: str, ours: float, name: str, against: float, wanted: str = "") -> Row:
    told = {"ours": f"{ours:.4g}", "against": f"{name} {against:.4g}", "ratio": round(ours / against, 3)}
    return {"speed": speed, "workload": workload, **told, "wanted": wanted}


@contextmanager
def _serving(model: str, store: str, journal: str, *given: str) -> Iterator[tuple[int, str]]:
    """Run ``tickwork serve`` in a process of its own; yield its id and base URL."""
    command = [
        "-m",
        "tickwork.cli",
        "serve",
        "--model",
        f"{MODEL}={model}",
        "--port",
        "0",
        "--store",
        store,
        "--journal",
        journal,
    ]
    more = ["--device", "cpu", "--dtype", "float32", "--max-models", "128", "--gap-seconds", "3600"]
    with _child([*command, *more, *given]) as child:
        assert child.stdout is not None
        found = next((found for line in child.stdout if (found := re.search(r"TINKER_BASE_URL=(\S+)", line))), None)
        if found is None:
            raise SystemExit("the server did not start")
        yield child.pid, found[1]


@contextmanager
def _stub() -> Iterator[str]:
    with _child(["-m", "bench.server.stub"]) as child:
        assert child.stdout is not None
        yield child.stdout.readline().strip()


@contextmanager
def _child(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench server", description=__doc__)

    def add(name: str, **how: Any) -> None:
        parser.add_argument(name, **how)

    add("--base-url", action="append", default=[], metavar="URL", help="a running server; a second one to compare")
    add("--model", action="append", default=[], help="base model of each server; given once, that of both")
    add("--python", action="append", default=[], help="interpreter with the SDK that the server understands")
    add("--api-key", default=KEY, help="taken by both")
    add("--rounds", type=int, default=3, help="how often each is measured; medians are told")
    return parser
