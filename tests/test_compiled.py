"""Every Triton kernel compiled for sm_90 without a GPU, against what was recorded."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

pytest.importorskip("triton")

from tickwork_kernels import compiled

RECORDED = json.loads(compiled.FILE.read_text())


def test_every_shipped_configuration_compiles_as_recorded() -> None:
    """No kernel has come to spill, to need more shared memory than there is, or to use other registers."""
    assert compiled.compare(compiled.measure(), RECORDED) == []


def test_matrix_kernels_use_the_tensor_cores() -> None:
    """Products of bfloat16 tiles compile to the warpgroup's instruction or, where tiles are small, the warp's."""
    for name, row in RECORDED["kernels"].items():
        if "bf16" in name and name.startswith(("down", "up", "outer")):
            assert row["products"] in ("wgmma", "mma"), name
        if name.startswith("gemm_fold-bfloat16"):
            assert row["products"] == "wgmma", name


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("spilled", 10**6, "spills"), ("shared", 10**6, "shared memory"), ("registers", 1, "recorded")],
)
def test_a_worse_kernel_is_found(field: str, value: int, says: str) -> None:
    """A change in any recorded number is a finding that names the kernel."""
    worse = deepcopy(RECORDED)
    name = next(iter(worse["kernels"]))
    worse["kernels"][name][field] = value
    findings = compiled.compare(worse, RECORDED)
    assert findings
    assert all(finding.startswith(name) for finding in findings)
    assert any(says in finding for finding in findings)


def test_new_and_lost_kernels_are_found() -> None:
    """A kernel that is not recorded, or recorded and gone, is a finding."""
    more = deepcopy(RECORDED)
    more["kernels"]["new"] = more["kernels"].pop(next(iter(RECORDED["kernels"])))
    assert len(compiled.compare(more, RECORDED)) == 2


def test_another_triton_is_held_to_spills_alone() -> None:
    """Registers differ from compiler to compiler; spilling does not become right by it."""
    other = deepcopy(RECORDED) | {"triton": "0.0"}
    name = next(iter(other["kernels"]))
    other["kernels"][name]["registers"] += 1
    assert compiled.compare(other, RECORDED) == []
    other["kernels"][name]["spilled"] += 8
    assert len(compiled.compare(other, RECORDED)) == 1
