"""``Stream``: the bytes of one connection, with as few turns of the loop as they need."""

from __future__ import annotations

import socket
from types import TracebackType

import trio


class Stream:
    """A connection. ``trio.SocketStream`` would do, but takes a turn of the loop more for all that is sent.

    Each turn gives the interpreter to the device's thread, and waits to have it back.

    Args:
        stream: taken over, and not to be used any more.

    Room: one Trio task.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = socket.socket(fileno=stream.socket.detach())
        self.socket.setblocking(False)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()

    async def receive_some(self, most: int) -> bytes:
        """Return what has come, up to ``most`` bytes, or nothing at the end. Cancel: nothing is lost.

        Raises:
            trio.ClosedResourceError: the wait was interrupted; nothing is lost.
            trio.BrokenResourceError: the connection is gone.
        """
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            try:
                return self.socket.recv(most)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error

    def interrupt(self) -> None:
        """Let whoever waits for bytes go on, with ``trio.ClosedResourceError``; the connection stays as it is."""
        trio.lowlevel.notify_closing(self.socket)

    async def send_all(self, data: bytes | memoryview, seconds: float) -> None:
        """Write everything. Cancel, where the client does not take it at once: a part is written.

        Args:
            seconds: how long the client may take.

        Raises:
            trio.BrokenResourceError: the connection is gone.
            trio.TooSlowError: the time is over.
        """
        left = memoryview(data)[self._sent(data) :]
        if not left:
            return
        with trio.fail_after(seconds):
            while left:
                await trio.lowlevel.wait_writable(self.socket)
                left = left[self._sent(left) :]

    def send_eof(self) -> None:
        """Say that nothing more will come.

        Raises:
            trio.BrokenResourceError: the connection is gone.
        """
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    def _sent(self, data: bytes | memoryview) -> int:
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error
