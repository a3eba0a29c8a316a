"""``Lane``: brings the requests of one training model, which arrive in any order, into that of their numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import trio

from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError, RequestFailedError, TickworkError
from tickwork.journal.records import Record, SkippedRecord
from tickwork.requests import reads_checkpoint
from tickwork.server.answers import HttpError
from tickwork.server.door import Door
from tickwork.server.durable import Durable
from tickwork.server.promises import Kind, Promise, Promises

# Early requests that one lane holds; a client that skips that many numbers is not chunking a batch.
MOST_HELD = 4096
# How far ahead of its lane a number may be.
MOST_AHEAD = 2**16

# A request, or what is wrong with it: its number is used up either way.
Ask = Request | TickworkError


class Keeper(Protocol):
    """What a lane tells of its progress."""

    def settled(self, lane: Lane, /) -> None:
        """Something of it is done."""

    def covers(self, lane: Lane, promise: Promise, value: Any, error: BaseException | None, /) -> None:
        """It has read a checkpoint, which may be gone when that is asked again.

        The promise is settled, and the lane opened, once that never happens.
        """


@attrs.define(eq=False)
class Held:
    """A request between its arrival and its turn.

    Args:
        since: when it came.
    """

    ask: Ask
    promise: Promise
    since: float = attrs.Factory(trio.current_time)

    @property
    def durable(self) -> bool:
        """Whether it is certain that it was asked."""
        return self.promise.accepted.is_set()


@attrs.define(eq=False)
class Lane:
    """The order of one training model's requests, which are numbered from 0, its creation.

    A number that was given before gets the same promise again. One that comes early waits for those before it; if
    they do not come within the gap time, they are given up and the rest goes on.

    Args:
        model_id: whose requests.
        owner: whose model.
        snapshots: take those of its model.
        next: the number that comes next.
        told: whether its hint has been logged.
        running: what has had its turn and is not settled.
        reading: the number of a request that reads a checkpoint, on which all others wait.
        broken: why the state of the model is lost, if it is.
    """

    model_id: str
    owner: str
    door: Door
    promises: Promises
    durable: Durable
    snapshots: Keeper
    next: int = 0
    held: dict[int, Held] = attrs.Factory(dict)
    given_up: set[int] = attrs.Factory(set)
    told: bool = False
    running: dict[int, Promise] = attrs.Factory(dict)
    reading: int | None = None
    broken: RequestFailedError | None = None
    _due: deque[Held] = attrs.Factory(deque)
    _shut: bool = False
    _ended: bool = False
    _at_end: Callable[[], None] | None = None

    def request_id(self, seq_id: int) -> str:
        """Name a request: the same number, the same name, whatever became of it."""
        return request_id(self.model_id, seq_id)

    def check_number(self, seq_id: int) -> None:
        """Refuse a number that is no successor of any.

        Raises:
            HttpError: 422.
        """
        if not 1 <= seq_id <= self.next + MOST_AHEAD:
            raise HttpError(422, f"seq_id: {seq_id} where about {self.next} is expected; numbers start at 1")

    def seen(self, seq_id: int) -> bool:
        """Whether a number has been taken before."""
        return seq_id in self.held or (seq_id < self.next and seq_id not in self.given_up)

    def check_room(self, seq_id: int, weight: int, limit: int) -> None:
        """Refuse a request for which there is no room; never the next one, on which others wait.

        Raises:
            HttpError: 429.
        """
        full = self.promises.weight(self.owner) + weight > limit or len(self.held) >= MOST_HELD
        if full and seq_id > self.next:
            raise HttpError(429, "too much is in flight: fetch results first", {"retry-after": "1"})
        if self.promises.weight(self.owner) > limit:
            raise HttpError(429, f"more than {limit} tokens are in flight: fetch results first", {"retry-after": "1"})

    def take(
        self, seq_id: int, kind: Kind, make: Callable[[], Ask], also: Callable[[], Sequence[Record]] = tuple
    ) -> Promise | None:
        """Take a request in and return its promise; None if its number was taken before and its result is gone.

        Args:
            make: gives the request, or what is wrong with it.
            also: gives what is written to the journal together with it.
        """
        if self.seen(seq_id):
            return self.promises.find(self.request_id(seq_id), self.owner)
        if seq_id in self.given_up:
            return self._late(seq_id, kind)
        ask = make()
        weight = ask.tokens if isinstance(ask, Request) else 0
        place = (self.model_id, seq_id)
        promise = self.promises.make(self.request_id(seq_id), self.owner, kind, weight, place)
        self.held[seq_id] = Held(ask, promise)
        payload = ask.payload if isinstance(ask, Request) else ask
        self.durable.accept(promise, payload, lambda: self._taken(seq_id, promise), also())
        return promise

    def skip(self, gap_seconds: float) -> None:
        """Give up missing numbers for which others have waited long enough."""
        if not self.held or self.next in self.held:
            return
        if trio.current_time() - min(held.since for held in self.held.values()) < gap_seconds:
            return
        first = min(self.held)
        self.durable.note(SkippedRecord(self.model_id, self.next, first - 1))
        self.given_up.update(range(self.next, first))
        self.given_up = {number for number in self.given_up if number > first - MOST_AHEAD}
        self.next = first
        self._go_on()

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be run."""
        return not self._due and self.next not in self.held

    def shut(self) -> None:
        """Run nothing more until ``open``."""
        self._shut = True

    def open(self) -> None:
        """Go on."""
        self._shut, self.reading = False, None
        self._go_on()

    def resume(self, due: Sequence[Held], early: Sequence[Held]) -> None:
        """Take in what an earlier run of the server has accepted: what is to run next, and what waits for a number."""
        self._due.extend(due)
        for held in early:
            assert held.promise.place is not None
            self.held[held.promise.place[1]] = held

    def after(self, request: Request, promise: Promise) -> None:
        """Post a request of no number, a sample; while the lane is shut, as soon as it opens."""
        if self._shut and self.broken is None:
            self._due.append(Held(request, promise))
        elif self.broken is not None:
            promise.fail(self.broken)
        else:
            self.door.post(request, promise)

    def break_off(self, why: RequestFailedError) -> None:
        """Fail all that was and will be asked: the state of the model is lost."""
        self.broken = why
        self.open()

    def end(self, then: Callable[[], None]) -> None:
        """Fail what waits for numbers that have not come, and call ``then`` once all else has been posted."""
        self._at_end, self._ended = then, True
        self._go_on()

    def _late(self, seq_id: int, kind: Kind) -> Promise:
        self.given_up.discard(seq_id)
        promise = self.promises.make(self.request_id(seq_id), self.owner, kind)
        promise.fail(InvalidRequestError(f"request {seq_id} came after its turn was given up: send it as a new one"))
        return promise

    def _taken(self, seq_id: int, promise: Promise) -> None:
        if promise.refusal is not None:
            self.held.pop(seq_id, None)
            self.promises.drop(promise, promise.refusal)
        self._go_on()

    def _go_on(self) -> None:
        while self.next in self.held and self.held[self.next].durable:
            self._due.append(self.held.pop(self.next))
            self.next += 1
        if self.broken is not None:  # no number will come to its turn any more
            lost = [number for number, held in self.held.items() if held.durable]
            self._due.extend(self.held.pop(number) for number in lost)
        while self._due and not self._shut:
            self._run(self._due.popleft())
        if self._ended:
            self._finish()

    def _finish(self) -> None:
        for number in [number for number, held in self.held.items() if held.durable and number > self.next]:
            why = InvalidRequestError(f"the model was let go before request {self.next} came")
            self.held.pop(number).promise.fail(why)
        if self._at_end is not None and not self._due and self.next not in self.held:
            then, self._at_end = self._at_end, None
            then()

    def _run(self, held: Held) -> None:
        ask, promise = held.ask, held.promise
        if promise.settled.is_set():
            return  # the server was stopping
        if promise.place is not None and promise.place[0] == self.model_id:
            number = promise.place[1]
            self.running[number] = promise
            promise.then(lambda _: self._settled(number))
        if self.broken is not None:
            promise.fail(self.broken)
        elif isinstance(ask, Request):
            self._post(ask, promise)
        else:
            promise.fail(ask)

    def _settled(self, number: int) -> None:
        del self.running[number]
        self.snapshots.settled(self)

    def _post(self, ask: Request, promise: Promise) -> None:
        if promise.place is not None and promise.place[0] == self.model_id:
            ask.number = promise.place[1]
        if self.durable.on and reads_checkpoint(ask.payload):
            # What follows it may overwrite the checkpoint.
            self._shut, self.reading = True, ask.number
            promise.keep = lambda promise, value, error: self.snapshots.covers(self, promise, value, error)
        self.door.post(ask, promise)


def request_id(key: str, number: int) -> str:
    """Name a request of a training model or a sampler."""
    return f"{key}:r{number}"
