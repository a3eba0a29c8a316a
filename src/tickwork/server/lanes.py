"""``Lane``: brings the requests of one training model, which arrive in any order, into that of their numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import attrs
import trio

from tickwork.engine.portal import Portal
from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError, QueueFullError, TickworkError
from tickwork.server.answers import HttpError
from tickwork.server.promises import Kind, Promise, Promises

# Early requests that one lane holds; a client that skips that many numbers is not chunking a batch.
MOST_HELD = 4096
# How far ahead of its lane a number may be.
MOST_AHEAD = 2**16

# A request, or what is wrong with it: its number is used up either way.
Ask = Request | TickworkError


class Door:
    """Posts requests to the engine in the order they are given, and holds them back while it is full."""

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._waiting: deque[tuple[Request, Promise]] = deque()
        self._changed = trio.Event()

    def post(self, request: Request, promise: Promise) -> None:
        """Post a request; its promise follows it."""
        if not self._waiting and self._posted(request, promise):
            return
        self._waiting.append((request, promise))
        self._changed.set()

    def forget(self, request: Request) -> None:
        """Post a clean-up past all bounds."""
        self._portal.drop(request)

    async def run(self) -> None:
        """Post what was held back, as the engine gets room."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while self._waiting:
                request, promise = self._waiting[0]
                try:
                    promise.follow(await self._portal.submit_async(request))
                except TickworkError as error:
                    promise.fail(error)
                self._waiting.popleft()

    def _posted(self, request: Request, promise: Promise) -> bool:
        try:
            promise.follow(self._portal.submit(request))
        except QueueFullError:
            return False
        except TickworkError as error:
            promise.fail(error)
        return True


@attrs.define(eq=False)
class Lane:
    """The order of one training model's requests, which are numbered from 1.

    A number that was given before gets the same promise again. One that comes early waits for those before it; if
    they do not come within the gap time, they are given up and the rest goes on.

    Args:
        model_id: whose requests.
        owner: whose model.
        told: whether its hint has been logged.
    """

    model_id: str
    owner: str
    door: Door
    promises: Promises
    next: int = 1
    held: dict[int, tuple[Ask, Promise, float]] = attrs.Factory(dict)
    given_up: set[int] = attrs.Factory(set)
    told: bool = False

    def request_id(self, seq_id: int) -> str:
        """Name a request: the same number, the same name, whatever became of it."""
        return f"{self.model_id}:r{seq_id}"

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

    def take(self, seq_id: int, kind: Kind, make: Callable[[], Ask]) -> str:
        """Take a request in and return its id.

        Args:
            make: gives the request, or what is wrong with it.
        """
        request_id = self.request_id(seq_id)
        if self.seen(seq_id):
            return request_id
        ask = make()
        weight = ask.tokens if isinstance(ask, Request) else 0
        promise = self.promises.make(request_id, self.owner, kind, weight)
        if seq_id in self.given_up:
            self.given_up.discard(seq_id)
            late = f"request {seq_id} came after its turn was given up: send it as a new one"
            promise.fail(InvalidRequestError(late))
        elif seq_id > self.next:
            self.held[seq_id] = (ask, promise, trio.current_time())
        else:
            self._run(ask, promise)
            self._go_on()
        return request_id

    def skip(self, gap_seconds: float) -> None:
        """Give up missing numbers for which others have waited long enough."""
        if not self.held or trio.current_time() - min(since for _, _, since in self.held.values()) < gap_seconds:
            return
        first = min(self.held)
        self.given_up.update(range(self.next, first))
        self.given_up = {number for number in self.given_up if number > first - MOST_AHEAD}
        self.next = first
        self._go_on()

    def end(self) -> None:
        """Fail what waits for numbers that will not come any more."""
        held, self.held = self.held, {}
        for _, promise, _ in held.values():
            promise.fail(InvalidRequestError(f"its training model was let go before request {self.next} came"))

    def _go_on(self) -> None:
        while self.next in self.held:
            ask, promise, _ = self.held.pop(self.next)
            self._run(ask, promise)

    def _run(self, ask: Ask, promise: Promise) -> None:
        self.next += 1
        if promise.settled.is_set():
            return  # the server was stopping
        if isinstance(ask, Request):
            self.door.post(ask, promise)
        else:
            promise.fail(ask)
