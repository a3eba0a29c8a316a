"""LoRA of several adapters on one packed batch of rows."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from tickwork_kernels import support
from tickwork_kernels.registry import Choice, Implementation, Registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The Triton kernels count in 64 bits from tile to tile, and in 32 bits within a tile or an adapter.
MOST_FEATURES, MOST_RANKS = 2**20, 2**10


class LoraSegment(NamedTuple):
    """Consecutive tokens of a packed batch that share an adapter.

    Args:
        start: first token.
        stop: one past the last token.
        a: ``[r, d_in]``, float32 or of the input's dtype, or None where the base alone applies.
        b: ``[d_out, r]``, likewise.
        scale: factor of ``b @ a``.
        grad_a: ``[r, d_in]`` float32, to which the backward pass adds the gradient of ``a`` where ``a`` requires
            one; autograd then returns none for ``a``. None leaves the gradient to autograd.
        grad_b: ``[d_out, r]`` float32, the same for ``b``.
    """

    start: int
    stop: int
    a: torch.Tensor | None
    b: torch.Tensor | None
    scale: float
    grad_a: torch.Tensor | None = None
    grad_b: torch.Tensor | None = None


@dataclass(frozen=True)
class MultiLoraCase:
    """The arguments of ``multi_lora``, for the choice between its implementations."""

    x: torch.Tensor
    y: torch.Tensor
    segments: Sequence[LoraSegment]


class MultiLoraImplementation(Implementation[MultiLoraCase], Protocol):
    """One way to compute ``multi_lora``."""

    def run(self, x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment]) -> torch.Tensor:
        """Compute it for arguments that were checked."""


MULTI_LORA = Registry[MultiLoraImplementation]("multi_lora", "tickwork_kernels.multi_lora")


def multi_lora(
    x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment], *, impl: str = "auto"
) -> torch.Tensor:
    """Add each segment's low-rank product to the base output.

    Semantics: ``y[s:t] + scale * x[s:t] @ a.T @ b.T`` for each segment, with ``a`` and ``b`` rounded to ``x``'s dtype.
    What comes out for a segment does not depend on the others. An adapter may have several segments; its gradients
    add up.

    Args:
        x: input of the base projection, ``[T, d_in]``.
        y: its output, ``[T, d_out]``, of ``x``'s dtype; not changed.
        segments: covering ``0..T`` in order; ranks may differ, and segments may be empty.
        impl: ``"torch"``, ``"triton"`` or another registered name; ``"auto"`` takes the preferred one.

    Returns:
        ``[T, d_out]`` of ``y``'s dtype.

    Raises:
        ValueError: an argument does not fit; says which.
        NotImplementedError: the implementation named can not run this case.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    implementation = explain_multi_lora(x, y, segments, impl).implementation
    if not torch.is_autocast_enabled(x.device.type):
        return implementation.run(x, y, segments)
    with torch.autocast(x.device.type, enabled=False):  # it would change dtypes here and there
        return implementation.run(x, y, segments)


def explain_multi_lora(
    x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment], impl: str = "auto"
) -> Choice[MultiLoraImplementation]:
    """Return which implementation ``multi_lora`` would take for these arguments, and why; raises what it raises."""
    _check_rows(x, y, segments)
    for index, segment in enumerate(segments):
        _check_adapter(x, y, segment, f"segments[{index}]")
    return MULTI_LORA.choose(MultiLoraCase(x, y, segments), impl)


def _check_rows(x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment]) -> None:
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be [T, d_in] of a floating dtype, not {list(x.shape)} {x.dtype}")
    if y.dim() != 2 or len(y) != len(x) or y.dtype != x.dtype or y.device != x.device:
        wanted, got = f"[{len(x)}, d_out] {x.dtype} on {x.device}", f"{list(y.shape)} {y.dtype} on {y.device}"
        raise ValueError(f"y must be {wanted} as x is, not {got}")
    end = 0
    for index, segment in enumerate(segments):
        if segment.start != end or segment.stop < segment.start:
            span = f"{segment.start}..{segment.stop}"
            raise ValueError(f"segments must cover 0..{len(x)} in order, but segments[{index}] is {span} after {end}")
        end = segment.stop
    if end != len(x):
        raise ValueError(f"segments must cover 0..{len(x)}, but end at {end}")


def _check_adapter(x: torch.Tensor, y: torch.Tensor, segment: LoraSegment, name: str) -> None:
    a, b = segment.a, segment.b
    if a is None or b is None:
        if a is not b or segment.grad_a is not None or segment.grad_b is not None:
            raise ValueError(
                f"{name}.a and {name}.b must be both given or both None, and None with no grad_a or grad_b"
            )
        return
    rank = a.shape[0] if a.dim() == 2 else 0
    if rank < 1:
        raise ValueError(f"{name}.a must be [r, {x.shape[1]}] with a rank of 1 or more, not {list(a.shape)}")
    _check_tensor(a, (rank, x.shape[1]), (torch.float32, x.dtype), x.device, f"{name}.a")
    _check_tensor(b, (y.shape[1], rank), (torch.float32, x.dtype), x.device, f"{name}.b")
    for letter, grad, of in (("a", segment.grad_a, a), ("b", segment.grad_b, b)):
        if grad is not None:
            _check_tensor(grad, tuple(of.shape), (torch.float32,), x.device, f"{name}.grad_{letter}")
            if not grad.is_contiguous():
                raise ValueError(f"{name}.grad_{letter} must be contiguous, not of strides {grad.stride()}")


def _check_tensor(
    tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device, name: str
) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        wanted = f"{list(shape)} {' or '.join(map(str, dict.fromkeys(dtypes)))} on {device}"
        raise ValueError(f"{name} must be {wanted}, not {list(tensor.shape)} {tensor.dtype} on {tensor.device}")


class _Torch:
    """Segment by segment in plain torch: the reference."""

    name = "torch"

    def why_not(self, case: MultiLoraCase) -> str | None:
        """Runs everywhere."""
        return None

    def preference(self, case: MultiLoraCase) -> int:
        """Preferred where no compiled kernel runs."""
        return 0

    def run(self, x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment]) -> torch.Tensor:
        """Add each segment's product with three calls of its own."""
        if not segments:
            return y
        if len(segments) == 1:
            return _segment(x, y, segments[0])
        # Split rather than slice: the backward of a slice fills a tensor of the whole batch with zeros.
        sizes = [segment.stop - segment.start for segment in segments]
        return torch.cat([_segment(*part) for part in zip(x.split(sizes), y.split(sizes), segments, strict=True)])


def _segment(x: torch.Tensor, y: torch.Tensor, segment: LoraSegment) -> torch.Tensor:
    if segment.a is None or segment.b is None:
        return y
    a = _collected(segment.a, segment.grad_a)
    b = _collected(segment.b, segment.grad_b)
    low = x @ a.to(x.dtype).T
    return torch.addmm(y, low, b.to(x.dtype).T, alpha=segment.scale)


def _collected(tensor: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """Return the tensor, with its gradient diverted into a buffer where there is one."""
    return tensor if into is None else _Collected.apply(tensor, into)  # type: ignore[no-untyped-call]


class _Collected(torch.autograd.Function):
    """A tensor as it is, whose gradient goes into a buffer and no further."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Return the tensor and remember the buffer."""
        ctx.into = into
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        """Add the gradient to the buffer."""
        ctx.into.add_(grads[0])
        return None, None


class _Triton:
    """All segments in one launch per step, by kernels of this package."""

    name = "triton"

    def why_not(self, case: MultiLoraCase) -> str | None:
        """Runs on CUDA, and on CPU in Triton's interpreter; not in float64."""
        if case.x.dtype == torch.float64:
            return "x must be float32, bfloat16 or float16, not torch.float64"
        if max(case.x.shape[1], case.y.shape[1]) > MOST_FEATURES:
            return f"x and y may have up to {MOST_FEATURES} features, not {case.x.shape[1]} and {case.y.shape[1]}"
        if any(segment.a is not None and segment.a.shape[0] > MOST_RANKS for segment in case.segments):
            return f"segments may have ranks up to {MOST_RANKS}"
        return support.why_no_triton(case.x.device)

    def preference(self, case: MultiLoraCase) -> int:
        """Preferred on CUDA; in the interpreter, which is for tests, only by name."""
        return 10 if case.x.device.type == "cuda" else -1

    def run(self, x: torch.Tensor, y: torch.Tensor, segments: Sequence[LoraSegment]) -> torch.Tensor:
        """Hand over to the kernels, which need triton to be imported."""
        module = importlib.import_module("tickwork_kernels.multi_lora_autograd")
        with support.on_device(x.device):
            out: torch.Tensor = module.run(x, y, segments)
        return out


MULTI_LORA.register(_Torch())
MULTI_LORA.register(_Triton())
