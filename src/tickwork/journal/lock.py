"""``Lock``: one process at a time on one folder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

from tickwork.errors import JournalError

# Seconds after which whoever only looks for a holder has let go again.
LOOK = 0.05


def holder(file: Path) -> str | None:
    """Return the process that holds a folder, or None, without keeping it from being held."""
    try:
        stream = file.open()
    except (FileNotFoundError, NotADirectoryError):
        return None
    with stream:
        return None if _taken(stream, fcntl.LOCK_SH) else stream.read(32).strip() or "unknown"


def _taken(stream: TextIO, how: int) -> bool:
    try:
        fcntl.flock(stream, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Lock:
    """Holds a folder until it is released or its process ends, however it ends.

    Args:
        file: where the holder's process id is written; made if it is not there.

    Raises:
        JournalError: another one holds it, with its process id; or the folder can not be written.
    """

    def __init__(self, file: Path) -> None:
        self._stream = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        if not self._take():
            other = self._stream.read(32).strip() or "unknown"
            self._stream.close()
            raise JournalError(
                f"{file.parent} is in use by process {other}: end that one first, or give this one a store of its own"
            )
        self._stream.truncate(0)
        self._stream.write(f"{os.getpid()}\n")
        self._stream.flush()

    def _take(self) -> bool:
        if _taken(self._stream, fcntl.LOCK_EX):
            return True
        time.sleep(LOOK)
        return _taken(self._stream, fcntl.LOCK_EX)

    def release(self) -> None:
        """Let the next one in; does nothing a second time."""
        self._stream.close()
