"""``Served``: ``tickwork serve`` in a process of its own, with the times of what it says."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

KEY, MODEL = "tml-bench", "bench/durability"
WAIT = 600.0
SERVE = ("-m", "tickwork.cli", "serve")
LISTENING, BACK = r"TINKER_BASE_URL=(\S+)", r"is back at request (\d+)"


class Served:
    """One server.

    Args:
        model: folder of the base model.
        more: further options of ``tickwork serve``.
        program: what stands before the options.
    """

    def __init__(self, model: str, store: Path, *more: str, program: Sequence[str] = SERVE) -> None:
        command = [sys.executable, *program, "--model", f"{MODEL}={model}", "--store", str(store), "--port", "0"]
        self._said: list[tuple[float, str]] = []
        self._more, self._ended = threading.Condition(), False
        self.begun = time.perf_counter()
        self._child = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32", "--gap-seconds", "3600", *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, pattern: str) -> tuple[float, str]:
        """Wait until it has said something; return seconds since its start, and the pattern's group."""
        place = 0
        with self._more:
            while True:
                for when, line in self._said[place:]:
                    if found := re.search(pattern, line):
                        return when - self.begun, found[1]
                place = len(self._said)
                if self._ended or not self._more.wait(WAIT):
                    raise SystemExit("the server could not be measured:\n" + "".join(x for _, x in self._said)[-2000:])

    @property
    def url(self) -> str:
        """Where it serves, once it does."""
        return self.wait_for(LISTENING)[1]

    def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it and wait."""
        self._child.send_signal(how)
        self._child.wait(WAIT)
        self._reader.join(WAIT)
        assert self._child.stdout is not None
        self._child.stdout.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with self._more:
                self._said.append((time.perf_counter(), line))
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()


@contextmanager
def served(model: str, store: Path, *more: str, program: Sequence[str] = SERVE) -> Iterator[Served]:
    """Serve until the context is left, then kill."""
    server = Served(model, store, *more, program=program)
    try:
        yield server
    finally:
        server.end()


def free_port() -> int:
    """Return a port that nobody listens on, and that no connection of a client is given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
