"""From a case to its job, and the import of modules that register more kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from bench.kernels import adamw, head, losses, multi_lora
from bench.kernels.cases import ADAMW, HEAD, LOSSES, MULTI_LORA, Case
from bench.kernels.job import Job

BUILDERS: dict[str, Callable[[Case, torch.device], Job]] = {
    HEAD: head.build,
    LOSSES: losses.build,
    ADAMW: adamw.build,
    MULTI_LORA: multi_lora.build,
}


def build(case: Case, device: torch.device) -> Job:
    """Make inputs on the device and list who is to be measured."""
    return BUILDERS[case.operation](case, device)


def load(plugins: Sequence[str]) -> None:
    """Import modules, which register what they bring."""
    for name in plugins:
        import_module(name)
