"""The models and batches that the benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np

from tickwork.models import locate
from tickwork.types import AdamParams, Datum, ModelInput

RANK = 16
ADAM = AdamParams(learning_rate=1e-4)
# Seconds between two measurements: the other way's OpenMP threads must have stopped spinning.
PAUSE = 0.3


@attrs.frozen
class Workload:
    """A base model and one batch.

    Args:
        key: what ``by_name`` calls it.
        name: what the tables call it.
        model: folder of the base model.
        rows: token ids of each row, one longer than the model input.
        prompts: tokens of each row that carry no loss.
    """

    key: str
    name: str
    model: str
    rows: list[np.ndarray]
    prompts: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(len(row) - 1 for row in self.rows)

    def data(self) -> list[Datum]:
        """Return the batch for cross_entropy."""
        return [
            Datum(
                ModelInput.from_ints(row[:-1].tolist()),
                {
                    "target_tokens": row[1:],
                    "weights": (np.arange(1, len(row)) >= prompt).astype(np.float32),
                },
            )
            for row, prompt in zip(self.rows, self.prompts, strict=True)
        ]


def tiny(lengths: str) -> Workload:
    """The shipped model: 64 rows, of 24 tokens or of 16 to 40, the first 12 a prompt."""
    rows = _rows(64, (24, 24) if lengths == "equal" else (16, 40), 256)
    return Workload(f"tiny-{lengths}", f"tiny 2M, 64 {lengths} rows", locate("tickwork/tiny"), rows, [12] * len(rows))


def qwen40m(lengths: str, folder: Path) -> Workload:
    """A random 41M-parameter Qwen3: 8 rows, of 128 tokens or of 64 to 192, the first 32 a prompt."""
    rows = _rows(8, (128, 128) if lengths == "equal" else (64, 192), 32000)
    return Workload(f"qwen40m-{lengths}", f"random 41M, 8 {lengths} rows", str(folder), rows, [32] * len(rows))


def by_name(key: str, model: str) -> Workload:
    """Return a workload in another process than the one that made its model."""
    name, lengths = key.split("-")
    return tiny(lengths) if name == "tiny" else qwen40m(lengths, Path(model))


def _rows(count: int, lengths: tuple[int, int], vocab: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = np.linspace(lengths[0], lengths[1], count).astype(int)
    return [random.integers(0, vocab, size + 1) for size in random.permutation(sizes)]


def qwen3_8k(size: str, model: str) -> Workload:
    """A random Qwen3 of a published size: 8 rows of 1024 tokens, the first 32 a prompt."""
    rows = _rows(8, (1024, 1024), 151936)
    return Workload(f"qwen3-{size}", f"random Qwen3-{size}, 8k tokens", model, rows, [32] * len(rows))


def make_qwen40m(folder: Path) -> Path:
    """Write the random 41M-parameter model's folder and return it."""
    return _make_qwen3(folder, hidden=512, inner=1536, layers=8, heads=8, vocab=32000, tied=True)


def make_qwen205k(folder: Path) -> Path:
    """Write the folder of a random Qwen3 of 205k parameters, on which everything but computing shows; return it."""
    return _make_qwen3(folder, hidden=64, inner=128, layers=2, heads=4, vocab=1024, tied=False)


def make_qwen06b(folder: Path) -> Path:
    """Write the folder of a Qwen3-0.6B with random weights in bfloat16 and return it."""
    return _make_qwen3(folder, hidden=1024, inner=3072, layers=28, heads=16, vocab=151936, tied=True, published=True)


def make_qwen8b(folder: Path) -> Path:
    """Write the folder of a Qwen3-8B with random weights in bfloat16, 16 GB, and return it."""
    return _make_qwen3(folder, hidden=4096, inner=12288, layers=36, heads=32, vocab=151936, tied=False, published=True)


def _make_qwen3(
    folder: Path, *, hidden: int, inner: int, layers: int, heads: int, vocab: int, tied: bool, published: bool = False
) -> Path:
    """Write a model; those of a published size have heads as those do, and are made on the device that they need."""
    import torch  # noqa: PLC0415
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        body: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        shape: dict[str, Any] = {
            "num_attention_heads": heads,
            "num_key_value_heads": 8 if published else heads // 2,
            "head_dim": 128 if published else hidden // heads,
        }
        rest: dict[str, Any] = {"vocab_size": vocab, "tie_word_embeddings": tied, "max_position_embeddings": 2048}
        config = Qwen3Config(**body, **shape, **rest)
        if published:
            with torch.device("cuda"):
                model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)  # noqa: SLF001  no public name
        else:
            model = Qwen3ForCausalLM(config)
        model.save_pretrained(folder)
    return folder
