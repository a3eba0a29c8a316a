"""Journals for tests: small records, copies of what a crash leaves, and damage."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tickwork.journal.codec import encode
from tickwork.journal.journal import Journal
from tickwork.journal.records import LaneRecord, Record, RequestRecord, ResultRecord
from tickwork.journal.snapshots import Snapshot
from tickwork.requests import OptimStep, Release
from tickwork.results import OptimStepResponse
from tickwork.types import AdamParams

# Seconds after which a future that should have settled long ago fails its test.
GUARD = 20.0
LANE = "session:train:0"


def lane(name: str = LANE, **about: Any) -> LaneRecord:
    """Describe a training model."""
    return LaneRecord(name, "owner", "session", 0, **about)


def request(number: int, name: str = LANE, size: int = 0) -> RequestRecord:
    """Ask for something that tells its number, in a body of about that many bytes."""
    ask = OptimStep(name, AdamParams(learning_rate=float(number))) if not size else Release("x" * size)
    return RequestRecord(name, number, "owner", "optim_step", encode(ask))


def result(number: int, name: str = LANE, settled: float = 0.0, gradients: bytes | None = None) -> ResultRecord:
    """Settle that request."""
    return ResultRecord(name, number, settled, encode(OptimStepResponse({"step": float(number)})), gradients)


def state(number: int, cells: int = 4) -> Snapshot:
    """What a lane is after a request."""
    return Snapshot({"adapter": np.full((cells,), number, np.float32)}, {"steps": number})


def put(journal: Journal, *records: Record) -> None:
    """Append and wait."""
    journal.append(records).result(GUARD)


def fill(journal: Journal, count: int, name: str = LANE, settled: int | None = None) -> None:
    """Append a lane of so many requests, of which the first are settled."""
    put(journal, lane(name), *[request(number, name) for number in range(count)])
    put(journal, *[result(number, name) for number in range(count if settled is None else settled)])


def numbers(requests: Sequence[Any]) -> list[int]:
    """Return the numbers of requests or results."""
    return [each.number for each in requests]


def crashed(store: Path, to: Path) -> Path:
    """Copy what a store has on its disk now, as a crash would leave it; return the copy."""
    shutil.copytree(store / "journal", to / "journal")
    return to


def database(store: Path) -> Path:
    """Return the file of a store's journal."""
    return store / "journal" / "journal.sqlite3"


def change(store: Path, sql: str, *values: Any) -> None:
    """Change a closed journal behind its back."""
    db = sqlite3.connect(database(store), isolation_level=None)
    assert db.execute(sql, values).rowcount > 0
    db.close()


def flip(file: Path, place: int) -> None:
    """Change one byte of a file."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 0x55
    file.write_bytes(raw)


def write_for_ever(store: Path) -> None:
    """Write to a lane until killed, and print each number once its request and result are acknowledged."""
    journal = Journal(store)
    (past,) = journal.recovered.lanes or [None]
    number = past.next if past is not None else 0
    waiting = [each.number for each in past.requests if each.result is None] if past is not None else []
    put(journal, lane(), *[result(late) for late in waiting])
    while True:
        pairs = [(request(number + turn, size=3000), result(number + turn)) for turn in range(3)]
        futures = [journal.append([record]) for pair in pairs for record in pair]
        for future in futures:
            future.result(GUARD)
        number += len(pairs)
        os.write(1, f"{number - 1}\n".encode())
        if number % 15 == 0:
            journal.write_snapshot(LANE, number - 1, state(number - 1)).result(GUARD)
            journal.trim(settled_before=1.0, fetched_before=0.0)


def nurse() -> None:
    """Fork a writer for each store named on the standard input, and say when it has ended."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.write(1, f"{os.getpid()}\n".encode())
            write_for_ever(Path(line.strip()))
        os.waitpid(child, 0)
        os.write(1, b"ended\n")
