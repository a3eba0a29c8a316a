"""What every implementation of ``multi_lora`` must fulfil.

Errors are taken against float64 on the same inputs, adapters rounded as the operation says, and may be twice those of
the plain formula in the input's own dtype: no two rounded results are compared with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from tickwork_kernels.multi_lora import LoraSegment, multi_lora

Check = Callable[[str, torch.device], None]
# (tokens, rank, which adapter); rank 0 stands for the base alone.
MIXED = ((5, 3, 0), (0, 8, 1), (1, 16, 2), (9, 0, 3), (37, 40, 4), (1, 1, 5))
REPEATED = ((4, 6, 0), (3, 2, 1), (35, 6, 0), (0, 6, 0), (2, 0, 2))
LONG = ((70, 5, 0), (3, 33, 1))
LARGE = ((2500, 32, 0), (1, 8, 1), (130, 0, 2), (1024, 100, 3), (65, 64, 4), (1025, 32, 0))
# What the plain formula itself may miss by, and what its error may be exceeded by, both relative to the greatest value.
LIMITS = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (3e-2, 2e-4), torch.float16: (4e-3, 3e-5)}


@dataclass
class Problem:
    """Inputs of one case, as leaves, and the upstream gradient.

    Args:
        layout: of the segments.
        device: where everything lies.
        dtype: of ``x`` and ``y``.
        kept: dtype of the adapters.
        widths: ``d_in`` and ``d_out``.
    """

    layout: Sequence[tuple[int, int, int]]
    device: torch.device
    dtype: torch.dtype = torch.float32
    kept: torch.dtype = torch.float32
    widths: tuple[int, int] = (96, 80)
    segments: list[LoraSegment] = field(init=False)

    def __post_init__(self) -> None:
        """Draw the values, each adapter's from a seed of its own, whatever the others are."""
        tokens, at = sum(count for count, _, _ in self.layout), 0
        self.x, self.y, self.grad = (self.draw(90 + i, tokens, self.widths[i > 0]) for i in range(3))
        self.leaves: dict[str, torch.Tensor] = {"x": self.x.requires_grad_(), "y": self.y.requires_grad_()}
        self.segments = []
        for count, rank, which in self.layout:
            if rank and f"a{which}" not in self.leaves:
                self.leaves[f"a{which}"] = self.adapter(2 * which, rank, self.widths[0])
                self.leaves[f"b{which}"] = self.adapter(2 * which + 1, self.widths[1], rank)
            pair = self.leaves.get(f"a{which}"), self.leaves.get(f"b{which}")
            self.segments.append(LoraSegment(at, at + count, *pair, 0.5 + which / 8))
            at += count

    def draw(self, seed: int, *shape: int) -> torch.Tensor:
        """Return values of about 1 that depend on the seed and the shape only."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, self.dtype)

    def adapter(self, seed: int, rows: int, columns: int) -> torch.Tensor:
        """Return a leaf of values of about the root of what is summed over."""
        values = self.draw(seed, rows, columns).float() / math.sqrt(columns)
        return values.to(self.kept).requires_grad_()

    def run(self, impl: str, segments: Sequence[LoraSegment] | None = None) -> dict[str, torch.Tensor]:
        """Return the output and every leaf's gradient as an implementation computes them."""
        out = multi_lora(self.x, self.y, self.segments if segments is None else segments, impl=impl)
        return self.results(out, self.leaves, self.grad)

    def formula(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the same by the plain formula, carried out in a dtype."""
        leaves = {name: leaf.detach().to(self.dtype).to(dtype) for name, leaf in self.leaves.items()}
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        parts = [leaves["y"][:0]]
        for (_, rank, which), (start, stop, _, _, scale, *_) in zip(self.layout, self.segments, strict=True):
            x, y = leaves["x"][start:stop], leaves["y"][start:stop]
            low = x @ leaves[f"a{which}"].T if rank else None
            parts.append(y if low is None else y + scale * (low @ leaves[f"b{which}"].T))
        return self.results(torch.cat(parts), leaves, self.grad.to(dtype))

    @staticmethod
    def results(out: torch.Tensor, leaves: dict[str, torch.Tensor], grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output, and the gradients that autograd gives, by name."""
        grads = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True, retain_graph=True)
        found = {f"gradient of {name}": each for name, each in zip(leaves, grads, strict=True) if each is not None}
        return {"output": out.detach(), **found}

    def compare(self, got: dict[str, torch.Tensor]) -> None:
        """Raise AssertionError where a result is missing, of another type, or misses float64 by more than allowed."""
        exact, plain = self.formula(torch.float64), self.formula(self.dtype)
        assert set(got) == set(exact), f"results are {sorted(got)}, not {sorted(exact)}"
        for name, result in got.items():
            wanted = self.kept if name[-2] in "ab" else self.dtype
            assert result.dtype == wanted, f"{name} is {result.dtype}, not {wanted}"
            assert result.shape == exact[name].shape, f"{name} is {result.shape}, not {exact[name].shape}"
            self.within(name, result, plain[name], exact[name])

    def within(self, name: str, result: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
        """Raise AssertionError where an error exceeds twice that of the plain formula."""
        if not exact.numel():
            return
        most, slack = (limit * float(exact.abs().max()) for limit in LIMITS[self.dtype])
        error, allowed = (float((each.double() - exact).abs().max()) for each in (result, plain))
        assert allowed <= most, f"{name}: the plain formula itself misses by {allowed:.3g}, more than {most:.3g}"
        assert error <= 2 * allowed + slack, f"{name}: error {error:.3g}, where the plain formula has {allowed:.3g}"


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], what: str) -> None:
    """Raise AssertionError where two sets of results differ in any bit."""
    assert set(one) == set(other), f"{what}: {sorted(one)} and {sorted(other)}"
    for name, result in one.items():
        assert torch.equal(result, other[name]), f"{what}: {name} differs"


def accurate(
    impl: str,
    device: torch.device,
    layout: Sequence[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
    kept: torch.dtype = torch.float32,
    widths: tuple[int, int] = (96, 80),
) -> None:
    """Output and all gradients are within twice the plain formula's error."""
    problem = Problem(layout, device, dtype, kept, widths)
    problem.compare(problem.run(impl))


def empty(impl: str, device: torch.device) -> None:
    """A batch of no tokens gives no rows, and adapters zeros for gradients."""
    for layout in ((), ((0, 0, 0),), ((0, 3, 0), (0, 2, 1))):
        problem = Problem(layout, device)
        got = problem.run(impl)
        assert got["output"].shape == (0, 80), f"output is {got['output'].shape}"
        assert not any(bool(grad.any()) for grad in got.values()), "gradients of no tokens are not zero"


def base_alone(impl: str, device: torch.device) -> None:
    """Rows without an adapter keep their bits, alone and beside others."""
    for layout in (((7, 0, 0),), ((3, 2, 0), (7, 0, 1), (2, 4, 2))):
        problem = Problem(layout, device)
        segment = next(segment for segment in problem.segments if segment.a is None)
        out = problem.run(impl)["output"][segment.start : segment.stop]
        assert torch.equal(out, problem.y[segment.start : segment.stop]), "the base's rows changed"


def into_buffers(impl: str, device: torch.device, letters: str, dtype: torch.dtype) -> None:
    """Gradients are added to what buffers hold, each pass anew, and autograd returns none for their adapters."""
    for layout in (MIXED, REPEATED):
        problem = Problem(layout, device, dtype)
        names = [name for name in problem.leaves if name[0] in letters]
        arena = torch.full((sum(problem.leaves[name].numel() for name in names),), 0.25, device=device)
        parts = arena.split([problem.leaves[name].numel() for name in names])
        views = {name: part.view_as(problem.leaves[name]) for name, part in zip(names, parts, strict=True)}
        segments = [
            segment._replace(grad_a=views.get(f"a{which}"), grad_b=views.get(f"b{which}")) if rank else segment
            for segment, (_, rank, which) in zip(problem.segments, layout, strict=True)
        ]
        for passes in (1, 2):
            got = problem.run(impl, segments)
            twice = [name for name in names if f"gradient of {name}" in got]
            assert not twice, f"autograd returned gradients that belong to buffers: {twice}"
            problem.compare(got | {f"gradient of {name}": (view - 0.25) / passes for name, view in views.items()})


def company(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    """Every bit of a segment is as it is alone, whoever shares the batch and wherever in it the segment lies."""
    sizes = LARGE if device.type == "cuda" else MIXED + LONG
    layout = [(count, rank, which) for which, (count, rank, _) in enumerate(sizes)]
    problem = Problem(layout, device, dtype)
    together = problem.run(impl)
    for segment, (_, rank, which) in zip(problem.segments, layout, strict=True):
        rows = slice(segment.start, segment.stop)
        # Copies: what lies at another address is the same adapter still.
        x, y = (tensor[rows].detach().clone().requires_grad_() for tensor in (problem.x, problem.y))
        leaves = {"x": x, "y": y} | ({f"a{which}": segment.a, f"b{which}": segment.b} if rank else {})
        out = multi_lora(x, y, [segment._replace(start=0, stop=len(x))], impl=impl)
        alone = Problem.results(out, leaves, problem.grad[rows].clone())  # type: ignore[arg-type]
        beside = {name: together[name] for name in alone}
        beside |= {name: together[name][rows] for name in ("output", "gradient of x", "gradient of y") if name in alone}
        same_bits(alone, beside, f"rank {rank}, {len(x)} tokens, alone and among others")


def repeats(impl: str, device: torch.device) -> None:
    """The same call gives the same bits."""
    problem = Problem(LARGE if device.type == "cuda" else REPEATED + LONG, device, torch.bfloat16)
    first = problem.run(impl)
    for _ in range(20 if device.type == "cuda" else 2):
        same_bits(first, problem.run(impl), "first call and a later one")


def second_backward(impl: str, device: torch.device) -> None:
    """A graph that is kept gives the same gradients again."""
    problem = Problem(REPEATED, device)
    out = multi_lora(problem.x, problem.y, problem.segments, impl=impl)
    first, second = (Problem.results(out, problem.leaves, problem.grad) for _ in range(2))
    same_bits(first, second, "first and second backward pass")


def strides(impl: str, device: torch.device) -> None:
    """Inputs, adapters and upstream gradients of any strides and addresses are read as what they hold."""
    problem = Problem(LONG, device)
    problem.grad = torch.ones((), device=device).expand(problem.y.shape)  # what out.sum().backward() sends
    problem.compare(problem.run(impl))
    problem.grad = problem.draw(7, *problem.y.shape[::-1]).T
    for offset, step in ((0, 2), (1, 1), (1, 2)):
        odd = {name: _spread(leaf, offset, step) for name, leaf in problem.leaves.items()}
        problem.leaves, problem.x, problem.y = odd, odd["x"], odd["y"]
        problem.segments = [
            segment._replace(a=odd[f"a{which}"], b=odd[f"b{which}"])
            for segment, (_, _, which) in zip(problem.segments, problem.layout, strict=True)
        ]
        problem.compare(problem.run(impl))


def _spread(leaf: torch.Tensor, offset: int, step: int) -> torch.Tensor:
    """Return a leaf of equal values that lies at an offset into a buffer, its elements some steps apart."""
    buffer = torch.zeros(offset + leaf.numel() * step, dtype=leaf.dtype, device=leaf.device)
    return buffer[offset:].view(*leaf.shape, step)[..., 0].copy_(leaf.detach()).requires_grad_()


def rounding(impl: str, device: torch.device) -> None:
    """Adapters and outputs are rounded to the nearest value of the input's dtype."""
    problem = Problem(MIXED, device, torch.bfloat16)
    segments = [
        segment._replace(a=segment.a.bfloat16(), b=segment.b.bfloat16()) if segment.a is not None else segment  # type: ignore[union-attr]
        for segment in problem.segments
    ]
    ours, theirs = problem.run(impl), problem.run(impl, segments)
    names = ("output", "gradient of x")
    same_bits({n: ours[n] for n in names}, {n: theirs[n] for n in names}, "adapters rounded by it and before")
    one = torch.ones(1, 1, device=device)
    base = (256 * one).bfloat16()
    out = multi_lora(one.bfloat16(), base, [LoraSegment(0, 1, one, 1.5 * one, 1.0)], impl=impl)
    assert float(out) == 258, f"257.5 in bfloat16 is 258, not {float(out)}"


def frozen(impl: str, device: torch.device, wanted: str) -> None:
    """Leaves that need no gradient get none, the others get theirs, and inputs keep their values."""
    problem = Problem(REPEATED, device)
    everything, before = problem.run(impl), {name: leaf.detach().clone() for name, leaf in problem.leaves.items()}
    for name, leaf in problem.leaves.items():
        leaf.requires_grad_(name[0] in wanted)
    out = multi_lora(problem.x, problem.y, problem.segments, impl=impl)
    assert out.requires_grad == bool(wanted), f"the output's requires_grad is {out.requires_grad}"
    leaves = {name: leaf for name, leaf in problem.leaves.items() if leaf.requires_grad}
    got = Problem.results(out, leaves, problem.grad) if wanted else {"output": out}
    same_bits(got, {name: everything[name] for name in got}, f"all gradients and those of {wanted!r} alone")
    assert len(got) == len(leaves) + 1, f"gradients are {sorted(got)}, wanted are {sorted(leaves)}"
    for name, leaf in problem.leaves.items():
        assert torch.equal(leaf, before[name]), f"{name} was changed"


def checks() -> list[tuple[str, Check]]:
    """Return every check by name; each takes the implementation's name and a device."""
    found: dict[str, Check] = {"empty": empty, "base alone": base_alone, "repeats": repeats}
    found |= {"second backward": second_backward, "strides": strides, "rounding": rounding}
    for dtype in LIMITS:
        for what, layout in (("mixed ranks", MIXED), ("repeated adapter", REPEATED), ("long", LONG)):
            found[f"{what}, {dtype}"] = partial(accurate, layout=layout, dtype=dtype)
        found[f"company, {dtype}"] = partial(company, dtype=dtype)
    found["rank 128"] = partial(accurate, layout=((20, 128, 0),))
    found["odd widths"] = partial(accurate, layout=MIXED, widths=(37, 19))
    found["adapters in bfloat16"] = partial(accurate, layout=MIXED, dtype=torch.bfloat16, kept=torch.bfloat16)
    for letters, dtype in (("ab", torch.float32), ("ab", torch.bfloat16), ("a", torch.float32), ("b", torch.float32)):
        found[f"buffers of {letters}, {dtype}"] = partial(into_buffers, letters=letters, dtype=dtype)
    for wanted in ("", "x", "y", "a", "b", "ab", "xb", "xy"):
        found[f"gradients of {wanted or 'nothing'} alone"] = partial(frozen, wanted=wanted)
    found["large, on CUDA"] = large
    return list(found.items())


def large(impl: str, device: torch.device) -> None:
    """Sizes beyond one tile of every kind, where there is a GPU to compute them."""
    if device.type == "cuda":
        for dtype in LIMITS:
            for widths in ((1000, 520), (512, 1024)):
                accurate(impl, device, LARGE, dtype, widths=widths)
