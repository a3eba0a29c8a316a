"""Files that survive a crash whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any


def checksum(file: Path) -> str:
    """Return a file's SHA-256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: Any) -> None:
    """Replace a file in one step; what is there after a crash is the old text or the new."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    with temporary.open("w") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Make a file's bytes or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(folder: Path, target: Path) -> None:
    """Give a finished folder its name; a folder of that name goes only once the new one stands."""
    doomed = target.with_name(f".gone-{uuid.uuid4().hex}")
    if target.exists():
        os.replace(target, doomed)
    try:
        os.replace(folder, target)
    except OSError:
        if doomed.exists():
            os.replace(doomed, target)
        raise
    if doomed.exists():
        shutil.rmtree(doomed)


def remove(folder: Path) -> None:
    """Delete a folder so that it never shows half deleted: first its name goes, then its files."""
    doomed = folder.with_name(f".gone-{uuid.uuid4().hex}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
