"""Tests of the step of all adapters at once: the reference against the checks, bad input, choice, exact masters."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tickwork_kernels.adamw import (
    ADAMW,
    ADAMW_BLOCK,
    AdamWArena,
    AdamWCase,
    AdamWReport,
    AdamWSettings,
    AdamWState,
    adamw_steps,
    explain_adamw,
    join_master,
    split_master,
)
from tickwork_kernels.conformance.adamw import checks
from tickwork_kernels.support import interpreting

CPU = torch.device("cpu")
USUAL = {"step": 1, "learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


@pytest.mark.parametrize(("name", "check"), checks(), ids=[name for name, _ in checks()])
def test_the_reference_conforms(name: str, check: Callable[[str, torch.device], None]) -> None:
    check("torch", CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.inf),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", math.nan),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("clip_norm", 0.0),
        ("clip_norm", math.nan),
        ("grad_multiplier", math.inf),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        AdamWSettings(**{**USUAL, name: value})


def test_eps_may_be_zero_and_the_clip_norm_infinite() -> None:
    assert AdamWSettings(**{**USUAL, "eps": 0.0, "clip_norm": math.inf}).eps == 0


def changed(**tensors: torch.Tensor | None) -> list[AdamWState]:
    """Return two float32 states of five parameters, the second with some tensors changed."""
    states = AdamWArena([5, 5]).states
    for name, tensor in tensors.items():
        setattr(states[1], name, tensor)
    return states


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "param of two dimensions": ({"param": torch.zeros(5, 1)}, r"states\[1\].param must be \[P\]"),
    "param of another dtype": (
        {"param": torch.zeros(5, dtype=torch.float16)},
        r"states\[1\].param must be \[P\] float32",
    ),
    "param strided": ({"param": torch.zeros(10)[::2]}, r"states\[1\].param must be contiguous.*not strided"),
    "grad of another length": ({"grad": torch.zeros(4)}, r"states\[1\].grad must be contiguous \[5\]"),
    "grad of another dtype": ({"grad": torch.zeros(5, dtype=torch.bfloat16)}, r"states\[1\].grad must be .*float32"),
    "grad strided": ({"grad": torch.zeros(10)[::2]}, r"states\[1\].grad must be contiguous.*not strided"),
    "grad elsewhere": ({"grad": torch.zeros(5, device="meta")}, r"states\[1\].grad must be .* on cpu, not .* on meta"),
    "moment of another dtype": ({"exp_avg": torch.zeros(5).double()}, r"states\[1\].exp_avg must be"),
    "moment of another length": ({"exp_avg_sq": torch.zeros(6)}, r"states\[1\].exp_avg_sq must be"),
    "float32 with a master": ({"master": torch.zeros(5)}, r"states\[1\].master must be None"),
    "float32 with a remainder": ({"remainder": torch.zeros(5).short()}, r"states\[1\].remainder must be None"),
    "bfloat16 with neither": ({"param": torch.zeros(5).bfloat16()}, r"states\[1\]: .* one of master and remainder"),
    "bfloat16 with both": (
        {"param": torch.zeros(5).bfloat16(), "master": torch.zeros(5), "remainder": torch.zeros(5).short()},
        r"states\[1\]: .* one of master and remainder, not 2",
    ),
    "master of another dtype": (
        {"param": torch.zeros(5).bfloat16(), "master": torch.zeros(5).bfloat16()},
        r"states\[1\].master must be .*float32",
    ),
    "remainder of another dtype": (
        {"param": torch.zeros(5).bfloat16(), "remainder": torch.zeros(5).int()},
        r"states\[1\].remainder must be .*int16",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=list(BAD))
def test_bad_tensors_are_named(tensors: dict[str, Any], message: str) -> None:
    states = changed(**tensors)
    for call in (adamw_steps, explain_adamw):
        with pytest.raises(ValueError, match=message):
            call(states, [AdamWSettings(**USUAL)] * 2)


def test_one_settings_for_each_state() -> None:
    with pytest.raises(ValueError, match="settings must be one for each state, not 1 for 2"):
        adamw_steps(changed(), [AdamWSettings(**USUAL)])


def test_no_tensor_twice() -> None:
    states = changed()
    with pytest.raises(
        ValueError, match=r"states\[2\].param must have memory of its own, not that of states\[0\].param"
    ):
        adamw_steps([*states, states[0]], [AdamWSettings(**USUAL)] * 3)
    states[1].grad = states[1].exp_avg
    with pytest.raises(
        ValueError, match=r"states\[1\].exp_avg must have memory of its own, not that of states\[1\].grad"
    ):
        adamw_steps(states, [AdamWSettings(**USUAL)] * 2)


def test_bad_arguments_of_an_arena() -> None:
    for dtype, exact in (
        (torch.float32, "master"),
        (torch.bfloat16, None),
        (torch.bfloat16, "both"),
    ):
        with pytest.raises(ValueError, match="exact must be"):
            AdamWArena([5], dtype=dtype, exact=exact)
    with pytest.raises(ValueError, match="sizes must not be negative"):
        AdamWArena([5, -1])


def test_an_arena_pads_and_its_states_are_views() -> None:
    arena = AdamWArena([0, 5, ADAMW_BLOCK, ADAMW_BLOCK + 1], dtype=torch.bfloat16, exact="remainder")
    assert arena.starts == [0, 0, ADAMW_BLOCK, 2 * ADAMW_BLOCK]
    assert {name: len(tensor) for name, tensor in arena.arenas.items()} == dict.fromkeys(
        ("param", "grad", "exp_avg", "exp_avg_sq", "remainder"), 4 * ADAMW_BLOCK
    )
    assert [state.param.numel() for state in arena.states] == [0, 5, ADAMW_BLOCK, ADAMW_BLOCK + 1]
    arena.states[3].grad[0] = 1
    assert arena.arenas["grad"].nonzero().item() == 2 * ADAMW_BLOCK
    assert arena.states[1].kind == "remainder"


def test_parameters_that_require_a_gradient_step() -> None:
    states = changed(param=torch.nn.Parameter(torch.ones(5)), grad=torch.ones(5))
    adamw_steps(states, [AdamWSettings(**USUAL)] * 2)
    torch.testing.assert_close(states[1].param.detach(), torch.full((5,), 1 - 1e-3))


def test_every_float_survives_in_16_and_16_bits() -> None:
    ends = torch.arange(2**16, dtype=torch.int32)
    for top in (0, 1, 0x7F, 0x3F80, 0x3F81, 0x7F7F, 0x8000, 0xBF80, 0xBF81, 0xFF7F):
        master = ((top << 16) - (2**32 if top >= 2**15 else 0) + ends).to(torch.int32).view(torch.float32)
        param, remainder = split_master(master)
        assert torch.equal(join_master(param, remainder).view(torch.int32), master.view(torch.int32))
        nearest = master.to(torch.bfloat16)
        tie = ends == 0x8000
        assert torch.equal(param[~tie], nearest[~tie])
        assert param[tie].abs() > master[tie].abs()
    param, remainder = split_master(torch.tensor([math.inf, -math.inf, math.nan]))
    assert torch.equal(param[:2], torch.tensor([math.inf, -math.inf], dtype=torch.bfloat16))
    assert bool(param[2].isnan()) and bool(join_master(param, remainder)[2].isnan())


def test_auto_takes_torch_on_cpu_and_says_why() -> None:
    choice = explain_adamw(changed(), [AdamWSettings(**USUAL)] * 2)
    assert choice.name == "torch" and "torch" in choice.why
    if not interpreting():
        assert "triton" in choice.refused


def test_an_unknown_implementation_is_named() -> None:
    for states in (changed(), []):
        with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
            adamw_steps(states, [AdamWSettings(**USUAL)] * len(states), impl="nope")


@pytest.mark.skipif(interpreting(), reason="the interpreter runs Triton on CPU")
def test_triton_on_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(NotImplementedError, match=r"impl='triton': .*; able to run this adamw: 'torch'"):
        adamw_steps(changed(), [AdamWSettings(**USUAL)] * 2, impl="triton")


def test_a_registered_implementation_is_chosen_by_preference() -> None:
    class Eager:
        name = "eager"

        def why_not(self, case: AdamWCase) -> str | None:
            return None if case.zero_grad else "zero_grad must be True"

        def preference(self, case: AdamWCase) -> int:
            return 100

        def run(self, case: AdamWCase) -> AdamWReport:
            return AdamWReport(torch.full((len(case.states),), 42.0), torch.ones(len(case.states), dtype=torch.bool))

    ADAMW.register(Eager())
    try:
        settings = [AdamWSettings(**USUAL)] * 2
        assert adamw_steps(changed(), settings).norms.tolist() == [42, 42]
        assert adamw_steps(changed(), settings, zero_grad=False).norms.tolist() == [0, 0]
    finally:
        ADAMW.unregister("eager")


def test_triton_is_not_imported_until_it_is_used() -> None:
    code = "import sys, tickwork_kernels.adamw, tickwork_kernels.conformance.adamw; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=100).returncode == 0
