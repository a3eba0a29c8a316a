"""``Sampler``: many sampling requests on one base model, joining and leaving between decode steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from tickwork.compute.cache import KVPool
from tickwork.compute.draw import Draw, Strand, open_draw
from tickwork.compute.failure import failure, out_of_memory
from tickwork.compute.lora import Adapter
from tickwork.compute.model import BaseModel
from tickwork.compute.next_tokens import Ready, next_tokens
from tickwork.compute.rows import Row, pack
from tickwork.engine.request import Outcome, Request
from tickwork.errors import CapacityError, RequestCancelledError
from tickwork.models import load_tokenizer


class Sampler:
    """Runs prefill and decoding of all its requests through the same packed forward as training.

    Args:
        base: the base model.
        max_tokens: tokens of one forward; longer prompts are prefilled in chunks, so that decoding goes on.
        max_cached: positions the cache may come to hold; further requests wait, and are taken in order.
        invariant: give each request forwards and a cache of its own, so that its tokens and logprobs are to the bit
            those that it has alone, under the same ``max_tokens``. Otherwise requests share each forward, whose shape
            may round a logprob differently in the last bits.

    Room: the device thread.
    """

    def __init__(self, base: BaseModel, max_tokens: int, max_cached: int = 2**18, *, invariant: bool = False) -> None:
        self._base = base
        self._max_tokens = max_tokens
        self._max_cached = self._limit = max_cached
        self._shared = None if invariant else KVPool()
        self._waiting: deque[Draw] = deque()
        self._active: list[Draw] = []

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._active)

    def admit(self, request: Request, adapter: Adapter | None) -> None:
        """Take a request in; it joins at the next step that has room.

        Raises:
            InvalidRequestError: naming the field.
        """
        base = self._base
        draw = open_draw(
            request, adapter, base.vocab_size, base.context, base.stop_ids, lambda ids: _decode(base.name, ids)
        )
        if draw.stop.strings:
            load_tokenizer(base.name)  # a missing tokenizer is this request's error, not a later step's
        self._waiting.append(draw)

    def decode(self, seconds: float, nudged: Callable[[], bool]) -> list[Outcome]:
        """Run steps for about that long, at least one; stop early with the first outcomes, or when nudged."""
        until = time.perf_counter() + seconds
        outcomes = self.step()
        while self.busy and not outcomes and not nudged() and time.perf_counter() < until:
            outcomes = self.step()
        return outcomes

    def step(self) -> list[Outcome]:
        """Drop what was cancelled, let others join, and draw one token for each sequence whose prompt is through."""
        outcomes = self._drop_cancelled()
        self._join()
        if not self._forwards():
            outcomes += self._make_room()
        return outcomes + [self._end(draw) for draw in self._active[:] if draw.done]

    def _forwards(self) -> bool:
        """Run the forwards of one step; False where memory ran out, which leaves what they had not done for later."""
        try:
            for draws in self._groups():
                self._forward(draws)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _groups(self) -> list[list[Draw]]:
        """Return which requests share a forward."""
        if self._shared is None:
            return [[draw] for draw in self._active]
        return [self._active] if self._active else []

    def _drop_cancelled(self) -> list[Outcome]:
        gone = [draw for draw in (*self._active, *self._waiting) if draw.request.cancelled]
        for draw in gone:
            self._leave(draw)
        return [Outcome(d.request, error=RequestCancelledError("the sampling request was cancelled")) for d in gone]

    def _join(self) -> None:
        if not self._active:  # what did not fit beside others has had its turn
            self._limit = self._max_cached
        held = sum(draw.held for draw in self._active)
        while self._waiting:
            draw = self._waiting[0]
            needed = draw.payload.num_samples * draw.reach
            if self._active and held + needed > self._limit:
                return
            held += needed
            self._active.append(self._waiting.popleft())
            draw.pool = draw.pool if self._shared is None else self._shared
            draw.strands = [
                Strand(draw.pool.acquire(), draw.random(index)) for index in range(draw.payload.num_samples)
            ]

    def _leave(self, draw: Draw) -> None:
        draw.pool.release([strand.slot for strand in draw.strands if strand.reason is None], draw.reach)
        for line in (self._active, self._waiting):
            if draw in line:
                line.remove(draw)

    def _end(self, draw: Draw) -> Outcome:
        self._leave(draw)
        try:
            return Outcome(draw.request, value=draw.answer())
        except Exception as error:
            return Outcome(draw.request, error=failure(error))

    def _make_room(self) -> list[Outcome]:
        """After running out of memory: start the newest request over later, or fail it if it is alone."""
        draw = self._active[-1]
        alone = len(self._active) == 1
        self._leave(draw)
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()
        if alone:
            reach, count = draw.reach, draw.payload.num_samples
            error = CapacityError(
                f"{count} sequences of up to {reach} tokens do not fit into the memory left on {self._base.device}; "
                "lower num_samples or max_tokens"
            )
            return [Outcome(draw.request, error=error)]
        self._waiting.appendleft(draw.afresh())
        self._limit = max(1, sum(other.held for other in self._active))
        if self._shared is not None:  # or the others would have to find room for what it had grown to
            self._shared.shrink(max(strand.length for other in self._active for strand in other.strands))
        return []

    @torch.no_grad()
    def _forward(self, draws: Sequence[Draw]) -> None:
        """Run one forward of requests that share a cache."""
        work, pool = list(self._work(draws)), draws[0].pool
        rows = [row for _, _, row in work]
        pool.reserve(max(row.start + len(row.tokens) for row in rows))
        packed = pack(rows, self._base.device, pool)
        hidden = self._base.hidden(packed)
        ready: list[Ready] = []
        for (draw, strand, row), (start, stop) in zip(work, packed.spans, strict=True):
            if strand is not None:
                ready.append((draw, strand, stop - 1))
                continue
            self._score(draw, row, hidden[start:stop])
            if len(row.tokens) == draw.unfilled:
                ready += [(draw, each, stop - 1) for each in self._fork(draw)]
        ready.sort(key=lambda each: each[2])  # packed rows are in order of adapters
        drawn = next_tokens(ready, hidden, self._base.head)
        # Only here do draws change: what runs out of memory before is done again.
        for draw, strand, row in work:
            self._advance(draw, strand, row)
        for (draw, strand, _), (token, logprob, ranked) in zip(ready, drawn, strict=True):
            try:
                draw.take(strand, token, logprob, ranked)
            except Exception as error:
                draw.error = failure(error)
        stopped = [strand.slot for _, strand, _ in ready if strand.reason]
        if stopped:
            pool.release(stopped, max(draw.reach for draw in draws))

    def _work(self, draws: Sequence[Draw]) -> Iterator[tuple[Draw, Strand | None, Row]]:
        """Yield the rows of one forward: a token for each sequence, then as much of the prompts as fits."""
        room = self._max_tokens
        for draw in draws:
            for strand in draw.strands if draw.decoding else ():
                if strand.reason is None:
                    room -= 1
                    token = np.array(strand.tokens[-1:], dtype=np.int64)
                    yield draw, strand, Row(token, draw.adapter, strand.length, strand.slot)
        room = max(room, self._max_tokens // 4, 1)  # or a large decode batch would keep prompts out
        for draw, count in _shares([draw for draw in draws if not draw.decoding], room):
            part = np.array(draw.payload.prompt[draw.prefilled : draw.prefilled + count], dtype=np.int64)
            yield draw, None, Row(part, draw.adapter, draw.prefilled, draw.strands[0].slot)

    def _fork(self, draw: Draw) -> list[Strand]:
        """Give every sequence of a request the prompt's keys and values."""
        first, *others = draw.strands
        draw.pool.fork(first.slot, [strand.slot for strand in others], len(draw.payload.prompt))
        return draw.strands

    def _advance(self, draw: Draw, strand: Strand | None, row: Row) -> None:
        if strand is not None:
            strand.length += 1
            return
        draw.prefilled += len(row.tokens)
        for each in draw.strands:
            each.length = draw.prefilled

    def _score(self, draw: Draw, row: Row, hidden: torch.Tensor) -> None:
        """Look at the prompt tokens that follow this part's positions."""
        begin = max(row.start + 1, draw.prompt.first())
        end = min(row.start + len(row.tokens) + 1, len(draw.payload.prompt))
        if begin < end:
            draw.prompt.read(hidden[begin - 1 - row.start : end - 1 - row.start], begin, self._base.head, draw.head)


def _shares(filling: list[Draw], room: int) -> Iterator[tuple[Draw, int]]:
    """Yield how much of each prompt comes next: half the room is the oldest's, the rest goes to the shortest first.

    So a long prompt does not keep short ones out, nor many short ones it.
    """
    if not filling:
        return
    oldest, *others = filling
    spare = room - sum(draw.unfilled for draw in others)
    parts = [(oldest, max(-(-room // 2), spare))] + [
        (draw, room) for draw in sorted(others, key=lambda draw: draw.unfilled)
    ]
    for draw, most in parts:
        count = min(draw.unfilled, most, room)
        room -= count
        if count:
            yield draw, count


def _decode(name: str, ids: list[int]) -> str:
    return str(load_tokenizer(name).decode(ids, skip_special_tokens=False))
