"""What the machine offers: whether Triton kernels can run, compiled or interpreted."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch


def interpreting() -> bool:
    """Whether Triton runs in its interpreter: ``TRITON_INTERPRET=1``, set before the first kernel is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


def why_no_triton(device: torch.device) -> str | None:
    """Return why Triton kernels can not run on tensors of a device; None where they can."""
    if not has_triton():
        return "triton is not installed (pip install triton)"
    if device.type == "cuda" and not interpreting():
        return None
    if interpreting():
        if device.type != "cpu":
            return "the Triton interpreter (TRITON_INTERPRET=1) takes CPU tensors only"
        return _why_no_interpreter()
    return f"Triton kernels do not run on {device.type}; on CPU only interpreted, with TRITON_INTERPRET=1 set"


@cache
def _why_no_interpreter() -> str | None:
    if find_spec("numpy") is None:
        return "the Triton interpreter needs numpy (pip install 'numpy<2.4')"
    if version("triton").startswith("3.6.") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
        return "the interpreter of triton 3.6 needs numpy below 2.4 (pip install 'numpy<2.4', or a later triton)"
    return None


def refuse_second_derivatives() -> None:
    """Raise in a backward that is itself to be differentiated: its result would silently lack that part.

    Raises:
        NotImplementedError: always, under ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError("create_graph: second derivatives are not supported; call without create_graph=True")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one: Triton launches there, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
