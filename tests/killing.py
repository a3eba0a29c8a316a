"""A training script under the official SDK, and servers that are killed beneath it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tinker import types

from nursing import start
from served import TINY, datum, sdk

GUARD = 120.0
# Turns at the end of a script by which all kills have been.
CALM = 3

# Turns between the scripts of two seeds.
APART = 101

# Service, rounds, progress, seed: plays a client and returns everything that it was told.
Script = Callable[[Any, int, "Progress", int], list[Any]]


def free_port() -> int:
    """Return a port that nobody listens on, and that no connection of a client is given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Nurse:
    """Starts servers one after the other, each on the port of the last, from a process that has all they need.

    Args:
        log: where what they log goes.
    """

    def __init__(self, log: Path) -> None:
        self.settings: dict[str, Any] = {}
        self.pid: int | None = None
        self._log = log.open("ab")
        self._process = start("server_nurse.py", self._log)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._line() == "ready"

    def at(self, store: Path, **settings: Any) -> Nurse:
        """Serve that store from now on, at a port of its own."""
        self.settings = {
            "models": [TINY],
            "store": str(store),
            "port": free_port(),
            "snapshot_seconds": 0.2,
            **settings,
        }
        return self

    @property
    def url(self) -> str:
        """Where it serves, or will."""
        return f"http://127.0.0.1:{self.settings['port']}"

    def start(self, **end: Any) -> None:
        """Start a server, which may be told where to end."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"settings": self.settings, **end}) + "\n")
        self.pid = int(self._line().removeprefix("pid "))

    def up(self) -> str:
        """Wait until it listens; return its URL."""
        url = self._line()
        assert url.startswith("http"), url
        return url

    def kill(self) -> str:
        """Kill the server, whatever it does; return how it ended."""
        assert self.pid is not None
        with_no_such(self.pid)
        return self.ended()

    def stop(self) -> str:
        """Let the server drain; return how it ended."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGTERM)
        return self.ended()

    def ended(self, unless: threading.Event | None = None) -> str:
        """Wait until it has ended, by itself or because the event came and it was killed."""
        while True:
            try:
                line = self._line(0.1 if unless else GUARD)
            except queue.Empty:
                if unless is not None and unless.is_set():
                    return self.kill()
                if unless is None:
                    raise
            else:
                if line.startswith("ended"):
                    return line

    def close(self) -> None:
        """Kill what is left."""
        assert self._process.stdin is not None
        if self.pid is not None:
            with_no_such(self.pid)
        self._process.stdin.close()
        self._process.wait(GUARD)
        self._reader.join(GUARD)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _line(self, timeout: float = GUARD) -> str:
        return self._lines.get(timeout=timeout)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())


def with_no_such(pid: int) -> None:
    """Kill a process that may have ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@contextmanager
def serving_from(nurse: Nurse, **end: Any) -> Iterator[str]:
    """Start a server, yield its URL, and kill it in the end, unless it has ended."""
    nurse.start(**end)
    try:
        yield nurse.up()
    finally:
        nurse.kill()


class Impatient:
    """What the official client calls ``asyncio``, but that it waits a fifth of a second where it would wait seconds."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        """Sleep, not for long."""
        await asyncio.sleep(min(seconds, 0.2))


def hurry(monkeypatch: Any) -> None:
    """Let the official client try again sooner after a lost connection."""
    for name in ("api_future_impl", "internal_client_holder", "retry_handler", "session_futures_poller"):
        monkeypatch.setattr(f"tinker.lib.{name}.asyncio", Impatient())


class Progress:
    """How far a script and its killer have come; neither leaves the other far behind.

    Args:
        rounds: turns of the script.
        kills: how often the server is to be killed meanwhile.
    """

    def __init__(self, rounds: int = 1, kills: int = 0) -> None:
        self.over = threading.Event()
        self.killed = 0
        # So that the script can do no more without a kill, but for a moment in which it is left in peace at the end.
        self._pace = kills / max(1, rounds - CALM)
        self._kills, self._turn, self._free = kills, 0, False
        self._changed = threading.Condition()

    def move(self) -> None:
        """Note that a turn is done, and wait for the kills that should have come by then."""
        with self._changed:
            self._turn += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: not self._ahead, GUARD)

    def wait(self) -> None:
        """Wait until a turn is done, or none can be before a kill."""
        with self._changed:
            turn = self._turn
            self._changed.wait_for(lambda: self._turn > turn or self._ahead or self.over.is_set(), GUARD)

    def free(self, free: bool) -> None:
        """Let the script go as far as it comes, since the server ends of itself."""
        with self._changed:
            self._free = free
            self._changed.notify_all()

    def kill(self) -> None:
        """Note that the server was killed."""
        with self._changed:
            self.killed += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Note that the script is through."""
        with self._changed:
            self.over.set()
            self._changed.notify_all()

    @property
    def _ahead(self) -> bool:
        return not self._free and self.killed < min(self._kills, int(self._pace * self._turn))


class Killer(threading.Thread):
    """Kills the server again and again: at random instants, some while it starts, and at the journal's own points.

    Args:
        ends: for each server, where it is to end: a point and how often it is passed before, or None for any instant.
    """

    def __init__(self, nurse: Nurse, ends: Sequence[tuple[str, int] | None], seed: int, progress: Progress) -> None:
        super().__init__(daemon=True)
        self._nurse, self._ends, self._progress = nurse, ends, progress
        self._random = random.Random(seed)
        self.error: BaseException | None = None

    def run(self) -> None:
        """Kill until all ends are used up or the script is through, then leave a server that stays."""
        try:
            for end in self._ends:
                if self._progress.over.is_set():
                    break
                self._once(end)
                self._progress.kill()
            self._nurse.start()
            self._nurse.up()
        except BaseException as error:
            self.error = error
        self._progress.free(True)

    def _once(self, end: tuple[str, int] | None) -> None:
        if end is not None:
            self._progress.free(True)
            self._nurse.start(at=end[0], after=end[1])
            self._nurse.ended(self._progress.over)
            self._progress.free(False)
            return
        self._nurse.start()
        if self._random.random() < 0.2:  # on its way up
            time.sleep(self._random.random() * 0.5)
        else:
            self._nurse.up()
            self._progress.wait()
            time.sleep(self._random.random() * 0.15)
        self._nurse.kill()


def script(service: Any, rounds: int, progress: Progress, seed: int = 0) -> list[Any]:
    """Train, save, load and sample, and return everything that was told.

    Args:
        seed: of the datums, and of which turn does what.
    """
    told: list[Any] = []
    client = service.create_lora_training_client(TINY, rank=4, seed=7).result(GUARD)
    handle = service.create_custom_loss(_square, {"logprobs": 1, "weights": 1}).result(GUARD)
    adam = types.AdamParams(learning_rate=2e-3, grad_clip_norm=5.0)
    waiting: list[tuple[str, Any]] = []
    for turn in range(APART * seed, APART * seed + rounds):
        data = _data(turn)
        before = waiting
        waiting = [("pass", client.forward_backward(data, "cross_entropy"))]
        if turn % 5 == 2:
            waiting.append(("pass", client.forward_backward_custom(data, handle)))
        waiting.append(("step", client.optim_step(adam)))
        if turn % 7 == 3:
            waiting.append(("save", client.save_state(f"at-{turn}")))
        told += [_told(kind, future.result(GUARD)) for kind, future in before]
        progress.move()
        if turn % 7 == 4 and (saved := [path for path in told if isinstance(path, str)]):
            client.load_state_with_optimizer(f"tinker://{client.model_id}/weights/{saved[-1]}").result(GUARD)
        if turn % 6 == 1:
            sampler = client.save_weights_and_get_sampling_client().result()
            told += _drawn(sampler, turn)
    told += [_told(kind, future.result(GUARD)) for kind, future in waiting]
    told.append(_told("pass", client.forward(data, "cross_entropy").result(GUARD)))
    told.append(_told("save", client.save_state("end").result(GUARD)))
    progress.end()
    return told


def several(service: Any, rounds: int, progress: Progress, seed: int = 0) -> list[Any]:
    """Train several models at once, each with samplers that follow it, and return everything that was told."""
    told: list[Any] = []
    making = [service.create_lora_training_client(TINY, rank=rank, seed=rank) for rank in (2, 4, 8)]
    clients = [each.result(GUARD) for each in making]
    followers: list[list[Any]] = [[] for _ in clients]
    adam = types.AdamParams(learning_rate=2e-3)
    waiting: list[tuple[str, Any]] = []
    for turn in range(APART * seed, APART * seed + rounds):
        before, waiting = waiting, []
        for place, client in enumerate(clients):
            waiting.append(("pass", client.forward_backward(_data(3 * turn + place), "cross_entropy")))
            waiting.append(("step", client.optim_step(adam)))
        told += [_told(kind, future.result(GUARD)) for kind, future in before]
        progress.move()
        mine = followers[turn % len(clients)]
        if len(mine) < 3:
            made = clients[turn % len(clients)].save_weights_and_get_sampling_client(kind="inflight")
            mine.append(made.result(GUARD))
        # The first one follows the later ones, and all stay where they are while their model is trained.
        told += _drawn(mine[0], turn) + _drawn(mine[-1], turn + 1)
    told += [_told(kind, future.result(GUARD)) for kind, future in waiting]
    told += [_told("save", client.save_state(f"end-{place}").result(GUARD)) for place, client in enumerate(clients)]
    progress.end()
    return told


def _data(turn: int) -> list[types.Datum]:
    numbers = np.random.default_rng(turn)
    return [datum(numbers.integers(0, 60, size).tolist()) for size in (9, 14)]


def _drawn(sampler: Any, seed: int) -> list[Any]:
    params = types.SamplingParams(max_tokens=6, seed=seed)
    drawn = sampler.sample(types.ModelInput.from_ints([3, 14, 15]), 2, params).result(GUARD)
    return [[list(s.tokens), list(s.logprobs)] for s in drawn.sequences]


def _square(logprobs: Any, weights: Any) -> Any:
    loss = (weights * logprobs**2).sum()
    return loss, {"custom/square:sum": loss}


def _told(kind: str, result: Any) -> Any:
    if kind == "save":
        return result.path.rsplit("/", 1)[1]
    metrics = {name: value for name, value in result.metrics.items() if name != "clock_cycle:unique"}
    outputs = [] if kind == "step" else [list(item["logprobs"].data) for item in result.loss_fn_outputs]
    return [metrics, outputs]


def left(store: Path) -> dict[str, bytes]:
    """Return the bytes of the adapters and moments of every checkpoint, by name."""
    files = sorted(store.glob("runs/*/weights/*/*.safetensors"))
    named = [file for file in files if not file.parent.name.startswith(".")]  # others were on their way at a kill
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in named}


def undisturbed(nurse: Nurse, play: Script, rounds: int, seed: int = 0) -> tuple[list[Any], dict[str, bytes]]:
    """Run a script on a server that is let be."""
    nurse.start()
    with sdk(nurse.up()) as service:
        told = play(service, rounds, Progress(), seed)
    assert nurse.stop() == "ended 0"
    return told, left(Path(nurse.settings["store"]))


def killed(
    nurse: Nurse, play: Script, rounds: int, ends: Sequence[tuple[str, int] | None], seed: int = 0
) -> tuple[Any, Any, int]:
    """Run a script on servers that are killed; also return how many were.

    Args:
        seed: of the script; that of the instants is the next.
    """
    progress = Progress(rounds, len(ends))
    killer = Killer(nurse, ends, seed + 1, progress)
    killer.start()
    with sdk(nurse.url) as service:
        told = play(service, rounds, progress, seed)
        killer.join(GUARD)
        assert not killer.is_alive()
        assert killer.error is None, killer.error
    nurse.stop()
    return told, left(Path(nurse.settings["store"])), progress.killed
