"""What is measured: operations at shapes, and the presets that list them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

HEAD, LOSSES, ADAMW, MULTI_LORA = "head", "losses", "adamw", "multi_lora"
OPERATIONS = (HEAD, LOSSES, ADAMW, MULTI_LORA)
SEGMENTS = 16


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Args:
        operation: one of ``OPERATIONS``.
        n, d, v: of the head and of losses: tokens, hidden size, vocabulary. Of ``adamw``: adapters, tensors of each,
            elements of a tensor on average. Of ``multi_lora``: tokens, features in, features out.
        dtype: of weights and inputs.
        rank: of the adapters; 0 for a head without one.
        seed: of the inputs.
    """

    operation: str
    n: int
    d: int
    v: int
    dtype: str = "bfloat16"
    rank: int = 0
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def at(self, n: int, d: int, v: int) -> Case:
        """Return the same at another shape."""
        return replace(self, n=n, d=d, v=v)

    @property
    def name(self) -> str:
        """For tables and file names."""
        rank = f"-r{self.rank}" if self.rank else ""
        return f"{self.operation}-{self.n}x{self.d}x{self.v}{rank}-{self.dtype}"


@dataclass(frozen=True)
class Preset:
    """Cases, and how they are timed.

    Args:
        cases: what is measured, the most wanted first.
        rounds: of the interleaved providers.
        pause: seconds before each measurement, in which other providers' OpenMP threads stop spinning.
        matmul: side of the product by which the rate of matmuls is measured.
        copied: bytes of the copy by which the bandwidth is measured.
    """

    cases: Sequence[Case]
    rounds: int
    pause: float
    matmul: int
    copied: int


PRESETS = {
    "smoke": Preset(
        (
            Case(HEAD, 64, 32, 512, "float32"),
            Case(HEAD, 64, 32, 512, "float32", rank=4),
            Case(LOSSES, 64, 32, 512, "float32"),
            Case(ADAMW, 2, 3, 1000, "float32"),
            Case(MULTI_LORA, 64, 32, 48, "float32", rank=4),
        ),
        rounds=2,
        pause=0.0,
        matmul=256,
        copied=2**22,
    ),
    "cpu": Preset(
        (
            Case(HEAD, 1024, 512, 65536, "float32"),
            Case(HEAD, 1024, 512, 65536, "bfloat16"),
            Case(HEAD, 1024, 512, 65536, "float32", rank=16),
            Case(LOSSES, 1024, 256, 16384, "float32"),
            Case(ADAMW, 16, 500, 1024, "float32"),
            Case(MULTI_LORA, 2048, 1024, 1024, "float32", rank=32),
        ),
        rounds=5,
        pause=0.3,
        matmul=2048,
        copied=2**28,
    ),
    "gpu": Preset(
        (
            Case(HEAD, 8192, 4096, 151936),
            Case(HEAD, 8192, 1024, 151936),
            Case(HEAD, 8192, 2048, 128256),
            Case(ADAMW, 16, 500, 50_000, "float32"),
            Case(MULTI_LORA, 8192, 4096, 12288, rank=32),
            Case(MULTI_LORA, 8192, 4096, 4096, rank=32),
            Case(HEAD, 8192, 2048, 128256, rank=32),
            Case(LOSSES, 8192, 1024, 151936),
        ),
        rounds=20,
        pause=0.02,
        matmul=8192,
        copied=2**30,
    ),
}
