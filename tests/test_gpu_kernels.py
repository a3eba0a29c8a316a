"""The kernels on a CUDA device; run with ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tickwork_kernels import explain, linear_logprob, linear_token_loss
from tickwork_kernels.conformance import adamw, head, losses, multi_lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
Check = Callable[[str, torch.device], str | None]
# V and D of a small real model's head, D both sides of where the fused kernel is preferred.
SHAPES = [(32768, 1024), (32768, 2048), (50257, 768)]


def cases(checks: list[tuple[str, Check]], names: tuple[str, ...]) -> pytest.MarkDecorator:
    """Return a test's parameters: every check of every implementation."""
    pairs = [pytest.param(name, check, id=f"{name}: {title}") for name in names for title, check in checks]
    return pytest.mark.parametrize(("name", "check"), pairs)


@cases(head.checks(), ("torch", "cublas", "triton"))
def test_heads_conform(name: str, check: Check) -> None:
    """The head's suite, compiled."""
    check(name, CUDA)


@cases(losses.checks(), ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro"))
def test_losses_conform(name: str, check: Check) -> None:
    """The losses' suite, twins compiled."""
    check(name, CUDA)


@cases(adamw.checks(), ("torch", "triton"))
def test_adamw_conforms(name: str, check: Check) -> None:
    """The optimizer's suite, compiled."""
    check(name, CUDA)


@cases(multi_lora.checks(), ("torch", "triton"))
def test_multi_lora_conforms(name: str, check: Check) -> None:
    """The adapters' suite, compiled."""
    check(name, CUDA)


def inputs(rows: int, vocab: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, a head and targets in bfloat16, with logits as far apart as a trained model's."""
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden = torch.randn(rows, dim, generator=generator, device=CUDA).bfloat16()
    weight = (torch.randn(vocab, dim, generator=generator, device=CUDA) * 3 * dim**-0.5).bfloat16()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator, device=CUDA)


@pytest.mark.parametrize("impl", ["cublas", "triton"])
@pytest.mark.parametrize(("vocab", "dim"), SHAPES)
def test_logprobs_are_the_same_bits_in_any_company(impl: str, vocab: int, dim: int) -> None:
    """A token's logprob has the same bits among 1, 17, 4,096 and 4,097 tokens, in any place."""
    hidden, weight, targets = inputs(4097, vocab, dim)
    whole = linear_logprob(hidden, weight, targets, impl=impl).logprobs
    for count in (1, 17, 4096):
        assert torch.equal(linear_logprob(hidden[:count], weight, targets[:count], impl=impl).logprobs, whole[:count])
    order = torch.randperm(4097, device=CUDA)
    assert torch.equal(linear_logprob(hidden[order], weight, targets[order], impl=impl).logprobs, whole[order])


@pytest.mark.parametrize("impl", ["cublas", "triton"])
def test_a_hundred_repeats_are_the_same_bits(impl: str) -> None:
    """Logprobs and gradients repeat in every bit."""
    hidden, weight, targets = inputs(1000, 32768, 1024)
    hidden.requires_grad_()
    upstream = torch.randn(1000, device=CUDA)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = linear_logprob(hidden, weight, targets, impl=impl).logprobs
        return logprobs.detach(), torch.autograd.grad(logprobs, hidden, upstream)[0]

    first = both()
    for _ in range(100):
        assert all(torch.equal(one, other) for one, other in zip(both(), first, strict=True))


@pytest.mark.parametrize("impl", ["cublas", "triton"])
@pytest.mark.parametrize(("vocab", "dim"), SHAPES)
def test_bfloat16_errors_stay_those_of_float32_logits(impl: str, vocab: int, dim: int) -> None:
    """At the sizes of a real model logprobs and gradients stay within the error of float32 logits."""
    hidden, weight, targets = inputs(512, vocab, dim)
    hidden.requires_grad_()
    upstream = torch.randn(512, device=CUDA)
    found = linear_logprob(hidden, weight, targets, impl=impl)
    (grad,) = torch.autograd.grad(found.logprobs, hidden, upstream)
    leaf = hidden.detach().double().requires_grad_()
    exact = (leaf @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (want,) = torch.autograd.grad(exact, leaf, upstream.double())
    size = float(leaf.detach().square().mean().sqrt() * weight.double().square().mean().sqrt())
    assert float((found.logprobs - exact).abs().max()) <= 8 * 2.0**-24 * dim * size + 2e-6
    assert float(((grad - want).norm(dim=1) / want.norm(dim=1)).max()) <= 2**-7


@pytest.mark.parametrize("impl", ["cublas", "triton"])
def test_one_sweep_and_stash_agree(impl: str) -> None:
    """A loss known in the sweep and one that comes later give the same gradient but for bfloat16's rounding."""
    hidden, weight, targets = inputs(700, 32768, 1024)
    hidden.requires_grad_()
    weights = torch.randn(700, device=CUDA)
    loss = linear_token_loss(hidden, weight, targets, "cross_entropy", {"weights": weights}, impl=impl).loss
    (known,) = torch.autograd.grad(loss, hidden)
    logprobs = linear_logprob(hidden, weight, targets, impl=impl).logprobs
    (later,) = torch.autograd.grad(-(weights * logprobs).sum(), hidden)
    assert float((known - later).float().norm() / known.float().norm()) <= 2**-7


@pytest.mark.parametrize(("dim", "name"), [(1024, "triton"), (4096, "cublas")])
def test_auto_takes_the_kernel_for_the_size(dim: int, name: str) -> None:
    """Small hidden sizes are fused, large ones go through cuBLAS; never the reference."""
    assert explain(*inputs(16, 4096, dim)).name == name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one() -> None:
    """Kernels run where the tensors are."""
    hidden, weight, targets = (tensor.to("cuda:1") for tensor in inputs(40, 4096, 1024))
    for impl in ("cublas", "triton"):
        linear_logprob(hidden, weight, targets, impl=impl)
