"""One client's training step: Tickwork against a PEFT loop, and a custom loss against the built-in one."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import tickwork
from bench.peft_loop import PeftLoop
from bench.workloads import ADAM, PAUSE, RANK, Workload


class Ours:
    """The same batch through a training client, from plain calls."""

    def __init__(
        self,
        workload: Workload,
        *,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        rank: int = RANK,
        max_tokens_per_pass: int | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        self.service = tickwork.ServiceClient(
            device=device,
            dtype=dtype,
            max_tokens_per_pass=max_tokens_per_pass,
            checkpoint_activations=checkpoint_activations,
        )
        self._client = self.service.create_lora_training_client(workload.model, rank=rank, seed=0).result()
        self._data = workload.data()

    def built_in(self) -> None:
        """One step under cross_entropy."""
        self._finish(self._client.forward_backward(self._data, "cross_entropy"))

    def custom(self) -> None:
        """One step under the same loss, written as a callable."""
        self._finish(self._client.forward_backward_custom(self._data, cross_entropy))

    def _finish(self, loss: tickwork.Future[Any]) -> None:
        step = self._client.optim_step(ADAM)
        loss.result()
        step.result()


def cross_entropy(data: Sequence[Any], logprobs: list[Any]) -> tuple[Any, Mapping[str, float]]:
    """The built-in loss as a user would write it."""
    terms = [
        -(datum.loss_fn_inputs["weights"].to_torch() * logp).sum() for datum, logp in zip(data, logprobs, strict=True)
    ]
    return sum(terms), {}


def measure(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    """Time the three ways in turns, so that all meet the same machine; return their rows."""
    ours, loop = Ours(workload), PeftLoop(workload)
    with ours.service:
        seconds = in_turns({"built-in": ours.built_in, "custom": ours.custom, "peft": loop.step}, rounds)
    rows = []
    for speed, of, against, wanted in (
        ("train", "built-in", "peft", ">= 1.00"),
        ("custom time", "custom", "built-in", "<= 1.10"),
    ):
        ratio = seconds[against] / seconds[of] if speed == "train" else seconds[of] / seconds[against]
        rows.append(
            {
                "speed": speed,
                "workload": workload.name,
                "ours": f"{workload.tokens / seconds[of]:,.0f} tokens/s",
                "against": f"{against} {workload.tokens / seconds[against]:,.0f} tokens/s",
                "ratio": round(ratio, 3),
                "wanted": wanted,
            }
        )
    return rows


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each way's median seconds over interleaved rounds, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gc.collect()
    for turn in range(rounds + 2):
        for name, act in ways.items():
            time.sleep(PAUSE)
            begun = time.perf_counter()
            act()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}
