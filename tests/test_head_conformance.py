"""The conformance suite on implementations that run on CPU, and on kernels written here: a right one and wrong ones."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tickwork_kernels import (
    Chunk,
    Head,
    HeadKernel,
    Lora,
    Rows,
    head_gradients,
    head_logits,
    hold_logprobs,
    linear_logprob,
    linear_token_loss,
    register_head_kernel,
)
from tickwork_kernels.check import main
from tickwork_kernels.conformance import head, losses
from tickwork_kernels.heads import HEADS

CPU = torch.device("cpu")
Check = Callable[[str, torch.device], str | None]
CHECKS, LOSS_CHECKS = dict(head.checks()), dict(losses.checks())

# What each implementation refuses, by the beginning of its words; all else it must run.
REFUSALS: dict[str, dict[str, str]] = {
    "torch": {"company changes no logprob": "does not promise it"},
    "attention": {
        "budget: bias": "impl='attention': bias: not supported",
        "budget: softcap": "impl='attention': softcap: not supported",
        "budget: adapter": "impl='attention': lora: not supported",
        "budget: adapter of rank 1": "impl='attention': lora: not supported",
        "budget: entropy": "impl='attention': entropy: not computed",
        "budget: all but an adapter": "impl='attention': bias: not supported",
        "budget: all": "impl='attention': bias: not supported",
        "budget: more targets than tokens": "impl='attention': entropy: not computed",
        "no entropy to lose": "impl='attention': entropy: not computed",
        "company changes no logprob": "does not promise it",
    },
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("impl", REFUSALS)
def test_conformance(impl: str, name: str) -> None:
    """Each implementation does what every one must, and refuses by name exactly what is listed above."""
    answer, refusal = CHECKS[name](impl, CPU), REFUSALS[impl].get(name)
    assert (answer is None) == (refusal is None), answer
    assert (answer or "").startswith(refusal or "")


def test_every_refusal_is_of_a_check_that_exists() -> None:
    """No name above is out of date, and all implementations are listed or need Triton."""
    assert all(set(refusals) <= set(CHECKS) for refusals in REFUSALS.values())
    assert [each.name for each in HEADS.all()] == [*REFUSALS, "cublas", "triton"]


@pytest.mark.parametrize("name", [name for name in LOSS_CHECKS if name != "the twin agrees"])
@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_losses(loss: str, name: str) -> None:
    """Each built-in loss does what every one must, under every head that runs here."""
    answer = LOSS_CHECKS[name](loss, CPU) or ""
    if name == "the shipped heads agree":
        assert set(re.findall(r"(\w+): ", answer)) <= {"cublas", "triton"}
    elif loss == "dro" and name == "a silenced token has no loss":
        assert answer == "declares no input that silences a token"
    else:
        assert not answer


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda tensor: tensor.T.contiguous().T,
    "every other": lambda tensor: torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2],
}
STRIDED = [
    *((impl, name, layout) for impl in REFUSALS for name in ("hidden", "weight", "targets") for layout in LAYOUTS),
    *((impl, "temperature", "every other") for impl in REFUSALS),
    ("torch", "bias", "every other"),
]


@pytest.mark.parametrize(("impl", "name", "layout"), STRIDED)
def test_any_layout_is_taken(impl: str, name: str, layout: str) -> None:
    """Tensors with other strides give the values and gradients of contiguous ones."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "hidden": torch.randn(6, 16, generator=generator),
        "weight": torch.randn(40, 16, generator=generator),
        "targets": torch.randint(0, 40, (6, 2), generator=generator),
        "temperature": torch.rand(6, generator=generator) + 0.5,
        **({"bias": torch.randn(40, generator=generator)} if name == "bias" else {}),
    }

    def run(arguments: dict[str, Any], impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = arguments["hidden"].detach().requires_grad_()
        found = linear_logprob(**{**arguments, "hidden": hidden}, impl=impl)
        return found.logprobs.detach(), torch.autograd.grad(found.logprobs.sum() + found.lse.sum(), hidden)[0]

    other = LAYOUTS[layout](given[name])
    assert torch.equal(other, given[name])
    assert not other.is_contiguous()
    torch.testing.assert_close(run({**given, name: other}, impl), run(given, "torch"), rtol=1e-4, atol=1e-5)


class Whole(HeadKernel):
    """All logits at once in float64: a kernel as somebody would write a first one."""

    name = "whole"

    def why_not(self, case: Any) -> str | None:
        """Refuse what ``head_logits`` would blur."""
        return "targets: more than 64 of a token" if case.shape["K"] > 64 else None

    def forward(self, rows: Rows, loss: Any) -> Chunk:
        """Compute and keep the probabilities."""
        z = head_logits(rows.hidden.double(), wide(rows.head), rows.adapters)
        slope = torch.ones_like(z) if rows.head.softcap is None else 1 - (z / rows.head.softcap).square()
        u = z if rows.temperature is None else z / rows.temperature.double()[:, None]
        logp = u.log_softmax(1)
        entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(1).float() if rows.entropy else None
        slopes = None if rows.head.softcap is None else slope.gather(1, rows.targets).float()
        found = (logp.gather(1, rows.targets).float(), u.logsumexp(1).float())
        return Chunk(*found, entropy, slopes, kept=(logp, slope), nbytes=2 * logp.nbytes)

    def bulk(self, rows: Rows, chunk: Chunk, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the logits but for the targets'."""
        logp, slope = chunk.kept
        factor = alpha[:, None].double().expand_as(logp)
        if beta is not None:
            factor = factor - beta[:, None] * (logp.clamp(min=-1e300) + chunk.entropy[:, None])
        return (logp.exp() * factor * slope).scatter(1, rows.targets, 0.0).float()


def wide(given: Head) -> Head:
    """Return the head in float64."""
    bias = None if given.bias is None else given.bias.double()
    return Head(given.weight.double(), bias, given.softcap, given.multiplier)


class KeepsTargets(Whole):
    """Forgets that the targets' columns are 0 in ``bulk``."""

    name = "keeps targets"

    def bulk(self, rows: Rows, chunk: Chunk, alpha: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient with the targets' columns."""
        return (chunk.kept[0].exp() * alpha[:, None] * chunk.kept[1]).float()


class ForgetsSoftcap(Whole):
    """Forgets the slope of the softcap at the targets."""

    name = "forgets softcap"

    def forward(self, rows: Rows, loss: Any) -> Chunk:
        """Drop the slope."""
        chunk = super().forward(rows, loss)
        chunk.slope = None
        return chunk


class WritesHidden(Whole):
    """Writes into what it was given."""

    name = "writes hidden"

    def forward(self, rows: Rows, loss: Any) -> Chunk:
        """Write."""
        rows.hidden.mul_(1.5)
        return super().forward(rows, loss)


@pytest.fixture
def known(request: pytest.FixtureRequest) -> Iterator[str]:
    """A kernel is known by its name while the test runs."""
    kernel = request.param()
    assert register_head_kernel(kernel) is kernel
    yield kernel.name
    HEADS.unregister(kernel.name)


@pytest.mark.parametrize("known", [Whole], indirect=True)
@pytest.mark.parametrize("name", CHECKS)
def test_a_kernel_of_ones_own_is_held_to_the_suite(name: str, known: str) -> None:
    """A registered kernel is checked by its name; this one passes, but for what it does not promise."""
    assert CHECKS[name](known, CPU) == ("does not promise it" if name == "company changes no logprob" else None)


@pytest.mark.parametrize(
    ("known", "failing"),
    [
        (KeepsTargets, "budget: plain"),
        (ForgetsSoftcap, "budget: softcap"),
        (WritesHidden, "inputs are only read"),
    ],
    indirect=["known"],
)
def test_a_wrong_kernel_fails_the_suite(known: str, failing: str) -> None:
    """Each mistake fails the check that is about it."""
    with pytest.raises(AssertionError):
        CHECKS[failing](known, CPU)


@pytest.mark.parametrize("known", [Whole], indirect=True)
def test_a_kernel_of_ones_own_serves_every_call(known: str) -> None:
    """``impl=`` takes the registered name in every function, for losses with all the head's features."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (11, 4), (11,)))
    lora = Lora(torch.randn(2, 4, generator=generator), torch.randn(11, 2, generator=generator), 0.5)
    targets, weights = torch.randint(0, 11, (9,), generator=generator), torch.randn(9, generator=generator)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias, lora.a, lora.b)]
    options = {"bias": bias, "lora": lora, "softcap": 3.0}

    def run(impl: str) -> tuple[torch.Tensor, ...]:
        one = linear_logprob(hidden, weight, targets, entropy=True, impl=impl, **options)
        two = linear_token_loss(hidden, weight, targets, "cross_entropy", {"weights": weights}, impl=impl, **options)
        return *torch.autograd.grad(sum(part.sum() for part in one), leaves), *torch.autograd.grad(two.loss, leaves)

    torch.testing.assert_close(run(known), run("torch"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_calls_without_autograd_agree_with_those_with_it(rank: int) -> None:
    """``head_gradients`` and ``hold_logprobs`` give what autograd gives; with no backward to come nothing is held."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(9, 4, generator=generator).requires_grad_(), torch.randn(11, 4, generator=generator)
    targets, upstream = torch.randint(0, 11, (9, 2), generator=generator), torch.randn(9, 2, generator=generator)
    pair = (torch.randn(rank, 4, generator=generator), torch.randn(11, rank, generator=generator))
    lora = Lora(*(leaf.requires_grad_() for leaf in pair), 0.5) if rank else None
    logprobs = linear_logprob(hidden, weight, targets, lora=lora).logprobs
    want = torch.autograd.grad(logprobs, [hidden, *(pair if rank else ())], upstream)
    call = (hidden.detach(), targets, Head(weight))
    held = hold_logprobs(*call, lora, cache_bytes=2**20)
    chunk, found = head_gradients(*call, upstream, lora)
    for values, gradients in ((chunk, found), (held, held.backward(head.Upstream(upstream)))):
        torch.testing.assert_close(values.logprobs, logprobs.detach())
        got = (gradients.hidden, *(gradients.adapters[0] if rank else ()))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    without = hold_logprobs(*call, lora)
    assert (without._kept, without._mean, without._spread) == ({}, [], [])


PLUGIN = """
import torch
from tickwork_kernels import TokenLoss, register_token_loss

def evaluate(logp, inputs, config):
    return -inputs["weights"] * logp.exp(), {sign}inputs["weights"] * logp.exp()

register_token_loss(TokenLoss("likelihood", evaluate, ("weights",), zero_when="weights"))
"""


@pytest.mark.parametrize(("sign", "code"), [("-", 0), ("", 1)])
def test_the_command_checks_plugins(sign: str, code: int, tmp_path: Path) -> None:
    """``python -m tickwork_kernels.check --plugin`` runs what a module registers; its exit code counts failures."""
    (tmp_path / "likelihood.py").write_text(PLUGIN.format(sign=sign))
    command = [sys.executable, "-m", "tickwork_kernels.check", "--only", "losses", "--plugin", "likelihood"]
    done = subprocess.run(
        [*command, "--impl", "likelihood"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert "losses likelihood: 5 checks in " in done.stdout
    assert "    not checked: the twin agrees (has no twin)\n" in done.stdout
    assert done.stdout.endswith(f", {code} failed\n")
    wrong = "losses likelihood: the derivative is autograds: FAILED: AssertionError: the derivative is off by"
    assert (wrong in done.stdout) == bool(code)


@pytest.mark.parametrize("known", [Whole, KeepsTargets], indirect=True)
def test_the_command_tells_right_from_wrong_kernels(
    known: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right kernel gives exit code 0, a wrong one the number of its failures, each with a line of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code, printed = main(["--only", "head", "--impl", known]), capsys.readouterr().out
    assert f"head {known}: {len(CHECKS)} checks in " in printed
    assert printed.count("FAILED: AssertionError: ") == code
    assert (code == 0) == (known == "whole")
