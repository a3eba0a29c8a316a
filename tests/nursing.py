"""What tests share that kill processes: a parent with everything loaded forks one for each line that it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

# The points of the journal at which a crash would matter.
POINTS = (
    *("write", "commit", "remove", "settle"),
    *("snapshot-write", "snapshot-sync", "snapshot-rename", "snapshot-folder"),
)


def start(program: str, log: IO[bytes]) -> subprocess.Popen[str]:
    """Start such a parent; what it and its children log goes to ``log``."""
    command = [sys.executable, str(Path(__file__).with_name(program))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1)


def fuse(at: str, after: int) -> Any:
    """Return a hook for the journal that ends this process at a point."""
    left = after

    def hook(point: str) -> None:
        nonlocal left
        if point == at:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def fork_for_each_line(act: Callable[[dict[str, Any]], None]) -> None:
    """Be such a parent: one child at a time, each acting on its line's JSON; say its id, and how it ended."""
    os.write(1, b"ready\n")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                act(json.loads(line))
            except BaseException as error:
                traceback.print_exc()
                os.write(1, f"error {error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        os.write(1, f"pid {child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())
