"""Tests of the choice between implementations, of what ``explain`` says, and of bad arguments of a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tickwork_kernels import (
    Choice,
    HeadKernel,
    Lora,
    LoraSegment,
    TokenLoss,
    explain,
    linear_logprob,
    linear_token_loss,
    register_head_kernel,
    registry,
    token_losses,
)
from tickwork_kernels.heads import HEADS
from tickwork_kernels.registry import Registry
from tickwork_kernels.support import why_no_triton


class Toy:
    """An implementation that runs even numbers up to a bound, and likes them as much as told."""

    def __init__(self, name: str, like: int, most: int = 100) -> None:
        self.name, self.like, self.most = name, like, most

    def why_not(self, case: int) -> str | None:
        """Refuse what is above the bound."""
        return None if case <= self.most else f"case: is above {self.most}"

    def preference(self, case: int) -> int:
        """Return what was told."""
        return self.like


class Entry:
    """Stands for an entry point of an installed package; an error in place of what it loads is raised."""

    def __init__(self, *found: object) -> None:
        self.found = list(found)

    def load(self) -> object:
        """Return what is next, but for the last again and again."""
        found = self.found.pop(0) if len(self.found) > 1 else self.found[0]
        if isinstance(found, Exception):
            raise found
        return found


def toys(*each: Toy) -> Registry[Toy]:
    """Return a registry."""
    made = Registry[Toy]("toy", "tests.no_such_group")
    for toy in each:
        assert made.register(toy) is toy
    return made


def test_auto_takes_the_one_preferred_among_those_able() -> None:
    """The highest preference that can run the case is taken, the first of equals; the others' reasons are kept."""
    made = toys(Toy("slow", 0), Toy("fast", 10, 5), Toy("fast too", 10, 5))
    assert made.choose(3) == Choice(made.all()[1], "preferred among slow, fast, fast too", {})
    refused = {"fast": "case: is above 5", "fast too": "case: is above 5"}
    assert made.choose(6) == Choice(made.all()[0], "preferred among slow", refused)
    assert made.choose(6).name == "slow"


def test_a_name_is_taken_at_its_word() -> None:
    """A named implementation runs, however little it is preferred, or the call fails: nothing else takes its place."""
    made = toys(Toy("slow", 0), Toy("fast", 10, 5), Toy("odd", -1))
    choice = made.choose(3, "odd")
    assert (choice.name, choice.why, choice.refused) == ("odd", "named by the caller", {})
    with pytest.raises(NotImplementedError, match="impl='fast': case: is above 5; able to run this toy: 'slow', 'odd'"):
        made.choose(6, "fast")
    with pytest.raises(ValueError, match=r"impl must be 'auto' or one of \['fast', 'odd', 'slow'\], not 'fats'"):
        made.choose(3, "fats")


def test_auto_never_takes_what_runs_only_by_name() -> None:
    """Where only such an implementation is left, or none, ``"auto"`` says why each is not taken."""
    with pytest.raises(
        NotImplementedError, match=r"no implementation of toy .*fast: case: is above 5; odd: only by name"
    ):
        toys(Toy("fast", 10, 5), Toy("odd", -1)).choose(6)
    with pytest.raises(NotImplementedError, match="no implementation of toy can run this: none is registered"):
        toys().choose(6)
    with pytest.raises(NotImplementedError, match="able to run this toy: none"):
        toys(Toy("fast", 10, 5)).choose(6, "fast")


@pytest.mark.parametrize("name", ["slow", "auto"])
def test_names_are_unique(name: str) -> None:
    """A taken name is refused, and so is the one that means the choice; a name given back is free again."""
    made = toys(Toy("slow", 0))
    with pytest.raises(ValueError, match=f"impl '{name}' of toy exists already; take another name"):
        made.register(Toy(name, 3))
    made.unregister("slow")
    assert made.register(Toy("slow", 3)).like == 3
    assert [each.like for each in made.all()] == [3]


def test_installed_packages_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points of the operation's group are registered at the first look, behind those that are there."""
    asked = []

    def entry_points(group: str) -> list[Entry]:
        asked.append(group)
        return [Entry(Toy("installed", 5))]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    made = toys(Toy("slow", 0))
    assert asked == []
    assert made.choose(3).name == "installed"
    assert [each.name for each in made.all()] == ["slow", "installed"]
    assert asked == ["tests.no_such_group"]


def test_a_package_that_does_not_load_is_never_left_out_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look fails until the package loads; then all of them are there."""
    entries = [Entry(Toy("one", 0)), Entry(ImportError("no such library"), ImportError("still none"), Toy("two", 1))]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    made = toys()
    for message in ("no such library", "still none"):
        with pytest.raises(ImportError, match=message):
            made.choose(3)
    assert made.choose(3).name == "two"
    assert [each.name for each in made.all()] == ["one", "two"]


def test_losses_of_installed_packages_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of an installed package is known by its name, with the same care."""
    module = __import__("sys").modules["tickwork_kernels.token_losses"]
    mine = TokenLoss("installed", lambda logp, inputs, config: (-logp, -torch.ones_like(logp)))
    monkeypatch.setattr(module, "_LOSSES", dict(module._LOSSES))
    monkeypatch.setattr(module, "_scanned", [])
    entries = [Entry(ImportError("no such library"), mine)]
    monkeypatch.setattr(module, "entry_points", lambda group: entries if group == module.GROUP else [])
    with pytest.raises(ImportError, match="no such library"):
        token_losses()
    assert token_losses()["installed"] is mine
    assert len(token_losses()) == 6


HIDDEN, WEIGHT, TARGETS = torch.ones(3, 8), torch.arange(40.0).view(5, 8) / 40, torch.tensor([0, 4, 2])
CPU = torch.device("cpu")


def test_explain_says_what_would_run_and_why() -> None:
    """``explain`` names the implementation, the reason, the refusals and the memory, and computes nothing."""
    plain = explain(HIDDEN.clone().requires_grad_(), WEIGHT, TARGETS)
    assert (plain.name, plain.memory > 0) == ("attention", True)
    assert plain.why.startswith("preferred among torch, attention")
    assert set(plain.refused) == ({"cublas", "triton"} if why_no_triton(CPU) else set())
    biased = explain(HIDDEN.clone().requires_grad_(), WEIGHT, TARGETS, bias=torch.zeros(5))
    assert (biased.name, biased.refused["attention"]) == ("torch", "bias: not supported")
    assert biased.memory == 2 * 1024 * 5 * 4
    assert explain(HIDDEN, WEIGHT, TARGETS).name == "torch"
    named = explain(HIDDEN, WEIGHT, TARGETS, impl="attention")
    assert (named.name, named.why) == ("attention", "named by the caller")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": torch.zeros(5)}, "bias: not supported"),
    "softcap": ({"softcap": 3.0}, "softcap: not supported"),
    "multiplier": ({"multiplier": 0.0}, "multiplier: 0"),
    "lora": ({"lora": Lora(torch.ones(2, 8), torch.ones(5, 2), 1.0)}, "lora: not supported"),
    "entropy": ({"entropy": True}, "entropy: not computed"),
    "weight": ({"weight": WEIGHT.double(), "hidden": HIDDEN.double()}, "weight: neither float32 nor bfloat16"),
    "gradients": ({"weight": WEIGHT.clone().requires_grad_()}, "gradients other than hidden's: not computed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_named_implementation_never_gives_way_silently(what: str) -> None:
    """What ``"attention"`` can not do it refuses with the reason and the alternatives, which can."""
    changes, reason = REFUSED[what]
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **changes}
    for call in (linear_logprob, explain):
        with pytest.raises(NotImplementedError, match=f"impl='attention': {reason}.*; able to run .*: 'torch'"):
            call(**arguments, impl="attention")
    assert explain(**arguments).refused["attention"].startswith(reason)
    linear_logprob(**arguments, impl="torch")
    if what != "entropy":
        with pytest.raises(NotImplementedError, match=f"impl='attention': {reason}"):
            linear_token_loss(**arguments, loss="cross_entropy", inputs={"weights": torch.ones(3)}, impl="attention")


@pytest.mark.parametrize("call", [linear_logprob, explain])
def test_an_unknown_implementation_is_told_the_known_ones(call: Callable[..., Any]) -> None:
    """A name that does not exist is a ValueError that lists the names."""
    with pytest.raises(ValueError, match=r"impl must be 'auto' or one of \['attention', 'cublas', 'torch', 'triton'\]"):
        call(HIDDEN, WEIGHT, TARGETS, impl="cuda")


@pytest.mark.skipif(why_no_triton(CPU) is None, reason="Triton runs here")
@pytest.mark.parametrize("impl", ["cublas", "triton"])
def test_triton_on_cpu_says_what_it_takes(impl: str) -> None:
    """Outside the interpreter the Triton implementations refuse CPU tensors and say what would help."""
    with pytest.raises(NotImplementedError, match=f"impl='{impl}': .*able to run this linear_logprob: 'torch', 'att"):
        linear_logprob(HIDDEN, WEIGHT, TARGETS, impl=impl)


def test_a_kernel_is_registered_by_name() -> None:
    """A kernel is chosen by its name only, unless it prefers itself; its name is taken while it is registered."""

    class Nameless(HeadKernel):
        name = "mine"

    class Preferred(Nameless):
        def preference(self, case: Any) -> int:
            return 99

    for kernel, auto in ((Nameless(), "torch"), (Preferred(), "mine")):
        register_head_kernel(kernel)
        try:
            assert explain(HIDDEN, WEIGHT, TARGETS).name == auto
            assert explain(HIDDEN, WEIGHT, TARGETS, impl="mine").implementation is kernel
            with pytest.raises(ValueError, match="impl 'mine' of linear_logprob exists already"):
                register_head_kernel(Nameless())
            with pytest.raises(NotImplementedError):
                linear_logprob(HIDDEN, WEIGHT, TARGETS, impl="mine")
        finally:
            HEADS.unregister("mine")


def spans(*pairs: tuple[int, int]) -> dict[str, Any]:
    """Return segments of an adapter that fits."""
    return {"lora": [LoraSegment(start, stop, torch.ones(2, 8), torch.ones(5, 2), 1.0) for start, stop in pairs]}


def lora(a: Any, b: Any, **more: Any) -> dict[str, Any]:
    """Return one segment of an adapter."""
    return {"lora": [LoraSegment(0, 3, a, b, 1.0, **more)]}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hidden [B, T, D]": ({"hidden": torch.ones(1, 3, 8)}, r"hidden must be \[N, D\], not \[1, 3, 8\]"),
    "weight [V]": ({"weight": torch.ones(8)}, r"weight must be \[V, D\] with D = 8"),
    "weight [D, V]": ({"weight": WEIGHT.T}, r"weight must be \[V, D\] with D = 8 as in hidden, not \[8, 5\]"),
    "empty weight": ({"weight": torch.ones(0, 8)}, r"weight must be .* not \[0, 8\]"),
    "mixed dtypes": (
        {"weight": WEIGHT.bfloat16()},
        r"hidden and weight must share .* torch.float32 and torch.bfloat16",
    ),
    "float16": ({"weight": WEIGHT.half(), "hidden": HIDDEN.half()}, r"must share one of .*not torch.float16"),
    "targets [N, K, J]": ({"targets": TARGETS.view(3, 1, 1)}, r"targets must be \[N\] or \[N, K\] with N = 3"),
    "too few targets": ({"targets": TARGETS[:2]}, r"targets must be .* not \[2\]"),
    "no targets": ({"targets": TARGETS.new_zeros(3, 0)}, r"targets must be .* not \[3, 0\]"),
    "int32 targets": ({"targets": TARGETS.int()}, "targets must be int64, not torch.int32"),
    "target V": (
        {"targets": torch.tensor([0, 5, 2])},
        r"targets\[1, 0\] is 5, outside the vocabulary of 5; -100 marks",
    ),
    "target -1": ({"targets": torch.tensor([[0, 1], [-100, 2], [3, -1]])}, r"targets\[2, 1\] is -1, outside"),
    "-100 of another ignore_index": (
        {"targets": TARGETS - 100, "ignore_index": -1},
        r"targets\[0, 0\] is -100.*; -1 marks",
    ),
    "bias [D]": ({"bias": torch.ones(8)}, r"bias must be \[V\] = \[5\], not \[8\]"),
    "softcap 0": ({"softcap": 0.0}, "softcap must be above 0 or None, not 0.0"),
    "softcap nan": ({"softcap": float("nan")}, "softcap must be a finite number"),
    "temperature 0": ({"temperature": 0.0}, "temperature must be a finite number above 0"),
    "temperature nan": ({"temperature": float("nan")}, "temperature must be a finite number above 0"),
    "temperature [K]": ({"temperature": torch.ones(2)}, r"temperature must be a number or \[N\] = \[3\] .*not \[2\]"),
    "temperature elsewhere": ({"temperature": torch.ones(3, device="meta")}, "temperature must be .* on meta"),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, "weight is on meta, hidden on cpu; move one"),
    "targets elsewhere": ({"targets": TARGETS.to("meta")}, "targets is on meta, hidden on cpu"),
    "bias elsewhere": ({"bias": torch.ones(5, device="meta")}, "bias is on meta, hidden on cpu"),
    "overlapping segments": (spans((0, 2), (1, 3)), r"lora\[1\] covers tokens 1 to 3: segments must be in order"),
    "segment beyond the end": (spans((0, 4)), r"lora\[0\] covers tokens 0 to 4: .*within the 3 tokens"),
    "backward segment": (spans((2, 1)), r"lora\[0\] covers tokens 2 to 1"),
    "negative segment": (spans((-1, 1)), r"lora\[0\] covers tokens -1 to 1"),
    "only a": (lora(torch.ones(2, 8), None), r"lora\[0\] has only one of a and b"),
    "only b": (lora(None, torch.ones(5, 2)), r"lora\[0\] has only one of a and b"),
    "a [D, r]": (lora(torch.ones(8, 2), torch.ones(5, 2)), r"lora\[0\].a must be \[r, D\] with D = 8, not \[8, 2\]"),
    "a [D]": (lora(torch.ones(8), torch.ones(5, 2)), r"lora\[0\].a must be \[r, D\]"),
    "b [r, V]": (lora(torch.ones(2, 8), torch.ones(2, 5)), r"lora\[0\].b must be \[V, r\] = \[5, 2\], not \[2, 5\]"),
    "b of another rank": ({"lora": Lora(torch.ones(2, 8), torch.ones(5, 3), 1.0)}, r"lora\[0\].b must be \[V, r\]"),
    "a of integers": (lora(torch.ones(2, 8).long(), torch.ones(5, 2)), r"lora\[0\].a must be floats on cpu"),
    "b elsewhere": (lora(torch.ones(2, 8), torch.ones(5, 2, device="meta")), r"lora\[0\].b must be floats on cpu"),
    "a gradient's buffer": (
        lora(torch.ones(2, 8), torch.ones(5, 2), grad_a=torch.zeros(2, 8)),
        r"lora\[0\].grad_a and grad_b must be None",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad: str) -> None:
    """The error says which argument is wrong and what it must be; ``explain`` and the loss raise the same."""
    changes, message = BAD[bad]
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **changes}
    for call in (linear_logprob, explain):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_token_loss(**arguments, loss="cross_entropy", inputs={"weights": torch.ones(3)})


def test_a_temperature_with_a_gradient_is_refused() -> None:
    """A gradient that would be lost is refused by name."""
    with pytest.raises(NotImplementedError, match="temperature: has no gradient; detach it"):
        linear_logprob(HIDDEN, WEIGHT, TARGETS, temperature=torch.ones(3, requires_grad=True))


def test_the_range_of_targets_is_checked_on_cpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """``check=False`` looks at no target; None and True do, on CPU."""
    looked = []
    monkeypatch.setattr("tickwork_kernels.head_checks._check_range", lambda *given: looked.append(given[1:]))
    for check in (None, True, False):
        linear_logprob(HIDDEN, WEIGHT, TARGETS, check=check)
    assert looked == [(5, -100), (5, -100)]


@pytest.mark.parametrize("wants", ["weight", "bias", "a", "hidden"])
def test_stash_is_refused_where_it_can_not_serve(wants: str) -> None:
    """``"stash"`` names what it can not serve, a frozen adapter too, and what can; so does a mode of another name."""
    adapter = Lora(torch.ones(2, 8), torch.ones(5, 2), 1.0)
    given = {"hidden": HIDDEN.clone(), "weight": WEIGHT.clone(), "bias": torch.zeros(5)}
    {**given, "a": adapter.a}[wants].requires_grad_()
    call = {**given, "targets": TARGETS, "lora": adapter}
    with pytest.raises(ValueError, match=r"memory='stash' .*weight, bias, lora: 'cache' or 'recompute'"):
        linear_logprob(**call, memory="stash")
    with pytest.raises(ValueError, match="memory must be 'auto', 'stash', 'cache' or 'recompute', not 'keep'"):
        linear_logprob(**call, memory="keep")
    linear_logprob(**call, memory="cache")
