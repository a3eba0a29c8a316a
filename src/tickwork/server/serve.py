"""``serve``: engine and HTTP in one Trio run, from the first bound socket to the last fetched result."""

from __future__ import annotations

import logging
import socket
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from tickwork.build import open_sampler, release
from tickwork.catalogue import Catalogue
from tickwork.clients.host import Host, make_engine
from tickwork.clients.nursery import hosted
from tickwork.engine.engine import Engine
from tickwork.errors import JournalError
from tickwork.futures import Inner
from tickwork.journal.journal import Journal
from tickwork.models import give_name
from tickwork.server.app import make_app
from tickwork.server.door import Door
from tickwork.server.durable import Durable
from tickwork.server.http import serve_http
from tickwork.server.recovery import recover
from tickwork.server.server import Server
from tickwork.server.settings import Settings

log = logging.getLogger("tickwork.server")

# Connections that wait to be taken; seconds that connections have at the end to write what they are writing.
BACKLOG, GRACE_SECONDS = 4096, 1.0

Stop = Callable[[], Awaitable[None]]


async def run(settings: Settings, stop: Stop, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve until ``stop`` returns, then drain.

    Args:
        stop: waits for the wish to end.
        task_status: told the base URL once models are loaded and the socket is open.

    Raises:
        ModelLoadError: a base model that can not be loaded.
        OSError: the address is taken.
        Exception: what the engine died of.

    Cancel: the current job ends, everything else fails, and it returns.
    """
    for name, source in settings.models.items():
        give_name(name, source)
    catalogue = Catalogue(settings.store)
    listener = _listen(settings)
    host = Host(_engine(catalogue, settings), catalogue)
    with listener:
        durable = Durable(await trio.to_thread.run_sync(open_journal, settings), optional=settings.journal_optional)
        try:
            async with hosted(host):
                await _load(host, settings)
                server = Server(settings, Door(host.portal), catalogue, host.engine, durable)
                await _serve(server, listener, stop, task_status)
        finally:
            durable.close()


def open_journal(settings: Settings) -> Journal | None:
    """Open the journal of the store; None where there is none, or it can not be written and need not be.

    Raises:
        JournalError: it can not be written; or, whatever the settings say, it is in use, damaged or of another version.
    """
    if settings.store is None or settings.journal is None:
        return None
    try:
        return Journal(settings.store, durability=settings.journal, at_once=settings.journal == "process")
    except JournalError as error:
        if not (settings.journal_optional and isinstance(error.__cause__, OSError | sqlite3.OperationalError)):
            raise
        log.critical("%s; nothing is kept, as was asked for", error)
        return None


def _engine(catalogue: Catalogue, settings: Settings) -> Engine:
    return make_engine(
        catalogue,
        settings.device,
        settings.dtype,
        settings.cycle_period,
        settings.max_tokens_per_pass,
        merge=settings.merge,
        invariant=settings.invariant,
        checkpoint_activations=settings.checkpoint_activations,
        adapter_memory=settings.adapter_memory,
        spare_core=True,
    )


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """Run a server in a thread of its own and yield its base URL; leaving drains and stops it.

    Raises:
        Exception: what kept it from starting, or what it died of.
    """
    thread = _ServerThread(settings)
    thread.start()
    try:
        yield thread.base_url.result()
    finally:
        thread.stop()


async def _serve(server: Server, listener: socket.socket, stop: Stop, task_status: trio.TaskStatus[str]) -> None:
    done = trio.Event()
    url = _url(server.settings.host, listener)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.door.run)
        await nursery.start(server.durable.run)
        if server.durable.journal is not None:
            await recover(server, server.durable.journal)
        nursery.start_soon(server.sweep)
        async with trio.open_nursery() as http:
            most = server.settings.max_connections
            await http.start(serve_http, make_app(server), _listening(listener), done, GRACE_SECONDS, most)
            task_status.started(url)
            await stop()
            await server.drain()
            done.set()
        nursery.cancel_scope.cancel("the server has ended")


def _listen(settings: Settings) -> socket.socket:
    """Take the address before anything is loaded: that it is taken should be known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(f"{settings.host}:{settings.port} can not be listened on: {error.strerror}") from None
    return listener


def _listening(listener: socket.socket) -> trio.SocketListener:
    listener.listen(BACKLOG)
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))


def _url(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


async def _load(host: Host, settings: Settings) -> None:
    """Load every base model before anybody is let in: what is wrong with one is told at the start."""
    for name in settings.models:
        key = f"load:{name}"
        await (await host.portal.submit_async(open_sampler(key, None, name)))
        host.portal.drop(release(key, key))


class _ServerThread:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.base_url: Inner[str] = Inner()
        self._stop: Callable[[], None] = lambda: None
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="tickwork-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop()
        self._thread.join()
        if self._death is not None:
            raise self._death

    def _main(self) -> None:
        try:
            trio.run(self._run)
        except BaseException as error:
            self._death = _alone(error)
            if not self.base_url.done():
                self.base_url.set_exception(self._death)

    async def _run(self) -> None:
        asked, token = trio.Event(), trio.lowlevel.current_trio_token()

        def stop() -> None:
            try:
                token.run_sync_soon(asked.set)
            except trio.RunFinishedError:
                pass

        self._stop = stop
        async with trio.open_nursery() as nursery:
            self.base_url.set_result(await nursery.start(run, self._settings, asked.wait))


def _alone(error: BaseException) -> BaseException:
    """Return what a nursery has put into groups by itself."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
