"""What others offer for the same work, each behind one small adapter: imported when asked for, absent with a reason.

An adapter returns logprobs ``[N]`` that are differentiable for any upstream or, where it takes a scalar one only, their
sum. None of them is a dependency.

Sources of the calls: torch.nn.functional.linear_cross_entropy (torch 2.13), linkedin/Liger-Kernel,
apple/ml-cross-entropy, Dao-AILab/quack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from bench.kernels.inputs import HeadInputs

Forward = Callable[[HeadInputs], torch.Tensor]
TORCH_CHUNK = 256


class AbsentError(Exception):
    """An anchor is not here; says why."""


@dataclass(frozen=True)
class Anchor:
    """A provider that may be missing.

    Args:
        name: for the table.
        load: returns its forward, or raises ``AbsentError``.
        upstream: ``"vector"`` or ``"scalar"``.
    """

    name: str
    load: Callable[[], Forward]
    upstream: str = "vector"


def named(module: str, name: str, package: str) -> Any:
    """Return what a package defines, or say that it is not installed, or too old."""
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise AbsentError(f"{package} is not installed, or misses something: {error}") from error
    except AttributeError as error:
        raise AbsentError(f"{name} is not in this {package}") from error


def torch_chunked(**options: Any) -> Callable[[], Forward]:
    """Torch's own, its rows in chunks; recomputes the logits in its backward."""

    def load() -> Forward:
        function = named("torch.nn.functional", "linear_cross_entropy", f"torch {torch.__version__}")
        chosen = named("torch.nn", "LinearCrossEntropyOptions", f"torch {torch.__version__}")(**options)
        return lambda x: _negated(function(x.hidden, x.weight, x.targets, reduction="none", options=chosen))

    return load


def liger(reduction: str) -> Callable[[], Forward]:
    """Liger's fused linear cross-entropy; before July 2026 its ``reduction="none"`` had wrong gradients."""

    def load() -> Forward:
        module = "liger_kernel.ops.fused_linear_cross_entropy"
        function = named(module, "LigerFusedLinearCrossEntropyFunction", "liger_kernel")
        # In order: bias, class weight, ignore_index, z-loss, label smoothing, reduction.
        fixed = (None, None, -100, 0.0, 0.0, reduction)
        return lambda x: _negated(function.apply(x.hidden, x.weight, x.targets, *fixed))

    return load


def liger_scaled() -> Forward:
    """Liger's per-token loss with a temperature, the nearest thing to this package's logprobs."""
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = named(module, "LigerFusedLinearScaledCrossEntropyFunction", "liger_kernel")
    return lambda x: _negated(function.apply(x.hidden, x.weight, x.targets))


def cut(impl: str) -> Callable[[], Forward]:
    """Apple's cut cross-entropy; ``"cce"`` leaves out small gradients, ``"cce_exact"`` none."""

    def load() -> Forward:
        function = named("cut_cross_entropy", "linear_cross_entropy", "cut_cross_entropy")
        return lambda x: _negated(function(x.hidden, x.weight, x.targets, reduction="none", impl=impl))

    return load


def quack(name: str) -> Callable[[], Forward]:
    """One of quack's two, which take a scalar upstream."""

    def load() -> Forward:
        function = named("quack.linear_cross_entropy", name, "quack")
        return lambda x: _negated(function(x.hidden, x.weight, x.targets, reduction="sum"))

    return load


def _negated(losses: Any) -> torch.Tensor:
    """Return logprobs of losses, which some return with other things beside them."""
    first: torch.Tensor = losses[0] if isinstance(losses, tuple) else losses
    return -first.float()


ANCHORS = (
    Anchor("torch-chunked", torch_chunked()),
    Anchor(f"torch-chunked-{TORCH_CHUNK}", torch_chunked(batch_chunk_size=TORCH_CHUNK)),
    Anchor("liger", liger("none")),
    Anchor("liger-scaled", liger_scaled),
    Anchor("liger-sum", liger("sum"), "scalar"),
    Anchor("cce", cut("cce")),
    Anchor("cce-exact", cut("cce_exact")),
    Anchor("quack", quack("chunked_linear_cross_entropy"), "scalar"),
    Anchor("quack-scaled-exp", quack("scaled_exp_linear_cross_entropy"), "scalar"),
)
