"""AdamW in Triton: two launches for all adapters, one for the norms and one for the steps.

Neither uses atomics and every sum has a fixed order, so the result is the same at each repeat, and an adapter's does
not depend on which others share the launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from tickwork_kernels.adamw import ADAMW_BLOCK, CLIP_EPS, AdamWCase, AdamWReport, AdamWSettings
from tickwork_kernels.support import interpreting

KINDS = ("float32", "master", "remainder")

# Columns of the table of adapters, int64 [T, WIDTH]: addresses, the size, and where its chunks and blocks begin.
WIDTH = tl.constexpr(8)
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, EXACT = (tl.constexpr(column) for column in range(5))
SIZE, FIRST_CHUNK, FIRST_BLOCK = (tl.constexpr(column) for column in range(5, 8))

# Columns of the table of settings, float32 [T, HYPERS]; the others are zero.
HYPERS = tl.constexpr(16)
DECAY, LERP, BETA2, SQUARE, ROOT_CORRECTION, EPS, RATE, MULTIPLIER, CLIP = (tl.constexpr(each) for each in range(9))

SMALL = tl.constexpr(CLIP_EPS)
NAN_BITS = tl.constexpr(0x7FC00000)


@dataclass(frozen=True)
class Config:
    """Sizes of a launch.

    Args:
        chunk: blocks whose squares one program sums; few for parallelism, many because every program of the step adds
            up all the sums of its adapter.
        sums: how many of those it loads at a time.
        warps: of a program.
    """

    chunk: int
    sums: int
    warps: int


# The interpreter's are small, so that small adapters have several chunks and several loads of sums.
CONFIGS = {"compiled": Config(8, 1024, 8), "interpreted": Config(2, 2, 8)}


@triton.jit
def pointers(row, start, COLUMN: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the addresses of one block of the tensor that a column of an adapter's row points to.

    Aligned ones are declared such that four numbers are one access, whatever their type, for one layout throughout.
    """
    first = tl.load(row + COLUMN).to(tl.pointer_type(TYPE)) + start
    if ALIGNED:
        first = tl.multiple_of(first, TYPE.primitive_bitwidth // 2)
    return first + tl.arange(0, BLOCK)


@triton.jit
def square_sums_kernel(table, hypers, owners, sums, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Store in ``sums[program]`` the sum of squares of one chunk of one adapter's gradient times its multiplier.

    The addresses are not declared aligned even where they are: the order of the sum would depend on it.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    row = table + owner * WIDTH
    size = tl.load(row + SIZE)
    multiplier = tl.load(hypers + owner * HYPERS + MULTIPLIER)
    start = (program - tl.load(row + FIRST_CHUNK)) * (BLOCK * CHUNK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(CHUNK):
        inside = tl.arange(0, BLOCK) < tl.minimum(size - start, BLOCK).to(tl.int32)
        grad = tl.load(pointers(row, start, GRAD, tl.float32, BLOCK, False), mask=inside, other=0.0) * multiplier
        total += grad * grad
        start += BLOCK
    tl.store(sums + program, tl.sum(total, axis=0))


@triton.jit
def adapter_norm(sums, size, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SUMS: tl.constexpr):
    """Return the root of the sum of one adapter's ``sums``, always added in the same order."""
    count = tl.cdiv(size, BLOCK * CHUNK)
    total = tl.zeros([SUMS], tl.float32)
    start = count * 0
    while start < count:  # the interpreter's range over a number that was loaded fails with some versions of numpy
        at = start + tl.arange(0, SUMS)
        total += tl.load(sums + at, mask=at < count, other=0.0)
        start += SUMS
    return tl.sqrt_rn(tl.sum(total, axis=0))


@triton.jit
def moved(master, grad, exp_avg, exp_avg_sq, hyper):
    """Return master and moments after ``adamw_step``, with its operations in its order.

    ``lerp`` has two formulas, as in torch; the second is exact at weight 1.
    """
    lerp = tl.load(hyper + LERP)
    near = exp_avg + lerp * (grad - exp_avg)
    far = grad - (grad - exp_avg) * (1.0 - lerp)
    exp_avg = tl.where(lerp < 0.5, near, far)
    exp_avg_sq = exp_avg_sq * tl.load(hyper + BETA2) + tl.load(hyper + SQUARE) * grad * grad
    root = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.load(hyper + ROOT_CORRECTION)) + tl.load(hyper + EPS)
    step = tl.div_rn(tl.load(hyper + RATE) * exp_avg, root)
    return master * tl.load(hyper + DECAY) + step, exp_avg, exp_avg_sq


@triton.jit
def high_bits(bits, KIND: tl.constexpr):
    """Return the bits of the bfloat16 nearest to a float32: ties to even, or away from zero beside a remainder."""
    if KIND == 1:
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    return ((bits + 0x8000) >> 16).to(tl.uint16)


@triton.jit
def step_kernel(
    table,
    hypers,
    owners,
    sums,
    norms,
    applied,
    KIND: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Step one block of one adapter, of a kind by its place in ``KINDS``; its first block stores norm and applied.

    bfloat16 is read and written as 16 bits, since the interpreter can not compute in it and rounds it toward zero.
    ``ALIGNED`` promises that addresses and sizes are multiples of 16.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    row, hyper = table + owner * WIDTH, hypers + owner * HYPERS
    size = tl.load(row + SIZE)
    block = program - tl.load(row + FIRST_BLOCK)
    norm = adapter_norm(sums + tl.load(row + FIRST_CHUNK), size, BLOCK, CHUNK, SUMS)
    steps = tl.where(norm < float("inf"), 1, 0)
    if block == 0:
        tl.store(norms + owner, norm)
        tl.store(applied + owner, steps.to(tl.uint8))

    start = block * BLOCK
    left = tl.minimum(size - start, BLOCK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    inside = tl.arange(0, BLOCK) < left
    live = tl.arange(0, BLOCK) < left * steps
    grads = pointers(row, start, GRAD, tl.float32, BLOCK, ALIGNED)
    exp_avgs = pointers(row, start, EXP_AVG, tl.float32, BLOCK, ALIGNED)
    exp_avg_sqs = pointers(row, start, EXP_AVG_SQ, tl.float32, BLOCK, ALIGNED)
    params = pointers(row, start, PARAM, tl.float32 if KIND == 0 else tl.uint16, BLOCK, ALIGNED)
    if KIND == 1:
        exacts = pointers(row, start, EXACT, tl.float32, BLOCK, ALIGNED)
    elif KIND == 2:
        exacts = pointers(row, start, EXACT, tl.int16, BLOCK, ALIGNED)
    else:
        exacts = params

    grad = tl.load(grads, mask=live, other=0.0) * tl.load(hyper + MULTIPLIER)
    grad *= tl.minimum(tl.div_rn(tl.load(hyper + CLIP), tl.where(steps == 1, norm, 0.0) + SMALL), 1.0)
    exp_avg = tl.load(exp_avgs, mask=live, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sqs, mask=live, other=1.0)
    master = tl.load(exacts, mask=live, other=0)
    if KIND == 2:
        high = tl.load(params, mask=live, other=0).to(tl.uint32) << 16
        master = (high + master.to(tl.uint32)).to(tl.float32, bitcast=True)

    master, exp_avg, exp_avg_sq = moved(master, grad, exp_avg, exp_avg_sq, hyper)
    tl.store(exp_avgs, exp_avg, mask=live)
    tl.store(exp_avg_sqs, exp_avg_sq, mask=live)
    if KIND != 2:
        tl.store(exacts, master, mask=live)
    if KIND != 0:
        bits = tl.where(master == master, master.to(tl.uint32, bitcast=True), NAN_BITS)
        tl.store(params, high_bits(bits, KIND), mask=live)
        if KIND == 2:
            tl.store(exacts, bits.to(tl.int16), mask=live)
    if ZERO_GRAD:
        tl.store(grads, tl.zeros([BLOCK], tl.float32), mask=inside)


def run(case: AdamWCase) -> AdamWReport:
    """Do what ``adamw_steps`` says, with one launch for the norms and one for the steps of each kind of state."""
    norms = torch.empty(len(case.states), dtype=torch.float32, device=case.device)
    applied = torch.empty(len(case.states), dtype=torch.uint8, device=case.device)
    if case.states:
        with torch.cuda.device(case.device) if case.device.type == "cuda" else nullcontext():
            _launch(case, CONFIGS["interpreted" if interpreting() else "compiled"], norms, applied)
    return AdamWReport(norms, applied.view(torch.bool))


def _launch(case: AdamWCase, config: Config, norms: torch.Tensor, applied: torch.Tensor) -> None:
    chunks, blocks = (_counts(case, ADAMW_BLOCK * each) for each in (config.chunk, 1))
    table = _upload(torch.tensor(_rows(case, chunks, blocks), dtype=torch.int64), case.device)
    hypers = _upload(torch.tensor([_hypers(each) for each in case.settings], dtype=torch.float32), case.device)
    everyone = range(len(case.states))
    owners = _upload(_repeat(everyone, chunks), case.device)
    sums = torch.empty(len(owners), dtype=torch.float32, device=case.device)
    shared = {"BLOCK": ADAMW_BLOCK, "CHUNK": config.chunk, **_options(config)}
    square_sums_kernel[(len(owners),)](table, hypers, owners, sums, **shared)
    for kind, name in enumerate(KINDS):
        members = [index for index in everyone if case.states[index].kind == name]
        if members:
            owners = _upload(_repeat(members, blocks), case.device)
            flags = {"KIND": kind, "ZERO_GRAD": case.zero_grad, "ALIGNED": _aligned(case, members), "SUMS": config.sums}
            step_kernel[(len(owners),)](table, hypers, owners, sums, norms, applied, **flags, **shared)


def _options(config: Config) -> dict[str, Any]:
    # Without fused multiply-adds every operation rounds as torch's does on CPU, in all variants of the kernel alike.
    return {"num_warps": config.warps, "enable_fp_fusion": False}


def _counts(case: AdamWCase, step: int) -> list[int]:
    # One at least: also an empty adapter reports its norm.
    return [max(1, -(-state.param.numel() // step)) for state in case.states]


def _rows(case: AdamWCase, chunks: Sequence[int], blocks: Sequence[int]) -> list[list[int]]:
    first_chunks, first_blocks, rows = accumulate(chunks, initial=0), dict.fromkeys(KINDS, 0), []
    for state, first_chunk, count in zip(case.states, first_chunks, blocks, strict=False):
        exact = state.master if state.remainder is None else state.remainder
        tensors = (state.param, state.grad, state.exp_avg, state.exp_avg_sq)
        addresses = [*(tensor.data_ptr() for tensor in tensors), 0 if exact is None else exact.data_ptr()]
        rows.append([*addresses, state.param.numel(), first_chunk, first_blocks[state.kind]])
        first_blocks[state.kind] += count
    return rows


def _hypers(settings: AdamWSettings) -> list[float]:
    each = settings
    rate = -(each.learning_rate / (1 - each.beta1**each.step))
    root_correction = (1 - each.beta2**each.step) ** 0.5
    clip = float("inf") if each.clip_norm is None else each.clip_norm
    moments = [1 - each.beta1, each.beta2, 1 - each.beta2, root_correction]
    values = [1 - each.learning_rate * each.weight_decay, *moments, each.eps, rate, each.grad_multiplier, clip]
    return values + [0.0] * (int(HYPERS) - len(values))


def _aligned(case: AdamWCase, members: Sequence[int]) -> bool:
    tensors = [tensor for index in members for tensor in case.states[index].tensors().values()]
    return all(tensor.data_ptr() % 16 == 0 and tensor.numel() % 16 == 0 for tensor in tensors)


def _repeat(values: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    repeats = torch.tensor([counts[value] for value in values])
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.int32), repeats)


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # From pinned memory the copy does not wait for the device.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def compile_targets() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Return every variant that is launched: its name, kernel, signature, constants and options."""
    config = CONFIGS["compiled"]
    shared = {"BLOCK": ADAMW_BLOCK, "CHUNK": config.chunk}
    pointers = {"table": "*i64", "hypers": "*fp32", "owners": "*i32", "sums": "*fp32"}
    targets = [_target("adamw_square_sums", square_sums_kernel, pointers, shared, config)]
    outputs = {"norms": "*fp32", "applied": "*u8"}
    for kind, name in enumerate(KINDS):
        for zero_grad in (False, True):
            for aligned in (False, True):
                flags = {"KIND": kind, "ZERO_GRAD": zero_grad, "ALIGNED": aligned, "SUMS": config.sums}
                label = f"adamw_step_{name}" + "_zero" * zero_grad + "_aligned" * aligned
                targets.append(_target(label, step_kernel, pointers | outputs, flags | shared, config))
    return targets


def _target(
    name: str, kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], config: Config
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    return name, kernel, dict(pointers) | dict.fromkeys(constants, "constexpr"), dict(constants), _options(config)
