"""``PromptScores``: what a sampling request wants to know of its prompt, filled in part by part."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import torch

from tickwork.errors import InvalidRequestError
from tickwork.requests import Sample
from tickwork.results import PromptAltTokens
from tickwork.tensors import TensorData
from tickwork_kernels import Head, Lora, head_logits, hold_logprobs

Ranked = list[tuple[int, float]]

# Logits that are held at once.
HELD_LOGITS = 2**22
# Cells of target_prompt_logprobs, and draws of prompt_alt_tokens_k, that one request may ask for.
MOST_CELLS = 2**22
# Sets the random numbers of alternatives apart from those of the sequences.
ALTERNATIVES = 2**32


@attrs.define(eq=False)
class PromptScores:
    """Scores of one prompt; row ``i`` of targets and alternatives belongs to position ``i + 1``.

    Args:
        scores: logprob of each prompt token scored so far, by position.
        ranked: most likely tokens at each prompt position scored so far.
        cells: ``[n, 3]`` row, token and place in the answer of each target that is asked for.
    """

    payload: Sample
    temperature: float
    seed: int
    cells: np.ndarray
    found: np.ndarray
    alternatives: np.ndarray
    alternative_scores: np.ndarray
    scores: dict[int, float] = attrs.Factory(dict)
    ranked: dict[int, Ranked] = attrs.Factory(dict)

    @classmethod
    def of(cls, payload: Sample, temperature: float, seed: int, vocab_size: int) -> PromptScores:
        """Check what is asked of a prompt and make room for it.

        Raises:
            InvalidRequestError: naming the field.
        """
        rows = len(payload.prompt) - 1
        k = payload.prompt_alt_tokens_k
        whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
        if not whole or not 0 <= k * rows <= MOST_CELLS or k < 0:
            raise InvalidRequestError(f"{k!r}; from 0, and at most {MOST_CELLS} in all", field="prompt_alt_tokens_k")
        cells, count = _cells(payload.target_prompt_logprobs, rows, vocab_size)
        drawn = np.zeros((rows, k), dtype=np.int64)
        return cls(payload, temperature, seed, cells, np.zeros(count, np.float32), drawn, drawn.astype(np.float32))

    def first(self) -> int:
        """The first position to look at; the prompt's length where none is."""
        return 1 if len(self.cells) or self.payload.prompt_alt_tokens_k else self._first_scored()

    def read(self, states: torch.Tensor, begin: int, head: Head, lora: Lora | None) -> None:
        """Look at positions from ``begin``, each given the hidden state before it: ``[n, hidden]``."""
        skipped = max(0, self._first_scored() - begin)
        if skipped < len(states):
            self._score(states[skipped:], begin + skipped, head, lora)
        if not (self.payload.topk_prompt_logprobs or len(self.cells) or self.payload.prompt_alt_tokens_k):
            return
        for at, logits in _logits(states, head, lora):
            logp = logits.log_softmax(-1)
            self._rank(logp, begin + at)
            self._look_up(logp, begin + at - 1)
            self._draw(logits, logp, begin + at - 1)

    def prompt_logprobs(self) -> list[float | None] | None:
        """Return a score for each prompt token, if asked for."""
        if not self.payload.include_prompt_logprobs:
            return None
        return [self.scores.get(i) for i in range(len(self.payload.prompt))]

    def topk(self) -> list[Ranked | None] | None:
        """Return the most likely tokens at each position, if asked for."""
        if not self.payload.topk_prompt_logprobs:
            return None
        return [self.ranked.get(i) for i in range(len(self.payload.prompt))]

    def targets(self) -> TensorData | None:
        """Return the scores of the tokens that were named, in the layout they were named in."""
        asked = self.payload.target_prompt_logprobs
        if asked is None:
            return None
        return TensorData(self.found, "float32", asked.shape, asked.sparse_crow_indices, asked.sparse_col_indices)

    def alt_tokens(self) -> PromptAltTokens | None:
        """Return what was drawn beside the prompt, if asked for."""
        if not self.payload.prompt_alt_tokens_k:
            return None
        return PromptAltTokens(TensorData.from_numpy(self.alternatives), TensorData.from_numpy(self.alternative_scores))

    def sound(self) -> bool:
        """Whether every score is a number."""
        ranked = [value for row in self.ranked.values() for _, value in row]
        parts = (list(self.scores.values()), ranked, self.found, self.alternative_scores)
        return not any(np.isnan(part).any() for part in parts)

    def _first_scored(self) -> int:
        length, last = len(self.payload.prompt), self.payload.prompt_logprobs_last_n
        if not self.payload.include_prompt_logprobs and not self.payload.topk_prompt_logprobs:
            return length
        return max(1, 0 if last is None else length - last)

    def _score(self, states: torch.Tensor, begin: int, head: Head, lora: Lora | None) -> None:
        tokens = self.payload.prompt[begin : begin + len(states)]
        targets = torch.tensor(tokens, device=states.device)[:, None]
        logprobs = hold_logprobs(states, targets, head, lora).logprobs[:, 0].tolist()
        self.scores.update(zip(range(begin, begin + len(states)), logprobs, strict=True))

    def _rank(self, logp: torch.Tensor, begin: int) -> None:
        if not self.payload.topk_prompt_logprobs:
            return
        skipped = min(len(logp), max(0, self._first_scored() - begin))
        for index, ranked in enumerate(rank(logp[skipped:], self.payload.topk_prompt_logprobs)):
            self.ranked[begin + skipped + index] = ranked

    def _look_up(self, logp: torch.Tensor, row: int) -> None:
        low, high = np.searchsorted(self.cells[:, 0], (row, row + len(logp)))
        if low < high:
            rows, tokens = (torch.tensor(part, device=logp.device) for part in (self.cells[low:high, :2] - (row, 0)).T)
            self.found[self.cells[low:high, 2]] = logp[rows, tokens].cpu().numpy()

    def _draw(self, logits: torch.Tensor, logp: torch.Tensor, row: int) -> None:
        k = self.payload.prompt_alt_tokens_k
        if not k:
            return
        if self.temperature == 0:
            tokens = logits.argmax(-1, keepdim=True).expand(-1, k)
        else:
            sums = torch.softmax(logits.double() / self.temperature, -1).cumsum(-1)
            random = [np.random.default_rng([self.seed, ALTERNATIVES, row + i]).random(k) for i in range(len(logits))]
            uniforms = torch.tensor(np.array(random), device=logits.device)
            tokens = torch.searchsorted(sums, uniforms * sums[:, -1:], right=True).clamp_max(logits.shape[1] - 1)
        self.alternatives[row : row + len(logits)] = tokens.cpu().numpy()
        self.alternative_scores[row : row + len(logits)] = logp.gather(1, tokens).cpu().numpy()


def rank(logp: torch.Tensor, count: int) -> list[Ranked]:
    """Return the ``count`` most likely ``(id, logprob)`` of each row of ``[n, V]``."""
    values, ids = logp.topk(count, -1)
    return [list(zip(row, val, strict=True)) for row, val in zip(ids.tolist(), values.tolist(), strict=True)]


def _logits(states: torch.Tensor, head: Head, lora: Lora | None) -> Iterator[tuple[int, torch.Tensor]]:
    size = max(1, HELD_LOGITS // head.weight.shape[0])
    for at in range(0, len(states), size):
        yield at, head_logits(states[at : at + size], head, lora)


def _cells(asked: TensorData | None, rows: int, vocab_size: int) -> tuple[np.ndarray, int]:
    """Return row, token and place of each target that is asked for, by rows, and how many places there are."""
    if asked is None:
        return np.zeros((0, 3), dtype=np.int64), 0
    tokens = np.asarray(asked.data)
    rule = f"int64 of shape [{rows}, K], each a token id below {vocab_size} or -1"
    good = asked.dtype == "int64" and len(asked.shape) == 2 and asked.shape[0] == rows and tokens.size <= MOST_CELLS
    if not good or (tokens.size and not -1 <= tokens.min() <= tokens.max() < vocab_size):
        raise InvalidRequestError(rule, field="target_prompt_logprobs")
    if asked.sparse_crow_indices is None:
        where = np.repeat(np.arange(rows), asked.shape[1])
    else:
        where = np.repeat(np.arange(rows), np.diff(asked.sparse_crow_indices))
    places = np.flatnonzero(tokens >= 0)
    return np.stack([where[places], tokens[places].astype(np.int64), places], 1), tokens.size
