"""``Sampler``: many sampling requests on one base model, joining and leaving between decode steps."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import numpy as np
import torch

from tickwork.compute.cache import KVPool
from tickwork.compute.choose import choose
from tickwork.compute.draw import Draw, Strand, open_draw
from tickwork.compute.failure import out_of_memory
from tickwork.compute.lora import Adapter
from tickwork.compute.model import BaseModel
from tickwork.compute.prompt import Ranked, rank
from tickwork.compute.rows import Row, pack
from tickwork.engine.request import Outcome, Request
from tickwork.errors import CapacityError, RequestCancelledError
from tickwork.models import load_tokenizer
from tickwork_kernels import head_logits

Drawn = tuple[Draw, Strand, int, float, Ranked | None]


class Sampler:
    """Runs prefill and decoding of all its requests through the same packed forward as training.

    Args:
        base: the base model.
        max_tokens: tokens of one forward; longer prompts are prefilled in chunks, so that decoding goes on.
        max_cached: positions the cache may come to hold; further requests wait.

    Room: the device thread.
    """

    def __init__(self, base: BaseModel, max_tokens: int, max_cached: int = 2**18) -> None:
        self._base = base
        self._max_tokens = max_tokens
        self._max_cached = max_cached
        self._pool = KVPool()
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
        """Drop what was cancelled, let others join, run one forward, draw one token for each sequence."""
        outcomes = self._drop_cancelled()
        self._join()
        if not self._active:
            return outcomes
        try:
            self._forward()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return outcomes + self._make_room()
        for draw in [draw for draw in self._active if draw.done]:
            self._leave(draw)
            outcomes.append(Outcome(draw.request, value=draw.answer()))
        return outcomes

    def _drop_cancelled(self) -> list[Outcome]:
        gone = [draw for draw in (*self._active, *self._waiting) if draw.request.cancelled]
        for draw in gone:
            self._leave(draw)
        return [Outcome(d.request, error=RequestCancelledError("the sampling request was cancelled")) for d in gone]

    def _join(self) -> None:
        while self._waiting:
            draw = self._waiting[0]
            held = sum(len(other.strands) * other.reach for other in self._active)
            if self._active and held + draw.payload.num_samples * draw.reach > self._max_cached:
                return
            self._active.append(self._waiting.popleft())
            draw.strands = [
                Strand(self._pool.acquire(), draw.random(index)) for index in range(draw.payload.num_samples)
            ]

    def _leave(self, draw: Draw) -> None:
        for strand in draw.strands:
            self._pool.release(strand.slot)
        for line in (self._active, self._waiting):
            if draw in line:
                line.remove(draw)

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
        self._max_cached = max(1, sum(len(other.strands) * other.reach for other in self._active))
        return []

    @torch.no_grad()
    def _forward(self) -> None:
        work = list(self._work())
        rows = [row for _, _, row in work]
        self._pool.reserve(max(row.start + len(row.tokens) for row in rows))
        packed = pack(rows, self._base.device, self._pool)
        hidden = self._base.hidden(packed)
        ready: list[tuple[Draw, Strand]] = []
        places: list[int] = []
        for (draw, strand, row), (start, stop) in zip(work, packed.spans, strict=True):
            if strand is None:
                self._score(draw, row, hidden[start:stop])
            if strand is not None or draw.prefilled + len(row.tokens) == len(draw.payload.prompt):
                fresh = [strand] if strand is not None else self._fork(draw)
                ready += [(draw, each) for each in fresh]
                places += [stop - 1] * len(fresh)
        drawn = self._draw(ready, places, hidden)
        # Only here do draws change: what runs out of memory before is done again.
        for draw, strand, row in work:
            self._advance(draw, strand, row)
        for draw, strand, token, logprob, ranked in drawn:
            draw.take(strand, token, logprob, ranked)

    def _work(self) -> Iterator[tuple[Draw, Strand | None, Row]]:
        """Yield the rows of one forward: a token for each sequence, then as much of the prompts as fits."""
        room = self._max_tokens
        for draw in self._active:
            for strand in draw.strands if draw.decoding else ():
                if strand.reason is None:
                    room -= 1
                    token = np.array(strand.tokens[-1:], dtype=np.int64)
                    yield draw, strand, Row(token, draw.adapter, strand.length, strand.slot)
        room = max(room, self._max_tokens // 4, 1)  # or a large decode batch would keep prompts out
        for draw in self._active:
            if not draw.decoding and room > 0:
                part = np.array(draw.payload.prompt[draw.prefilled : draw.prefilled + room], dtype=np.int64)
                room -= len(part)
                yield draw, None, Row(part, draw.adapter, draw.prefilled, draw.strands[0].slot)

    def _fork(self, draw: Draw) -> list[Strand]:
        """Give every sequence of a request the prompt's keys and values."""
        first, *others = draw.strands
        for strand in others:
            self._pool.fork(first.slot, strand.slot, len(draw.payload.prompt))
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
            lora = None if draw.adapter is None else draw.adapter.head
            draw.prompt.read(hidden[begin - 1 - row.start : end - 1 - row.start], begin, self._base.head, lora)

    def _draw(self, ready: list[tuple[Draw, Strand]], places: list[int], hidden: torch.Tensor) -> list[Drawn]:
        """Draw the next token of each ready sequence; those with equal adapter and settings together."""
        groups: dict[object, list[int]] = defaultdict(list)
        drawn: list[Drawn] = []
        for index, (draw, _) in enumerate(ready):
            groups[(id(draw.adapter), draw.recipe)].append(index)
        for members in groups.values():
            draws = [ready[i] for i in members]
            first = draws[0][0]
            states = hidden[torch.tensor([places[i] for i in members], device=hidden.device)]
            lora = None if first.adapter is None else first.adapter.head
            logits = head_logits(states, self._base.head, lora)
            uniforms = torch.tensor([strand.uniform() for _, strand in draws], dtype=torch.float64)
            tokens, logp = choose(logits, uniforms.to(hidden.device), first.recipe)
            drawn += self._describe(draws, tokens, logp)
        return drawn

    def _describe(self, draws: list[tuple[Draw, Strand]], tokens: torch.Tensor, logp: torch.Tensor) -> Iterator[Drawn]:
        chosen = logp.gather(1, tokens[:, None])[:, 0].tolist()
        most = max(draw.payload.topk_sample_logprobs for draw, _ in draws)
        ranked = rank(logp, most) if most else [[]] * len(draws)
        for (draw, strand), token, logprob, top in zip(draws, tokens.tolist(), chosen, ranked, strict=True):
            wanted = draw.payload.topk_sample_logprobs
            yield draw, strand, token, logprob, top[:wanted] if wanted else None


def _decode(name: str, ids: list[int]) -> str:
    return str(load_tokenizer(name).decode(ids, skip_special_tokens=False))
