"""``Snapshots``: the states of lanes, as files beside the journal, each whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from safetensors import SafetensorError, safe_open

from tickwork.errors import JournalError
from tickwork.files import checksum, sync
from tickwork.journal.records import SnapshotRecord

SUFFIX, NEW = ".safetensors", ".new"
_DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
_ALIGNED = 8

# Told what is about to be done; tests let it raise there.
Hook = Callable[[str], None]


def nothing(point: str) -> None:
    """Do nothing."""


@attrs.frozen(eq=False)
class Snapshot:
    """What a lane was at a number.

    Args:
        arrays: by name; of dtypes float16, float32, float64, int32, int64, uint8.
        metadata: what JSON holds.
    """

    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]


class Snapshots:
    """The folder of snapshots.

    Args:
        folder: made when the first one is written.
        at: told ``snapshot-write``, ``snapshot-sync``, ``snapshot-rename``, ``snapshot-folder`` before each is done.

    Room: any thread.
    """

    def __init__(self, folder: Path, at: Hook = nothing) -> None:
        self.folder = folder
        self._at = at

    def write(self, lane: str, number: int, snapshot: Snapshot) -> SnapshotRecord:
        """Write a snapshot whole and return what the journal must be told, without which it is swept away.

        The interpreter is free for other threads while bytes are written, summed and synced.

        Raises:
            JournalError: the disk, or arrays or metadata that can not be stored.
        """
        # A name of its own: one of the same number, which the journal would refuse, must not replace the one it has.
        name = f"{hashlib.blake2b(lane.encode(), digest_size=16).hexdigest()}-{number}-{uuid.uuid4().hex}{SUFFIX}"
        target, temporary = self.folder / name, self.folder / f"{name}{NEW}"
        try:
            self._at("snapshot-write")
            self.folder.mkdir(parents=True, exist_ok=True)
            size, digest = self._fill(temporary, _header(lane, number, snapshot), snapshot)
            self._at("snapshot-rename")
            os.replace(temporary, target)
            self._at("snapshot-folder")
            sync(self.folder)
        except (OSError, TypeError, ValueError) as error:
            message = f"the snapshot of lane {lane!r} at {number} could not be written: {error}; is the disk full?"
            raise JournalError(message, lane=lane, number=number) from error
        return SnapshotRecord(lane, number, name, size, digest)

    def verify(self, record: SnapshotRecord) -> None:
        """Read every byte.

        Raises:
            JournalError: the file is gone, cut short, or not what was written.
        """
        file = self.folder / record.file
        try:
            good = file.stat().st_size == record.size and checksum(file) == record.checksum
        except OSError as error:
            raise _damaged(record, str(error)) from error
        if not good:
            raise _damaged(record, "it is not what was written")

    def read(self, record: SnapshotRecord) -> Snapshot:
        """Verify a snapshot and return it.

        Raises:
            JournalError: the file is gone, cut short, not what was written, or another lane's.
        """
        self.verify(record)
        try:
            with safe_open(self.folder / record.file, framework="numpy") as file:
                about = json.loads(file.metadata()["tickwork"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(record, str(error)) from error
        if (about["lane"], about["number"]) != (record.lane, record.number):
            raise _damaged(record, f"it is of lane {about['lane']!r} at {about['number']}")
        return Snapshot(arrays, about["metadata"])

    def remove(self, names: Collection[str]) -> None:
        """Delete files that no record names any more."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str]) -> None:
        """Delete what a crash left: files that no record names. Only while nothing is being written."""
        if self.folder.is_dir():
            self.remove([file.name for file in self.folder.iterdir() if file.name not in keep])

    def _fill(self, file: Path, header: bytes, snapshot: Snapshot) -> tuple[int, str]:
        digest = hashlib.sha256()
        with file.open("wb") as stream:
            for chunk in (memoryview(header), *map(_raw, snapshot.arrays.values())):
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            self._at("snapshot-sync")
            os.fsync(stream.fileno())
            return stream.tell(), digest.hexdigest()


def _header(lane: str, number: int, snapshot: Snapshot) -> bytes:
    about = {"lane": lane, "number": number, "metadata": dict(snapshot.metadata)}
    entries: dict[str, Any] = {"__metadata__": {"tickwork": json.dumps(about, allow_nan=False)}}
    end = 0
    for name, array in snapshot.arrays.items():
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype}; {', '.join(_DTYPES)} are stored")
        entries[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": (end, end + array.nbytes),
        }
        end += array.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _raw(array: np.ndarray) -> memoryview[Any]:
    flat: Any = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    return memoryview(flat.view(np.uint8))


def _damaged(record: SnapshotRecord, why: str) -> JournalError:
    message = f"the snapshot of lane {record.lane!r} at request {record.number} is damaged: {why}"
    return JournalError(message, lane=record.lane, number=record.number)
