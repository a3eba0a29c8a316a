"""The head in float64, for all rows or a few of them, without more of the weight in float64 than a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.kernels.inputs import HeadInputs

BLOCK = 8192


@dataclass(frozen=True)
class Exact:
    """Logprobs ``[n]``, their gradients for hidden ``[n, D]`` and, of all rows alone, for the adapter."""

    logprobs: torch.Tensor
    hidden: torch.Tensor
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None


def exact(inputs: HeadInputs, rows: torch.Tensor, upstream: torch.Tensor) -> Exact:
    """Compute some rows from the same rounded inputs.

    Args:
        rows: ``[n]`` which.
        upstream: ``[n]`` of these rows.
    """
    hidden, targets, lora = inputs.hidden.detach()[rows].double(), inputs.targets[rows], inputs.lora
    logits = torch.cat([hidden @ block.double().T for block in inputs.weight.split(BLOCK)], 1)
    if lora is not None:
        a, b = lora.a.detach().double(), lora.b.detach().double() * lora.scale
        logits += hidden @ a.T @ b.T
    logprobs = logits.log_softmax(1)
    place = torch.arange(len(rows), device=rows.device), targets
    slope = logprobs.exp().neg_()
    slope[place] = -logprobs[place].expm1()
    slope *= upstream.double()[:, None]
    parts = zip(slope.split(BLOCK, 1), inputs.weight.split(BLOCK), strict=True)
    gradient = torch.zeros_like(hidden)
    for part, block in parts:
        gradient += part @ block.double()
    if lora is None:
        return Exact(logprobs[place], gradient)
    low = slope @ b
    adapter = (low.T @ hidden, slope.T @ (hidden @ a.T) * lora.scale)
    return Exact(logprobs[place], gradient + low @ a, adapter)


def row_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest relative L2 error of a row."""
    size = wanted.norm(dim=1).clamp(min=1e-30)
    return float(((found.double() - wanted).norm(dim=1) / size).max())


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative L2 error of a whole tensor."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
