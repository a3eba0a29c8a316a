"""What the device can do at best: rate of matmuls by dtype, and bandwidth of a copy, measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.kernels.cases import Preset
from bench.kernels.job import Floor
from bench.kernels.timing import Plan, once, simple

REPEATS = 5


@dataclass
class Ceilings:
    """Measured at the first question for each.

    Args:
        device: what is asked about.
        preset: says how large the product and the copy are.
    """

    device: torch.device
    preset: Preset
    flops: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0

    def seconds(self, floor: Floor, dtype: torch.dtype) -> float:
        """Return the least time for a floor: the larger of its arithmetic's and its traffic's."""
        return max(floor.flops / self._rate(dtype), floor.nbytes / self._copy())

    def record(self) -> dict[str, object]:
        """Return what was measured."""
        rates = {name: round(rate / 1e12, 3) for name, rate in self.flops.items()}
        return {"matmul_tflops": rates, "copy_gb_per_s": round(self._copy() / 1e9, 1)}

    def _rate(self, dtype: torch.dtype) -> float:
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops:
            side = self.preset.matmul
            x, y = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            self.flops[name] = 2 * side**3 / self._median(lambda: x @ y)
        return self.flops[name]

    def _copy(self) -> float:
        if not self.bandwidth:
            source = torch.randn(self.preset.copied // 4, device=self.device)
            target = torch.empty_like(source)
            self.bandwidth = 2 * source.nbytes / self._median(lambda: target.copy_(source))
        return self.bandwidth

    def _median(self, act: Callable[[], object]) -> float:
        plan, way = Plan(self.device, REPEATS, 0.0, 0.0), simple(act)
        once(way, plan, cold=False)
        return statistics.median(once(way, plan, cold=False)[0] for _ in range(REPEATS))
