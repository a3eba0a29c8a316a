"""``Bases``: the base models of a device, each with its budget of tokens."""

from __future__ import annotations

import torch

from tickwork.compute.budget import DEFAULT, Budget, find_budget, most
from tickwork.compute.memory import is_there
from tickwork.compute.model import DTYPES, BaseModel
from tickwork.errors import ModelLoadError
from tickwork.models import locate


class Bases:
    """Loads base models when they are first named.

    Args:
        device: where they run.
        dtype: of their weights, ``"float32"`` or ``"bfloat16"``; None means float32 on CPU, bfloat16 on CUDA.
        max_tokens: tokens of one pass; None finds how many fit, for each base model.
        invariant: whether nothing but ``max_tokens``, or 4096, may say where requests are cut.
        checkpoint_activations: see ``BaseModel``.

    Room: the device thread; ``max_tokens`` may be read by any.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: str | None,
        max_tokens: int | None,
        invariant: bool,
        checkpoint_activations: bool,
    ) -> None:
        self._device, self._invariant = device, invariant
        self._dtype = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
        self._given = DEFAULT if invariant and max_tokens is None else max_tokens
        self._checkpoint_activations = checkpoint_activations
        self._loaded: dict[str, BaseModel] = {}

    @property
    def max_tokens(self) -> int:
        """Tokens that one pass may hold now: as many as go through the base model that takes the fewest."""
        found = [base.budget.tokens for base in tuple(self._loaded.values())]
        return min(found, default=self._given or most(self._device))

    def get(self, name: str) -> BaseModel:
        """Return a base model.

        Raises:
            ModelLoadError: the device is not there, or see ``BaseModel``.
        """
        if not is_there(self._device):
            raise ModelLoadError(f"device {self._device} is not there; torch sees {torch.cuda.device_count()} of CUDA")
        locate(name)  # refuses what is no name, which could not even be looked up
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> BaseModel:
        again = self._checkpoint_activations
        base = BaseModel(name, self._device, self._dtype, checkpoint_activations=again)
        base.budget = find_budget(base) if self._given is None else Budget(self._given, fixed=self._invariant)
        return base
