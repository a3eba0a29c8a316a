"""Adapters: one flat arena of LoRA parameters each, and the projections that apply them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from tickwork.types import LoraConfig
from tickwork_kernels import Lora, lora_linear

if TYPE_CHECKING:
    from tickwork.compute.rows import Packed

# ``W' = W + (32 / rank) * B @ A``: fixed, so that one learning rate serves all ranks.
ALPHA = 32
ATTENTION_PARTS = ("attn", "attention")


class LoraLinear(torch.nn.Module):
    """A frozen projection of the base, and whatever adapters the rows of the current pass bring.

    Args:
        base: ``nn.Linear`` or transformers' ``Conv1D``.
        path: its module path, which names its tensors in an adapter.
        current: holds the pass under way under the key ``packed``; shared by all projections of a model.
    """

    def __init__(self, base: torch.nn.Module, path: str, current: Mapping[str, Packed]) -> None:
        super().__init__()
        self.base = base
        weight: Any = base.weight
        self.weight: torch.Tensor = weight.detach().T if isinstance(base, Conv1D) else weight.detach()
        self.bias: torch.Tensor | None = base.bias  # type: ignore[assignment]
        self.path = path
        self.current = current

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``[..., d_in]`` to ``[..., d_out]``."""
        stacks = self.current["packed"].lora(self.path)
        if not stacks:
            y: torch.Tensor = self.base(x)
            return y
        y = lora_linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias, stacks, check=False)
        return y.view(*x.shape[:-1], -1)


class Adapter:
    """LoRA parameters of one model in one flat float32 arena.

    Args:
        shapes: module path -> ``(d_in, d_out)`` of every projection of the base.
        config: rank, seed and which projections to adapt.
        seed: seed of the initial values.
        device: where the arena lies.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], config: LoraConfig, seed: int, device: torch.device
    ) -> None:
        self.config, self.seed = config, seed
        self.scale = ALPHA / config.rank
        self.shapes = {path: shape for path, shape in shapes.items() if wanted(path, config)}
        sizes = [config.rank * (d_in + d_out) for d_in, d_out in self.shapes.values()]
        self.place(torch.zeros(sum(sizes), dtype=torch.float32, device=device))
        self._initialise()

    def place(self, arena: torch.Tensor) -> None:
        """Let the parameters be those of this arena, laid out as the one before."""
        self.arena = arena
        self.tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # Offset, rows and columns of ``a`` and ``b`` of each projection.
        self.places: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {}
        rank, offset = self.config.rank, 0
        for path, (d_in, d_out) in self.shapes.items():
            self.places[path] = (offset, rank, d_in), (offset + rank * d_in, d_out, rank)
            offset += rank * (d_in + d_out)
            a, b = (arena[at : at + rows * columns].view(rows, columns) for at, rows, columns in self.places[path])
            self.tensors[path] = a, b

    def _initialise(self) -> None:
        """A uniform in ``+-1/sqrt(d_in)`` whatever the rank, B zero; each tensor from a seed of its own."""
        with torch.no_grad():
            for path, (a, _) in self.tensors.items():
                digest = hashlib.sha256(f"{self.seed}:{path}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
                bound = a.shape[1] ** -0.5
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))

    def snapshot(self) -> Adapter:
        """Return a copy that later training does not touch."""
        copy = object.__new__(Adapter)
        copy.config, copy.seed, copy.scale, copy.shapes = self.config, self.seed, self.scale, self.shapes
        copy.place(self.arena.clone())
        return copy

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.arena.nbytes

    def move(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Lie in a copy of the arena from now on; where making it fails, nothing has changed."""
        self.place(copy(self.arena))

    @property
    def head(self) -> Lora | None:
        """The head's part, if the head is adapted."""
        path = self._head_path
        return None if path is None else Lora(*self.tensors[path], self.scale)

    def add_head(self, flat: torch.Tensor, grads: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add gradients of the head's ``a`` and ``b`` where they belong in an arena of this size."""
        assert self._head_path is not None
        for (at, rows, columns), grad in zip(self.places[self._head_path], grads, strict=True):
            flat[at : at + rows * columns].view(rows, columns).add_(grad)

    @property
    def _head_path(self) -> str | None:
        return next((path for path in self.tensors if is_head(path)), None)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors' views of an arena of this size: ``a`` and ``b`` of each projection in turn."""
        places = [place for pair in self.places.values() for place in pair]
        return [flat[at : at + rows * columns].view(rows, columns) for at, rows, columns in places]

    def named(self, arena: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return PEFT's names with views of this arena, or of another of its size (moments)."""
        names = [f"base_model.model.{path}.lora_{letter}.weight" for path in self.tensors for letter in "AB"]
        return dict(zip(names, self.split(self.arena if arena is None else arena), strict=True))


def is_head(path: str) -> bool:
    """Whether a projection is the head: in every causal model of transformers it alone lies at the top."""
    return "." not in path


def wanted(path: str, config: LoraConfig) -> bool:
    """Whether a configuration adapts the projection at ``path``."""
    if is_head(path):
        return config.train_unembed
    attention = any(word in part for part in path.split(".") for word in ATTENTION_PARTS)
    return config.train_attn if attention else config.train_mlp


def install(model: Any, current: Mapping[str, Packed]) -> dict[str, tuple[int, int]]:
    """Wrap every projection of the decoder's layers in a ``LoraLinear``; return path -> ``(d_in, d_out)``."""
    shapes: dict[str, tuple[int, int]] = {}
    head = model.get_output_embeddings()
    head_path = next(path for path, module in model.named_modules() if module is head)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], LoraLinear(module, path, current))
            shapes[path] = _features(module)
    shapes[head_path] = _features(head)  # last, as Trainable.accumulate expects
    return shapes


def _features(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (int(rows), int(columns)) if isinstance(module, Conv1D) else (int(columns), int(rows))
