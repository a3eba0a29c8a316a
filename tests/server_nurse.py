"""Servers for tests that kill them: a process that has everything loaded forks one for each line that it is told.

A line is JSON: the settings of the server, and where it is to end. After ``{"at": "commit", "after": 3}`` the server
kills itself the fourth time that its journal comes to that point. Each server's first line of output is its URL.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from typing import Any

from nursing import fork_for_each_line, fuse


def serve(about: dict[str, Any]) -> None:
    """Serve until SIGTERM or the end that was chosen."""
    import torch
    import trio

    from tickwork.server import Settings, run, serve

    torch.set_num_threads(1)
    sys.setswitchinterval(5e-4)
    if "at" in about:
        serve.Journal = partial(serve.Journal, at=fuse(about["at"], about["after"]))  # type: ignore[misc,assignment]

    async def main() -> None:
        asked = trio.Event()
        async with trio.open_nursery() as nursery:
            url = await nursery.start(run, Settings(**about["settings"]), asked.wait)
            os.write(1, f"{url}\n".encode())
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                nursery.start_soon(_wait, signals, asked)
                await asked.wait()

    trio.run(main)


async def _wait(signals: Any, asked: Any) -> None:
    async for _ in signals:
        asked.set()
        return


def main() -> None:
    """Fork a server for each line, one at a time, and say how it ended."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tickwork.compute.stage
    import tickwork.server  # noqa: F401

    fork_for_each_line(serve)


if __name__ == "__main__":
    main()
