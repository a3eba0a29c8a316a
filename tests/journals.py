"""Journals for tests: small records, copies of what a crash leaves, and damage."""

from __future__ import annotations

import shutil
import sqlite3
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
