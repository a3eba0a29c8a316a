"""Files that survive a crash whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

# Folders on their way in, on their way out, and stepping aside for a new one of their name.
NEW, GONE, ASIDE = ".new-", ".gone-", ".aside-"
# Seconds after which a folder on its way is taken to be left over from a crash, not at work in another process.
ABANDONED = 3600


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
    """Give a finished folder its name; one of that name steps aside and goes only once the new one stands.

    After a crash in between, ``recover`` gives the name back to the old folder.
    """
    aside = target.with_name(f"{ASIDE}{target.name}")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(target, aside)
    try:
        os.replace(folder, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a folder so that it never shows half deleted: first its name goes, then its files."""
    doomed = folder.with_name(f"{GONE}{uuid.uuid4().hex}")
    try:
        os.replace(folder, doomed)
    except FileNotFoundError:
        return  # another process was first
    shutil.rmtree(doomed, ignore_errors=True)


def recover(runs: Path) -> None:
    """Clear up after a crash: names that were being replaced get their old folder back, leftovers go."""
    for aside in runs.glob(f"*/*/{ASIDE}*"):
        target = aside.with_name(aside.name.removeprefix(ASIDE))
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, target)
    for prefix in (NEW, GONE):
        for left in runs.glob(f"*/*/{prefix}*"):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
