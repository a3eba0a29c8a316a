"""Checks of the head: what every registered implementation must do, or refuse by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tickwork_kernels import support
from tickwork_kernels.conformance.extremes import (
    bfloat16,
    confident_bfloat16,
    confident_tokens,
    far_away_logits,
    hopeless_targets,
    no_entropy_to_lose,
)
from tickwork_kernels.conformance.oracle import (
    Case,
    changed,
    hold_to_budget,
    in_one_sweep,
    make,
    runs,
    ways,
)
from tickwork_kernels.head import Head
from tickwork_kernels.head_targets import Upstream
from tickwork_kernels.heads import choose_both

Check = Callable[[str, torch.device], str | None]

EVERYTHING = {"bias": True, "softcap": 6.0, "multiplier": 1.7, "temperature": True, "lse": True, "entropy": True}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one target": {"width": 1},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "multiplier": {"multiplier": 0.3},
    "temperature": {"temperature": True},
    "adapter": {"rank": 4},
    "adapter of rank 1": {"rank": 1},
    "lse": {"lse": True},
    "entropy": {"entropy": True},
    "all but an adapter": EVERYTHING,
    "all": {**EVERYTHING, "rank": 8},
    "one row": {"rows": 1, "width": 1, "vocab": 2, "dim": 1},
    "more targets than tokens": {"rows": 3, "width": 5, "vocab": 4, "dim": 3, "entropy": True},
    "ragged": {"rows": 63, "width": 1, "vocab": 257, "dim": 17},
    "ragged rows and vocabulary": {"rows": 63, "width": 1, "vocab": 257, "dim": 40},
    "no rows": {"rows": 0},
}


def checks() -> list[tuple[str, Check]]:
    """Return the checks by name; each takes an implementation's name and a device.

    A check raises an AssertionError, or returns why the implementation refuses what it needs, or None.
    """
    features = [(f"budget: {name}", _feature(options)) for name, options in FEATURES.items()]
    each: tuple[Check, ...] = (
        several_chunks,
        repeated_targets,
        silent_rows,
        silence,
        strided_upstream,
        confident_tokens,
        far_away_logits,
        hopeless_targets,
        no_entropy_to_lose,
        bfloat16,
        confident_bfloat16,
        repeats_bit_for_bit,
        company_changes_no_logprob,
        inputs_are_only_read,
        any_layout,
    )
    return [*features, *((check.__name__.replace("_", " "), check) for check in each)]


def _feature(options: dict[str, Any]) -> Check:
    def check(impl: str, device: torch.device) -> str | None:
        return _within_budget(impl, make(device=device, **options))

    return check


def _within_budget(impl: str, case: Case) -> str | None:
    if (refusal := runs(impl, case)) is not None:
        return refusal
    hold_to_budget(case, ways(impl, case))
    return None


def several_chunks(impl: str, device: torch.device) -> str | None:
    """However many chunks the rows take, the last one not full, the sums are the oracle's."""
    case = make(1, device=device)
    if (refusal := runs(impl, case)) is not None:
        return refusal
    size = choose_both(case.rows, None, impl)[0].chunk_rows(case.rows)
    return _within_budget(impl, make(2 * size + 3, 2, dim=8, device=device))


def repeated_targets(impl: str, device: torch.device) -> str | None:
    """A token that stands several times in one row receives the sum of its upstream gradients."""
    case = make(24, 4, device=device, lse=True)
    targets = case.targets[:, :1].expand(-1, 4).contiguous()
    targets[::2, 3] = 5
    return _within_budget(impl, changed(case, targets=targets))


def silent_rows(impl: str, device: torch.device) -> str | None:
    """A row whose upstream is zero gets exactly zero and leaves the other rows as they are."""
    case = make(40, 2, device=device)
    if (refusal := runs(impl, case)) is not None:
        return refusal
    case.upstream.logprobs[::3] = 0
    case.upstream.logprobs[1, 0] = 0
    answers = ways(impl, case)
    for way, answer in answers.items():
        assert answer.hidden is not None
        assert not answer.hidden[::3].any(), f"{way}: a silent row has a gradient"
        assert answer.hidden[1].any(), f"{way}: a row with one silent target has none"
    hold_to_budget(case, answers)
    return None


def silence(impl: str, device: torch.device) -> str | None:
    """Where nothing comes in all gradients are exactly zero, and the logprobs are there."""
    case = make(9, 2, device=device)
    if (refusal := runs(impl, case)) is not None:
        return refusal
    case.upstream.logprobs.zero_()
    answers = ways(impl, case)
    assert not any(bool(answer.hidden.any()) for answer in answers.values() if answer.hidden is not None)
    hold_to_budget(case, answers)
    return None


def strided_upstream(impl: str, device: torch.device) -> str | None:
    """An expanded upstream, which has no memory of its own for each row, counts for each row."""
    case = make(11, 2, device=device)
    return _within_budget(impl, changed(case, upstream=Upstream(case.upstream.logprobs[:1].expand(11, 2))))


def repeats_bit_for_bit(impl: str, device: torch.device) -> str | None:
    """The same call gives the same bits."""
    case = make(45, 2, device=device)
    if (refusal := runs(impl, case)) is not None:
        return refusal
    first = in_one_sweep(impl, case)
    for _ in range(3):
        again = in_one_sweep(impl, case)
        assert torch.equal(first.logprobs, again.logprobs), "logprobs differ"
        assert first.hidden is not None
        assert again.hidden is not None
        assert torch.equal(first.hidden, again.hidden), "gradients differ"
    return None


# Triton's interpreter multiplies with numpy, and some of its BLAS kernels round a row by its place among others.
NUMPY_ROUNDS = "can not be seen in the interpreter here: numpy's matrix product depends on a row's place"


def _numpy_is_invariant() -> bool:
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).numpy() for seed in (0, 1))
    return bool(((x[::-1] @ y)[::-1] == x @ y).all())


def company_changes_no_logprob(impl: str, device: torch.device) -> str | None:
    """A token's logprob has the same bits alone, among others, and in another place."""
    case = make(70, 1, device=device, dim=32)
    if (refusal := runs(impl, case)) is not None:
        return refusal
    if not choose_both(case.rows, None, impl)[0].invariant:
        return "does not promise it"
    if support.interpreting() and not _numpy_is_invariant():
        return NUMPY_ROUNDS
    whole = in_one_sweep(impl, case).logprobs
    for index in (torch.tensor([11]), torch.arange(5, 22), torch.arange(69, -1, -1)):
        place = index.to(device)
        part = changed(case, hidden=case.hidden[place], targets=case.targets[place], upstream=case.upstream.take(place))
        assert torch.equal(in_one_sweep(impl, part).logprobs, whole[place]), f"{len(index)} rows: other bits"
    return None


def inputs_are_only_read(impl: str, device: torch.device) -> str | None:
    """Hidden states, targets, weights and upstream are read, never written."""
    case = make(20, 2, device=device)
    if (refusal := runs(impl, case)) is not None:
        return refusal
    tensors = (case.hidden, case.targets, case.upstream.logprobs, case.head.weight)
    before = [tensor.clone() for tensor in tensors]
    ways(impl, case)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True)), "an input changed"
    return None


def any_layout(impl: str, device: torch.device) -> str | None:
    """Tensors whose elements do not lie end to end give the same as those whose do."""
    case = make(20, 2, device=device, bias=True)
    if runs(impl, case) is not None:
        case = make(20, 2, device=device)
    if (refusal := runs(impl, case)) is not None:
        return refusal
    head, wants = case.head, ways(impl, case)

    def loosened(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(2, -1)[..., ::2]

    bias = None if head.bias is None else loosened(head.bias)
    transposed = head.weight.T.contiguous().T
    for weight in (transposed, loosened(head.weight)):
        loose = changed(
            case,
            hidden=loosened(case.hidden),
            targets=loosened(case.targets),
            head=Head(weight, bias, head.softcap, head.multiplier),
            upstream=Upstream(loosened(case.upstream.logprobs)),
        )
        for way, answer in ways(impl, loose).items():
            for name in ("logprobs", "lse", "hidden"):
                got, want = getattr(answer, name), getattr(wants[way], name)
                off = float((got - want).abs().max())
                assert off <= 1e-4, f"{way}: {name} of strided tensors is off by {off:.3g}"
    return None
