"""Tests of the Triton kernels of ``multi_lora`` in Triton's interpreter, in a process where it is switched on."""

from __future__ import annotations

import pytest
import torch

from tickwork_kernels import support
from tickwork_kernels.conformance.multi_lora import Check, Problem, checks
from tickwork_kernels.multi_lora import explain_multi_lora, multi_lora

CPU = torch.device("cpu")
# The interpreter turns one-element arrays into loop bounds in a way that numpy is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
if support.why_no_triton(CPU) is not None:
    pytest.skip("needs triton and TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in checks()])
def test_triton(check: Check) -> None:
    """The kernels fulfil what every implementation must."""
    check("triton", CPU)


def test_the_interpreter_runs_only_by_name() -> None:
    """On the CPU the reference stays preferred, though the kernels could run."""
    problem = Problem(((4, 2, 0),), CPU)
    choice = explain_multi_lora(problem.x, problem.y, problem.segments)
    assert (choice.name, dict(choice.refused)) == ("torch", {})


def test_an_adapter_changed_between_the_passes_is_an_error() -> None:
    """The backward pass reads the adapters again, so that a change in between is not silent."""
    problem = Problem(((4, 2, 0),), CPU)
    out = multi_lora(problem.x, problem.y, problem.segments, impl="triton")
    with torch.no_grad():
        problem.leaves["a0"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
