"""What users do that documentation does not foresee: each is right, or an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch

from tickwork_kernels import (
    AdamWArena,
    HeadKernel,
    Lora,
    LoraSegment,
    TokenLoss,
    linear_logprob,
    linear_token_loss,
    multi_lora,
    register_head_kernel,
    register_token_loss,
)
from tickwork_kernels.check import main, run
from tickwork_kernels.conformance import head
from tickwork_kernels.heads import HEADS
from tickwork_kernels.registry import Registry

CPU = torch.device("cpu")


def inputs(rows: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states that require a gradient, a weight and targets."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=draw).requires_grad_()
    return hidden, torch.randn(50, 8, generator=draw), torch.randint(0, 50, (rows,), generator=draw)


def adapter() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``a`` and ``b`` of an adapter of the head."""
    return torch.full((2, 8), 0.3), torch.linspace(-1, 1, 100).view(50, 2)


@pytest.mark.parametrize("memory", ["stash", "cache", "recompute"])
@pytest.mark.parametrize("name", ["logprobs", "lse", "entropy"])
def test_writing_into_a_result_changes_no_gradient(name: str, memory: Any) -> None:
    """What a caller does to the numbers it was given stays with the caller."""
    grads = []
    for spoil in (False, True):
        hidden, weight, targets = inputs()
        found = linear_logprob(hidden, weight, targets, memory=memory, entropy=True, impl="torch")
        total = found.logprobs.sum() + found.entropy.sum()
        if spoil:
            getattr(found, name).detach().sub_(1.0)
        total.backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_adapters_may_come_from_an_iterator_or_alone() -> None:
    """A generator of segments, one segment and one adapter for all tokens give the same."""
    hidden, weight, targets = inputs()
    a, b = adapter()
    whole = LoraSegment(0, 16, a, b, 1.5)
    ways = [Lora(a, b, 1.5), [whole], whole, (each for each in [whole])]
    found = [linear_logprob(hidden, weight, targets, lora=way).logprobs for way in ways]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.allclose(found[0], linear_logprob(hidden, weight, targets).logprobs)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"multiplier": torch.tensor(2.0, requires_grad=True)}, NotImplementedError, "multiplier"),
        ({"softcap": torch.tensor(2.0)}, NotImplementedError, "softcap"),
        ({"multiplier": float("nan")}, ValueError, "multiplier"),
        ({"multiplier": None}, ValueError, "multiplier"),
        ({"softcap": float("inf")}, ValueError, "softcap"),
        ({"softcap": "a"}, ValueError, "softcap"),
        ({"temperature": 1e-40}, ValueError, "temperature"),
        ({"temperature": float("inf")}, ValueError, "temperature"),
        ({"temperature": "1"}, ValueError, "temperature"),
        ({"temperature": torch.zeros(16)}, ValueError, "temperature"),
        ({"bias": torch.zeros(50, dtype=torch.int64)}, ValueError, "bias"),
        ({"lora": [Lora(*adapter(), 1.0)]}, ValueError, r"lora\[0\]"),
        ({"lora": [(0, 16, *adapter(), 1.0)]}, ValueError, r"lora\[0\]"),
        ({"lora": [LoraSegment(0.0, 16, *adapter(), 1.0)]}, ValueError, r"lora\[0\].start"),
        ({"lora": Lora(*adapter(), torch.tensor(1.0, requires_grad=True))}, NotImplementedError, "scale"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    """Each is refused by its name, whether or not torch would have made something of it."""
    with pytest.raises(error, match=says):
        linear_logprob(*inputs(), **changes)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("wrong", [lambda tensor: tensor.to("meta"), lambda tensor: tensor.tolist()])
def test_what_holds_no_numbers_is_named(place: int, wrong: Callable[[torch.Tensor], Any]) -> None:
    """Meta tensors and lists are named, not run into; one meta tensor among others is on another device."""
    given = list(inputs())
    given[place] = wrong(given[place])
    if place == 0 and isinstance(given[0], torch.Tensor):
        given = [tensor.to("meta") for tensor in given]
    with pytest.raises(ValueError, match=("hidden", "weight", "targets")[place]):
        linear_logprob(*given)


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        (lambda logp, inputs, config: logp, "must return"),
        (lambda logp, inputs, config: (logp.sum(), logp), "loss must be"),
        (lambda logp, inputs, config: (logp, None), "derivative must be"),
        (lambda logp, inputs, config: (logp, logp[:, :, None].expand(-1, -1, 2)), "derivative must be"),
        (lambda logp, inputs, config: (logp.double(), logp), "loss must be"),
    ],
)
def test_a_loss_that_returns_something_else_is_named(evaluate: Callable[..., Any], says: str) -> None:
    """Shapes and dtypes of a loss are checked before they reach a gradient."""
    with pytest.raises(ValueError, match=f"'odd'.*{says}"):
        linear_token_loss(*inputs(), TokenLoss("odd", evaluate), {})


def test_a_loss_that_writes_into_its_logprobs_spoils_nothing() -> None:
    """It is given numbers of its own."""
    found = linear_token_loss(*inputs(), TokenLoss("odd", lambda logp, i, c: (logp.neg_(), -torch.ones_like(logp))), {})
    assert float(found.logprobs.max()) <= 0


@pytest.mark.parametrize("wrong", [HeadKernel, object(), None, type("Nameless", (HeadKernel,), {})()])
def test_what_is_no_head_kernel_is_not_registered(wrong: Any) -> None:
    """A class, or an object without a name, would break every later call."""
    before = HEADS.all()
    with pytest.raises(ValueError, match="linear_logprob"):
        register_head_kernel(wrong)
    assert HEADS.all() == before


def test_what_is_no_token_loss_is_not_registered() -> None:
    """A function alone, a string for inputs and an unknown silencer are errors at once."""
    with pytest.raises(ValueError, match="TokenLoss"):
        register_token_loss(lambda logp, i, c: (logp, logp))
    with pytest.raises(ValueError, match="inputs"):
        TokenLoss("odd", lambda logp, i, c: (logp, logp), inputs="weights")
    with pytest.raises(ValueError, match="zero_when"):
        TokenLoss("odd", lambda logp, i, c: (logp, logp), ("weights",), zero_when="mask")


class Question(HeadKernel):
    """Fails when it is asked whether it can."""

    name = "question"

    def why_not(self, case: Any) -> str | None:
        """Raise."""
        raise KeyError("what")


class Unwritten(HeadKernel):
    """Has a name and nothing else."""

    name = "unwritten"


def test_one_kernels_failure_is_not_the_others() -> None:
    """A registered kernel that fails at the question is refused; the others run as before."""
    register_head_kernel(Question())
    try:
        linear_logprob(*inputs(), impl="torch")
        with pytest.raises(NotImplementedError, match="KeyError"):
            linear_logprob(*inputs(), impl="question")
    finally:
        HEADS.unregister("question")


def test_a_kernel_that_is_not_written_fails_its_suite() -> None:
    """What the base class does not do is no refusal."""
    register_head_kernel(Unwritten())
    try:
        answers = {name: run(check, "unwritten", CPU) for name, check in head.checks()}
    finally:
        HEADS.unregister("unwritten")
    failed = {name for name, answer in answers.items() if answer is not None and answer.startswith("FAILED")}
    # Without rows nothing is asked of it, and it does not promise anything of bits.
    assert set(answers) - failed == {"budget: no rows", "company changes no logprob"}


@pytest.mark.parametrize("arguments", [["--impl", "typo"], ["--plugin", "no_such_module"], ["--device", "foo"]])
def test_the_suite_is_not_green_for_what_is_not_there(arguments: list[str], capsys: Any) -> None:
    """A misspelt name ends the command with an error that repeats it."""
    with pytest.raises(SystemExit) as ended:
        main(["--only", "losses", *arguments])
    assert ended.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_threads_may_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed implementations are loaded once, however many threads ask at the same time."""

    class Entry:
        def load(self) -> Any:
            torch.randn(200, 200) @ torch.randn(200, 200)
            return type("External", (HeadKernel,), {"name": "external"})()

    monkeypatch.setattr("tickwork_kernels.registry.entry_points", lambda group: [Entry()])
    registry: Registry[Any] = Registry("something", "nowhere")
    answers: list[Any] = []
    threads = [Thread(target=lambda: answers.append([each.name for each in registry.all()])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [["external"]] * 8


def test_autocast_changes_no_dtype_of_adapters() -> None:
    """Under autocast the sum has the dtype and the precision of its arguments."""
    x, y, (a, b) = torch.randn(4, 8), torch.randn(4, 50), adapter()
    want = multi_lora(x, y, [LoraSegment(0, 4, a, b, 1.0)])
    with torch.autocast("cpu", torch.bfloat16):
        found = multi_lora(x, y, [LoraSegment(0, 4, a, b, 1.0)])
    assert found.dtype == torch.float32
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_an_arena_of_another_dtype_is_named(dtype: torch.dtype) -> None:
    """At once, not at the first step."""
    with pytest.raises(ValueError, match="dtype"):
        AdamWArena([5], dtype=dtype)
