"""``Promise``: what a client was promised, until it has fetched it; and the table of all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

import attrs
import orjson
import trio

from tickwork.errors import EngineStoppedError, JournalError, RequestErrorCategory, RequestFailedError
from tickwork.futures import Future
from tickwork.results import as_json
from tickwork.server.in_flight import InFlight

log = logging.getLogger("tickwork.server")

Place = tuple[str, int] | None
# Takes a promise with its value or its error.
Keep = Callable[["Promise", Any, BaseException | None], None]
# A result's forms: JSON always, protobuf where the SDK wants it.
Encode = Callable[[Any], bytes]


@attrs.frozen(eq=False)
class Kind:
    """What a kind of request answers with.

    Args:
        name: for the log.
        json: the result as JSON.
        proto: the result as protobuf, or None where there is no such form.
        text: what a journal calls it; its name unless given.
    """

    name: str
    json: Encode
    proto: Encode | None = None
    text: str = attrs.field()

    @text.default
    def _its_name(self) -> str:
        return self.name


def plain(name: str, shape: Callable[[Any], Any] = as_json, text: str | None = None) -> Kind:
    """Make a kind that answers with a JSON object of ``type`` and what ``shape`` gives."""
    return Kind(name, lambda value: orjson.dumps({"type": name, **shape(value)}), None, text or name)


@attrs.define(eq=False)
class Promise:
    """One request between its acceptance and the fetching of its result.

    Args:
        owner: whose it is; nobody else may fetch it.
        weight: tokens that count against its owner until it is fetched, or forgotten because nobody fetched it.
        place: its lane and number in the journal, if it is to be found there.
        keep: given what becomes of it, to settle it once that is durable; without, it settles at once.
        accepted: set once it is durable, or refused; until then nobody is told its id.
        refusal: why it was not taken after all.

    Room: the engine's thread, which is also the server's.
    """

    request_id: str
    owner: str
    kind: Kind
    weight: int = 0
    place: Place = None
    keep: Keep | None = None
    accepted: trio.Event = attrs.Factory(trio.Event)
    refusal: JournalError | None = None
    settled: trio.Event = attrs.Factory(trio.Event)
    value: Any = None
    error: BaseException | None = None
    future: Future[Any] | None = None
    settled_at: float = 0.0
    fetched_at: float | None = None
    _calls: list[Callable[[Promise], None]] = attrs.Factory(list)
    _forms: dict[bool, bytes] = attrs.Factory(dict)

    def follow(self, future: Future[Any]) -> None:
        """Settle when ``future`` does, which happens in this thread."""
        self.future = future
        future.add_done_callback(self._take)

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self._end(None, error)

    def fulfil(self, value: Any) -> None:
        """End with a value."""
        self._end(value, None)

    async def taken(self) -> None:
        """Wait until it is durable that this was asked.

        Raises:
            JournalError: it is not, and never will be.
        """
        if not self.accepted.is_set():
            await self.accepted.wait()
        if self.refusal is not None:
            raise self.refusal

    def then(self, call: Callable[[Promise], None]) -> None:
        """Call ``call(self)`` once settled, or at once."""
        if self.settled.is_set():
            call(self)
        else:
            self._calls.append(call)

    @property
    def bulk(self) -> int:
        """About how many bytes its result has."""
        return 4 * self.weight

    def encoded(self, *, proto: bool) -> bytes:
        """Return the result's bytes, encoded once for each form; safe in a worker thread."""
        proto = proto and self.kind.proto is not None
        if proto not in self._forms:
            encode = self.kind.proto if proto and self.kind.proto is not None else self.kind.json
            self._forms[proto] = encode(self.value)
        return self._forms[proto]

    def failure(self) -> dict[str, str]:
        """Describe the error as the SDK expects it."""
        assert self.error is not None
        known = self.error if isinstance(self.error, RequestFailedError) else None
        category = known.category if known else RequestErrorCategory.SERVER
        return {"error": str(known or "an error inside the server"), "category": str(category)}

    def _take(self, future: Future[Any]) -> None:
        error = future.future().exception()
        self._end(None if error is not None else future.future().result(), error)

    def _end(self, value: Any, error: BaseException | None) -> None:
        if self.keep is None:
            self.settle(value, error)
        else:
            self.keep(self, value, error)

    def settle(self, value: Any, error: BaseException | None) -> None:
        """Show what became of it."""
        self.value, self.error = value, error
        if self.error is not None and not isinstance(self.error, RequestFailedError):
            log.error("%s failed", self.request_id, exc_info=self.error, extra={"request_id": self.request_id})
        self.settled_at = trio.current_time()
        self.settled.set()
        calls, self._calls = self._calls, []
        for call in calls:
            call(self)


class Promises:
    """All promises by request id.

    Args:
        most_fetched: results of one owner that are kept once they were fetched; the oldest go first.
    """

    def __init__(self, most_fetched: int = 2**16) -> None:
        self._all: dict[str, Promise] = {}
        self._in_flight = InFlight(most_fetched)
        self.pending = 0
        self.unfetched: set[Promise] = set()
        self._settled_one = trio.Event()

    def __len__(self) -> int:
        """Promises that are kept."""
        return len(self._all)

    def __contains__(self, request_id: str) -> bool:
        """Whether a promise is kept."""
        return request_id in self._all

    def __iter__(self) -> Iterator[Promise]:
        return iter(list(self._all.values()))

    def make(self, request_id: str, owner: str, kind: Kind, weight: int = 0, place: Place = None) -> Promise:
        """Record a new promise, in place of one of that id."""
        promise = Promise(request_id, owner, kind, weight, place)
        if place is None:
            promise.accepted.set()
        if (former := self._all.get(request_id)) is not None:
            self._forget(former)
        self._all[request_id] = promise
        self._in_flight.made(promise)
        self.pending += 1
        self.unfetched.add(promise)
        promise.then(self._settle)
        return promise

    def find(self, request_id: str, owner: str) -> Promise | None:
        """Return an owner's promise; None if it is gone, was never made, or is somebody else's."""
        promise = self._all.get(request_id)
        return promise if promise is not None and promise.owner == owner else None

    def weight(self, owner: str) -> int:
        """Return the tokens that an owner has in flight: accepted, and not fetched."""
        return self._in_flight.tokens(owner)

    def count(self, owner: str) -> int:
        """Return how many requests an owner has in flight."""
        return self._in_flight.count(owner)

    def fetched(self, promise: Promise) -> None:
        """Note that a result has been handed over; it stays for a while, for a client whose connection broke."""
        promise.fetched_at = trio.current_time()
        self.unfetched.discard(promise)
        for old in self._in_flight.fetched(promise):
            self._forget(old)
        self._wake()

    def sweep(self, result_seconds: float, refetch_seconds: float) -> None:
        """Forget results that were fetched a while ago, or that nobody has fetched for long."""
        now = trio.current_time()
        for promise in self:
            since, keep = promise.settled_at, result_seconds
            if promise.fetched_at is not None:
                since, keep = promise.fetched_at, refetch_seconds
            if promise.settled.is_set() and now - since >= keep:
                self._forget(promise)

    def forget(self, sessions: Collection[str]) -> None:
        """Forget the results of sessions that are forgotten: their ids begin with that of the session."""
        for promise in self:
            if promise.settled.is_set() and promise.request_id.partition(":")[0] in sessions:
                self._forget(promise)

    def drop(self, promise: Promise, why: JournalError) -> None:
        """Forget a promise that nobody was told of."""
        promise.refusal = why
        self._forget(promise)
        promise.keep = None
        promise.fail(why)
        promise.accepted.set()

    def leave(self, promise: Promise) -> None:
        """Wait no longer for a promise: another run of the server will keep it."""
        self.unfetched.discard(promise)
        self._settle(promise)

    def stop(self) -> None:
        """Fail what waits for an earlier request of its model: a stopping server takes none in any more."""
        for promise in self:
            if promise.future is None and not promise.settled.is_set():
                promise.fail(EngineStoppedError("the server stopped before this request's turn"))

    async def drained(self) -> None:
        """Wait until everything is settled."""
        while self.pending:
            await self._settled_one.wait()

    async def handed_over(self) -> None:
        """Wait until everything settled has been fetched."""
        while self.unfetched:
            await self._settled_one.wait()

    def _settle(self, _: Promise) -> None:
        self.pending -= 1
        self._wake()

    def _forget(self, promise: Promise) -> None:
        if self._all.get(promise.request_id) is promise:
            del self._all[promise.request_id]
        self.unfetched.discard(promise)
        self._in_flight.gone(promise)

    def _wake(self) -> None:
        self._settled_one.set()
        self._settled_one = trio.Event()
