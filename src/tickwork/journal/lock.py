"""``Lock``: one process at a time on one folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tickwork.errors import JournalError


class Lock:
    """Holds a folder until it is released or its process ends, however it ends.

    Args:
        file: where the holder's process id is written; made if it is not there.

    Raises:
        JournalError: another one holds it, with its process id; or the folder can not be written.
    """

    def __init__(self, file: Path) -> None:
        self._stream = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._stream.read(32).strip() or "unknown"
            self._stream.close()
            raise JournalError(
                f"{file.parent} is in use by process {holder}: end that one first, or give this one a store of its own"
            ) from None
        self._stream.truncate(0)
        self._stream.write(f"{os.getpid()}\n")
        self._stream.flush()

    def release(self) -> None:
        """Let the next one in; does nothing a second time."""
        self._stream.close()
