"""The models that clients share, and what is wanted of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from bench.workloads import make_qwen06b, make_qwen40m, make_qwen205k
from tickwork.models import locate

RANK = 8
ROWS = 4
# So many clients at once where the cost of being invariant, and rows of varied lengths, are measured.
MANY = 8


@attrs.frozen
class Case:
    """One base model and what is asked of it.

    Args:
        model: writes the model into a folder, or finds it, and returns the folder.
        vocab: token ids are drawn below it.
        clients: how many at once, in turn.
        varied: of those, where rows of varied lengths are measured as well.
        sampled: how many sampling clients at once, in turn.
        wanted: clients -> least ratio of merged to one by one, in tokens trained on a second.
        length: tokens of a row, of which a client has ``ROWS``.
        rounds: at most so many, where a turn takes long.
    """

    key: str
    name: str
    model: Callable[[Path], Path | str]
    vocab: int
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    varied: tuple[int, ...] = (MANY,)
    sampled: tuple[int, ...] = (1, 4, 8, 16)
    wanted: Mapping[int, float] = attrs.Factory(dict)
    length: int = 64
    parts: tuple[str, ...] = ("training", "sampling")
    rounds: int = 99
    device: str = "cpu"

    def make(self, folder: Path) -> str:
        """Return the model's folder."""
        return str(self.model(folder / self.key))

    def lengths(self, varied: bool) -> list[int]:
        """Tokens of each row of a client: all equal, or from a quarter to seven quarters of that."""
        quarters = (1, 3, 5, 7) if varied else (4,) * ROWS
        return [self.length * part // 4 for part in quarters]


_ALL = (
    Case("qwen205k", "random 205k", make_qwen205k, 1024, wanted={8: 2.5}),
    Case(
        "tiny",
        "tiny 2M",
        lambda _: locate("tickwork/tiny"),
        256,
        wanted={8: 1.8},
        parts=("training", "sampling", "memory"),
    ),
    Case(
        "qwen40m",
        "random 41M",
        make_qwen40m,
        32000,
        clients=(1, 8),
        sampled=(8,),
        wanted={8: 1.1},
        rounds=3,
    ),
    Case(
        "qwen06b",
        "random 0.6B",
        make_qwen06b,
        151936,
        clients=(1, 16),
        varied=(),
        sampled=(16,),
        wanted={16: 4.0},
        length=128,
        device="cuda",
    ),
)
CASES = {case.key: case for case in _ALL}
