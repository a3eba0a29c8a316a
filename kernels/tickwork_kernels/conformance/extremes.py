"""Checks of the head where numbers are extreme: certain and hopeless tokens, logits far from zero, bfloat16."""

from __future__ import annotations

import math
from typing import Any

import torch

from tickwork_kernels.conformance.oracle import (
    EPSILON,
    changed,
    hold_to_budget,
    hold_to_rows,
    make,
    reference,
    runs,
    ways,
    with_logits,
)
from tickwork_kernels.head_targets import Upstream


def confident_tokens(impl: str, device: torch.device) -> str | None:
    """A token of probability 1 - rest keeps its small gradient, to a thousandth of it."""
    vocab = 64
    targets = torch.tensor([[0], [7], [63], [20], [21], [22]])
    for rest in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        peak = math.log((1 - rest) / rest) + math.log(vocab - 1.0)
        case = with_logits(torch.zeros(6, vocab).scatter_(1, targets, peak), targets, device)
        if (refusal := runs(impl, case)) is not None:
            return refusal
        exact, answers = reference(case, torch.float64), ways(impl, case)
        for way, answer in answers.items():
            hold_to_rows(answer.hidden, exact.hidden, 1e-3, f"{way}: p = 1 - {rest:g}")
            assert float(answer.logprobs.max()) <= 0, f"{way}: a logprob is above 0"
        hold_to_budget(case, answers)
    return None


def far_away_logits(impl: str, device: torch.device) -> str | None:
    """Where all logits lie far below or above zero the result is finite and exact: a softmax has no origin."""
    for level in (-1e30, -1e4, -100.0, 100.0, 1e4, 1e30):
        logits = torch.full((4, 32), level)
        logits[1, 3] = level * (1 + 2**-20)
        logits[2, :2] = level * (1 + 2**-18)  # two equal extremes
        case = with_logits(logits, torch.tensor([[0], [3], [1], [31]]), device)
        if (refusal := runs(impl, case)) is not None:
            return refusal
        exact = reference(case, torch.float64)
        # The spacing of float32 at this level, which the lse alone may lose; at 1e30 nothing else is left.
        spacing = 4 * EPSILON * abs(level)
        for way, answer in ways(impl, case).items():
            assert answer.hidden is not None
            assert exact.hidden is not None
            assert bool(torch.isfinite(answer.hidden).all()), f"{way}: not finite at {level:g}"
            off = float((answer.logprobs.double() - exact.logprobs)[[0, 3]].abs().max())
            assert off <= 2e-6 + spacing, f"{way}: logprobs are off by {off:.3g} at {level:g}"
            off = float((answer.hidden.double() - exact.hidden)[[0, 3]].abs().max())
            assert off <= 2e-6 + spacing, f"{way}: gradients are off by {off:.3g} at {level:g}"
    return None


def hopeless_targets(impl: str, device: torch.device) -> str | None:
    """A target a thousand nats below the best token has its logprob, and the gradient that lifts it."""
    logits = torch.zeros(2, 16)
    logits[:, 4] = 1000.0
    case = with_logits(logits, torch.tensor([[0], [4]]), device)
    if (refusal := runs(impl, case)) is not None:
        return refusal
    for way, answer in ways(impl, case).items():
        assert answer.hidden is not None
        off = float((answer.logprobs[:, 0].cpu() - torch.tensor([-1000.0, 0.0])).abs().max())
        assert off <= 2e-4, f"{way}: logprobs are off by {off:.3g}"
        assert abs(float(answer.hidden[0, 0]) + 1.0) < 1e-6, f"{way}: the target is not lifted"
        assert abs(float(answer.hidden[0, 4]) - 1.0) < 1e-6, f"{way}: the best token is not lowered"
        assert not bool(answer.hidden[1].abs().gt(1e-30).any()), f"{way}: a certain token has a gradient"
    return None


def no_entropy_to_lose(impl: str, device: torch.device) -> str | None:
    """Equal logits have the entropy log V and no gradient of it; one certain token has none of either."""
    logits = torch.zeros(2, 32)
    logits[1, 3] = 200.0
    case = with_logits(logits, torch.tensor([[0], [3]]), device)
    zeros = torch.zeros(2, 1, device=device)
    case = changed(case, upstream=Upstream(zeros, None, torch.ones(2, device=device)))
    if (refusal := runs(impl, case)) is not None:
        return refusal
    for way, answer in ways(impl, case).items():
        assert answer.entropy is not None
        assert answer.hidden is not None
        off = float((answer.entropy.cpu() - torch.tensor([math.log(32), 0.0])).abs().max())
        assert off <= 1e-6, f"{way}: the entropy is off by {off:.3g}"
        assert float(answer.hidden.abs().max()) <= 1e-6, f"{way}: the entropy has a gradient"
    return None


def bfloat16(impl: str, device: torch.device) -> str | None:
    """With a bfloat16 head logprobs are float32-exact for the rounded weights; gradients are exact to bfloat16."""
    variants: tuple[dict[str, Any], ...] = ({}, {"bias": True, "softcap": 6.0, "multiplier": 1.7}, {"rank": 4})
    for options in variants:
        case = make(33, 3, dtype=torch.bfloat16, device=device, **options)
        if (refusal := runs(impl, case)) is not None:
            if options:
                continue
            return refusal
        exact, rounded = reference(case, torch.float64), reference(case, torch.float32)
        allowed = 2 * float((rounded.logprobs - exact.logprobs).abs().max()) + 2e-6
        for way, answer in ways(impl, case).items():
            off = float((answer.logprobs - exact.logprobs).abs().max())
            assert off <= allowed, f"{way}: logprobs are off by {off:.3g}, {allowed:.3g} allowed"
            hold_to_rows(answer.hidden, exact.hidden, 2**-8, f"{way}: hidden")
            if exact.a is not None:
                hold_to_rows(answer.a, exact.a, 2**-8, f"{way}: a")
                hold_to_rows(answer.b, exact.b, 2**-8, f"{way}: b")
    return None


def confident_bfloat16(impl: str, device: torch.device) -> str | None:
    """Rounding to bfloat16 does not blur a confident token: each row is as exact as bfloat16 allows."""
    for rest in (1e-1, 1e-3, 1e-5):
        case = make(16, 1, vocab=64, dim=16, dtype=torch.bfloat16, device=device)
        wide = case.head.weight.float()[case.targets[:, 0]]
        hidden = wide / wide.square().sum(1, keepdim=True) * (math.log((1 - rest) / rest) + 5)
        ones = Upstream(-torch.ones(16, 1, device=device))
        case = changed(case, hidden=hidden.to(torch.bfloat16), upstream=ones)
        if (refusal := runs(impl, case)) is not None:
            return refusal
        exact = reference(case, torch.float64)
        least = float(-exact.logprobs.max().expm1())
        for way, answer in ways(impl, case).items():
            hold_to_rows(answer.hidden, exact.hidden, max(2**-8, 8 * EPSILON / least), f"{way}: 1 - p = {least:.1g}")
    return None
