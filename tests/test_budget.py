"""Tests of the token budget: what is measured, what is free, and how it shrinks and recovers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tickwork
from models import CPU, Bench, adapter_of, base, data_of, tokens_of, train
from tickwork.compute import budget
from tickwork.compute.budget import LEAST, PATIENCE, Budget, find_budget, fit, head_bytes, saved_bytes, token_bytes
from tickwork.compute.memory import ASSUMED, free_bytes, host_free
from tickwork.compute.model import BaseModel
from tickwork.compute.rows import Row, pack
from tickwork.types import LoraConfig

MIB = 2**20
CAP = 4096


@given(st.integers(0, 2**40), st.integers(1, 2**24), st.integers(0, 2**34), st.sampled_from([CAP, 65536]))
def test_what_fits_is_half_of_what_is_free(free: int, needed: int, constant: int, cap: int) -> None:
    """A multiple of 64 from 64 to the cap; within that it fits into half of the memory, and 64 more do not."""
    tokens = fit(free, needed, constant, cap)
    assert tokens % 64 == 0
    assert 64 <= tokens <= cap
    assert tokens == 64 or 2 * (tokens * needed + constant) <= free
    assert tokens == cap or 2 * ((tokens + 64) * needed + constant) > free


@pytest.mark.parametrize(
    ("first", "failed", "left"), [(4096, 4096, 3072), (4096, 100, 75), (4096, 70, 64), (16, 16, 16)]
)
def test_a_failure_leaves_three_quarters(first: int, failed: int, left: int) -> None:
    """A pass that ran out of memory leaves three quarters of its size, at least 64, never more than there was."""
    found = Budget(first)
    found.failed(failed)
    assert found.tokens == left


def test_a_failure_of_a_row_above_the_budget_does_not_raise_it() -> None:
    """A row longer than the budget has a pass of its own; three quarters of it may be more than the budget."""
    found = Budget(128)
    found.failed(1000)
    assert found.tokens == 128


def test_it_recovers_by_doubling_after_a_hundred_passes() -> None:
    """It doubles after a hundred passes without a failure, again after a hundred more, up to what it was at first."""
    found = Budget(1000)
    found.failed(300)
    sizes = []
    for _ in range(4):
        for _ in range(PATIENCE - 1):
            found.passed()
        sizes.append(found.tokens)
        found.passed()
    assert (*sizes, found.tokens) == (225, 450, 900, 1000, 1000)


def test_a_failure_starts_the_count_again() -> None:
    """A hundred passes with a failure among them are not a hundred without one."""
    found = Budget(1024)
    for _ in range(2):
        found.failed(512)
        for _ in range(PATIENCE - 1):
            found.passed()
    assert found.tokens == 384


def test_a_fixed_budget_stays() -> None:
    """Where cuts must not depend on memory, a failure changes nothing."""
    found = Budget(512, fixed=True)
    found.failed(512)
    assert found.tokens == 512


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_what_is_measured_is_what_autograd_keeps(kind: str) -> None:
    """The bytes of each token are those that a larger forward really adds, parameters not counted."""
    model = base(kind)
    adapter = adapter_of(model, LoraConfig(rank=32))

    def held(rows: int) -> int:
        found: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor.detach()

        packed = pack([Row(row, adapter) for row in tokens_of([32] * rows)], CPU, gradient=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            hidden = model.hidden(packed)
        assert hidden.requires_grad
        return sum(storage.nbytes() for storage in found.values())

    assert saved_bytes(model) == pytest.approx((held(9) - held(2)) / (7 * 32), rel=0.01)
    # Two layers keep at least the inputs of seven projections each, and their low-rank products.
    assert saved_bytes(model) > 2 * 4 * 32 * 4
    assert token_bytes(model) == saved_bytes(model) + 3 * 32 * 4


def test_measuring_leaves_the_model_as_it_was() -> None:
    """It takes no gradient, keeps no tensors and gives the same number again."""
    model = base("llama")
    assert saved_bytes(model) == saved_bytes(model)
    assert not any(tensor.requires_grad for tensor in model.tensors())
    assert vars(model)["_current"] == {}


def test_the_budget_follows_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the free memory is twice the tokens, up to the cap of the device."""
    model = base("llama")
    each, head = token_bytes(model), head_bytes(model)
    assert head > 0
    for tokens, want in ((64, 64), (640, 640), (1280, 1280), (10, 64), (10**6, CAP)):
        monkeypatch.setattr(budget, "free_bytes", lambda device, n=tokens: 2 * (n * each + head))
        assert find_budget(model).tokens == want


def test_a_model_that_can_hardly_run_gets_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory while measuring is an answer too; any other error is none."""

    def short(self: BaseModel, packed: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    def broken(self: BaseModel, packed: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(BaseModel, "hidden", short)
    assert find_budget(base("llama")).tokens == LEAST
    monkeypatch.setattr(BaseModel, "hidden", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        find_budget(base("llama"))


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let so many MiB be free."""
    return lambda mib: monkeypatch.setattr(budget, "free_bytes", lambda device: mib * MIB)


def test_a_device_finds_the_budget_of_each_base_and_takes_the_smallest(scarce: Callable[[int], None]) -> None:
    """Before a model is there the cap holds; then the base that takes the fewest tokens counts."""
    bench = Bench(max_tokens=None)
    assert bench.device.max_tokens == CAP
    scarce(10)
    bench.create("a", "llama")
    first = bench.device.max_tokens
    assert first == bench.model("a").base.budget.tokens < CAP
    scarce(1000)
    bench.create("b", "qwen3")
    assert bench.model("b").base.budget.tokens == CAP
    assert bench.device.max_tokens == first


@pytest.mark.parametrize(("given", "invariant", "want"), [(50, False, 50), (50, True, 50), (None, True, 4096)])
def test_a_number_that_is_given_is_taken_as_it_is(
    scarce: Callable[[int], None], given: int | None, invariant: bool, want: int
) -> None:
    """A number is neither measured nor rounded, and an invariant device without one takes 4096 at any free memory."""
    scarce(0)
    bench = Bench(max_tokens=given, invariant=invariant)
    assert bench.device.max_tokens == want
    bench.create("a")
    assert bench.device.max_tokens == want


@pytest.mark.parametrize(("invariant", "left"), [(False, 75), (True, 1000)])
def test_a_pass_that_runs_out_of_memory_lowers_the_devices_budget(
    invariant: bool, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size that failed last counts: 200 tokens fail, then 100, and passes of 50 run."""
    hidden = BaseModel.hidden

    def narrow(self: BaseModel, packed: Any) -> torch.Tensor:
        if packed.tokens.shape[1] > 60:
            raise torch.OutOfMemoryError("simulated")
        return hidden(self, packed)

    bench = Bench(max_tokens=1000, invariant=invariant)
    bench.create("a")
    monkeypatch.setattr(BaseModel, "hidden", narrow)
    bench.one(train("a", data_of([50] * 4)))
    assert bench.device.max_tokens == left


def test_passes_without_a_failure_are_counted() -> None:
    """A hundred passes on the device bring its budget back."""
    bench = Bench(max_tokens=128)
    bench.create("a")
    bench.model("a").base.budget.failed(128)
    assert bench.device.max_tokens == 96
    for _ in range(PATIENCE):
        bench.one(train("a", data_of((2,)), backward=False))
    assert bench.device.max_tokens == 128


@pytest.mark.parametrize("given", [None, 100])
def test_the_executor_tells_what_its_device_takes(given: int | None) -> None:
    """Before a device is there it is the number given, or 4096; then it is the device's."""
    with tickwork.ServiceClient(device="cpu", max_tokens_per_pass=given) as service:
        executor: Any = vars(service.host.engine)["_executor"]
        assert executor.max_tokens == (given or 4096)
        client = service.create_lora_training_client("tickwork/tiny", rank=2)
        client.get_info()
        executor._device._bases.get("tickwork/tiny").budget.failed(96)
        assert executor.max_tokens == 72


def files(root: Path, **contents: str) -> Path:
    """Write files; ``__`` in a name stands for a folder."""
    for name, text in contents.items():
        place = root / name.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return root


def group(root: Path, folder: str, **contents: str) -> Path:
    """Write the files of a control group."""
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (place / f"memory.{name}").write_text(text)
    return root


MEMINFO = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n"


def test_available_memory_is_the_machines(tmp_path: Path) -> None:
    """Without control groups it is what the kernel says is available, page cache included."""
    assert host_free(files(tmp_path, proc__meminfo=MEMINFO)) == 8000 * 1024


@pytest.mark.parametrize(
    ("limit", "want"),
    [("3000000\n", 3_000_000 - 1_000_000 + 500_000), ("max\n", 8000 * 1024), ("500\n", 0), ("90000000\n", 8000 * 1024)],
)
def test_a_control_group_bounds_it(tmp_path: Path, limit: str, want: int) -> None:
    """Version 2: what its limit leaves, with what it would give back; a group around it counts as well."""
    files(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/outer/own\n")
    group(tmp_path, "outer", max=limit, current="1000000\n", stat="anon 5\ninactive_file 500000\n")
    group(tmp_path, "outer/own", max="max\n", current="1\n", stat="inactive_file 0\n")
    assert host_free(tmp_path) == want


@pytest.mark.parametrize("path", ["/own", "/of/the/host"])
def test_version_one_of_control_groups_bounds_it_too(tmp_path: Path, path: str) -> None:
    """Version 1, by its own path, or in a container where that is the host's and only the top is there."""
    lines = f"3:cpu,cpuacct:/own\n2:memory:{path}\n"
    files(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=lines)
    folder = "memory/own" if path == "/own" else "memory"
    stat = "inactive_file 7\ntotal_inactive_file 1000\n"
    group(tmp_path, folder, limit_in_bytes="2000000", usage_in_bytes="1500000", stat=stat)
    assert host_free(tmp_path) == 501_000


def test_other_systems_are_asked_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Linux's files sysconf is asked, for half of the memory there is if need be; without that 2 GiB count."""
    pages = {"SC_AVPHYS_PAGES": 1000, "SC_PHYS_PAGES": 8000, "SC_PAGE_SIZE": 4096}

    def sysconf(name: str) -> int:
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr("os.sysconf", sysconf)
    assert host_free(tmp_path) == 1000 * 4096
    del pages["SC_AVPHYS_PAGES"]
    assert host_free(tmp_path) == 4000 * 4096
    monkeypatch.delattr("os.sysconf")
    assert host_free(tmp_path) == ASSUMED


def test_this_machine_has_memory() -> None:
    """Whatever this runs on says something sensible."""
    assert MIB < free_bytes(CPU) < 2**50
