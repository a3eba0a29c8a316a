"""What AdamW steps: an adapter's tensors and settings, the arena they lie in, and float32 masters in 16 + 16 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

# Elements that one program of the step kernel updates; an arena pads each adapter to a multiple of it.
ADAMW_BLOCK = 4096


# Of float32, in which the parameters are stepped.
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class AdamWSettings:
    """How one adapter steps.

    Args:
        step: number of this step of this adapter, from 1.
        learning_rate, beta1, beta2, eps, weight_decay: as ``torch.optim.AdamW`` takes them.
        clip_norm: the largest norm that the adapter's whole gradient may have, or None for no clipping.
        grad_multiplier: factor of the gradient, applied before its norm is taken.

    Raises:
        ValueError: a value is out of its range.
    """

    step: int
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float | None = None
    grad_multiplier: float = 1.0

    def __post_init__(self) -> None:
        self._demand("step", isinstance(self.step, int) and self.step >= 1, "an integer, 1 or more")
        for name in ("learning_rate", "eps", "weight_decay"):
            self._demand(name, 0 <= getattr(self, name) < math.inf, "finite and not negative")
        for name in ("beta1", "beta2"):
            self._demand(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._demand("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0, or None for no clipping")
        self._demand("grad_multiplier", math.isfinite(self.grad_multiplier), "finite")
        for name in ("eps", "clip_norm", "grad_multiplier"):
            size = abs(getattr(self, name) or 0.0)
            self._demand(name, size <= LARGEST or math.isinf(size), "within float32")
        factor = self.learning_rate / (1 - self.beta1**self.step)
        self._demand("learning_rate", factor <= LARGEST, "so small that the step is within float32")
        decay = self.learning_rate * self.weight_decay
        self._demand("weight_decay", decay <= LARGEST, "so small that its product with the rate is within float32")

    def adamw(self) -> Mapping[str, Any]:
        """Return the arguments of ``adamw_step``."""
        return {name: value for name, value in vars(self).items() if name not in ("clip_norm", "grad_multiplier")}

    def _demand(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)!r}")


@dataclass
class AdamWState:
    """The tensors of one adapter, contiguous and of one size ``[P]``.

    The optimizer always steps a float32 master. It is ``param`` itself where that is float32; a bfloat16 ``param``
    needs one of ``master`` and ``remainder``.

    Args:
        param: float32 or bfloat16.
        grad, exp_avg, exp_avg_sq: float32.
        master: float32; ``param`` becomes ``master`` rounded to nearest, ties to even.
        remainder: int16; ``(param, remainder)`` is the exact master, as ``join_master`` puts it together.
    """

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    master: torch.Tensor | None = None
    remainder: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """Where the master is: ``"float32"`` (the parameter itself), ``"master"`` or ``"remainder"``."""
        if self.remainder is not None:
            return "remainder"
        return "float32" if self.master is None else "master"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def read_master(self) -> torch.Tensor:
        """Return the float32 master, which for a remainder is a copy."""
        if self.remainder is not None:
            return join_master(self.param, self.remainder)
        return self.param if self.master is None else self.master

    def write_master(self, master: torch.Tensor) -> None:
        """Take back what ``read_master`` returned, changed in place: round ``param`` from it, keep its remainder."""
        if self.remainder is not None:
            param, remainder = split_master(master)
            self.param.copy_(param)
            self.remainder.copy_(remainder)
        elif self.master is not None:
            self.param.copy_(master)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float32 tensor as its nearest bfloat16 and its low 16 bits as int16: a state's param and remainder.

    Read as a signed number the low bits are the distance to the bfloat16, in units of the last place: from -2**15 to
    2**15 - 1. So a tie rounds away from zero. Ties to even have no inverse here: the floats half a step above and half
    a step below an even bfloat16 would both round to it, with equal low bits. A NaN becomes the canonical one.
    """
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(param: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the float32 master: its bits are those of ``param`` times 2**16 plus the signed ``remainder``, int32."""
    return ((param.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)


class AdamWArena:
    """The tensors of many adapters, each kind of tensor in one flat arena, zeros at first.

    Args:
        sizes: parameters of each adapter.
        dtype: of the parameters, float32 or bfloat16.
        exact: "master" or "remainder", what a bfloat16 parameter's master is kept in; None for float32.

    ``states`` are the adapters' views and ``arenas`` the whole tensors by name; adapter ``i`` begins at ``starts[i]``,
    a multiple of ``ADAMW_BLOCK``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        exact: str | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
        if exact not in (("master", "remainder") if dtype == torch.bfloat16 else (None,)):
            raise ValueError(f"exact must be 'master' or 'remainder' for bfloat16, None for float32, not {exact!r}")
        if any(size < 0 for size in sizes):
            raise ValueError(f"sizes must not be negative, not {list(sizes)}")
        dtypes = {"param": dtype} | dict.fromkeys(("grad", "exp_avg", "exp_avg_sq"), torch.float32)
        if exact is not None:
            dtypes[exact] = torch.float32 if exact == "master" else torch.int16
        *self.starts, total = accumulate((-(-size // ADAMW_BLOCK) * ADAMW_BLOCK for size in sizes), initial=0)
        self.arenas = {name: torch.zeros(total, dtype=each, device=device) for name, each in dtypes.items()}
        self.states = [self._view(start, size) for start, size in zip(self.starts, sizes, strict=True)]

    def _view(self, start: int, size: int) -> AdamWState:
        return AdamWState(**{name: arena[start : start + size] for name, arena in self.arenas.items()})


def check_states(states: Sequence[AdamWState]) -> None:
    """Raise a ValueError that names the first tensor which is not as ``AdamWState`` says."""
    owners: dict[int, str] = {}
    for index, state in enumerate(states):
        _check_kind(f"states[{index}]", state)
        for name, tensor in state.tensors().items():
            label = f"states[{index}].{name}"
            _check_tensor(label, name, tensor, state.param, states[0].param.device)
            if tensor.numel() and owners.setdefault(tensor.data_ptr(), label) != label:
                raise ValueError(f"{label} must have memory of its own, not that of {owners[tensor.data_ptr()]}")


def _check_kind(label: str, state: AdamWState) -> None:
    dtype, kept = state.param.dtype, [name for name in ("master", "remainder") if getattr(state, name) is not None]
    if dtype not in (torch.float32, torch.bfloat16) or state.param.dim() != 1:
        raise ValueError(f"{label}.param must be [P] float32 or bfloat16, not {list(state.param.shape)} {dtype}")
    if dtype == torch.float32 and kept:
        raise ValueError(f"{label}.{kept[0]} must be None: a float32 param is its own master")
    if dtype == torch.bfloat16 and len(kept) != 1:
        raise ValueError(f"{label}: a bfloat16 param must have one of master and remainder, not {len(kept)}")


def _check_tensor(label: str, name: str, tensor: torch.Tensor, param: torch.Tensor, device: torch.device) -> None:
    dtype = {"param": param.dtype, "remainder": torch.int16}.get(name, torch.float32)
    valid = tensor.shape == param.shape and tensor.dtype == dtype and tensor.device == device
    if not (valid and tensor.is_contiguous()):
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        found = f"{layout} {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{label} must be contiguous {list(param.shape)} {dtype} on {device}, not {found}")
