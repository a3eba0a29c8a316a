"""Token losses: elementwise in a token's logprob and its inputs, with their derivative; built in, or your own.

A loss is a function of ``logp`` (float32, any shape), its inputs (tensors of that shape) and its configuration that
returns ``(loss, d loss / d logp)`` of that shape; the loss of a request is the plain sum. The derivative is written
out because it is needed as soon as a logprob is known, inside the pass over the head, where no autograd runs.
A ``triton.jit`` twin of the same function is fused into the kernels that finish a row; without one the torch
function runs between two launches, and costs no extra GEMM either.

Source: the loss functions documented for the Tinker API; PPO: arXiv 1707.06347; CISPO: MiniMax-M1,
arXiv 2506.13585; DRO: arXiv 2405.19107.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from threading import RLock
from typing import Any

import torch

Inputs = Mapping[str, torch.Tensor]
Config = Mapping[str, float]
Pair = tuple[torch.Tensor, torch.Tensor]
GROUP = "tickwork_kernels.token_losses"


@dataclass(frozen=True)
class TokenLoss:
    """An elementwise loss.

    Args:
        name: what ``loss=`` takes.
        evaluate: ``(logp, inputs, config) -> (loss, d loss / d logp)`` in torch; any shape, float32 or float64. Where
            the derivative is meant to leave something out, ``detach()`` it: the conformance suite asks autograd.
        inputs: names of its inputs, each a tensor of the targets' shape.
        config: names and defaults of its settings.
        twin: the same function under ``triton.jit``, or ``"module:name"`` of one, or None. It takes ``logp`` and two
            tuples, the inputs and the settings in the order declared here.
        zero_when: the input that silences a token where it is 0: its loss and derivative are 0 there, so that
            its row may be left out of the backward.
    """

    name: str
    evaluate: Callable[[torch.Tensor, Inputs, Config], Pair]
    inputs: tuple[str, ...] = ()
    config: Config = field(default_factory=dict)
    twin: Any = None
    zero_when: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a string, not {self.name!r}")
        if isinstance(self.inputs, str) or not all(isinstance(each, str) for each in self.inputs):
            raise ValueError(f"inputs must be a tuple of names, not {self.inputs!r}")
        if self.zero_when is not None and self.zero_when not in self.inputs:
            raise ValueError(f"zero_when={self.zero_when!r} is not among the inputs {self.inputs} of {self.name!r}")

    def jit(self) -> Any:
        """Return the ``triton.jit`` twin, imported if need be; None without one."""
        if isinstance(self.twin, str):
            module, _, name = self.twin.partition(":")
            return getattr(import_module(module), name)
        return self.twin


@dataclass(frozen=True)
class BoundLoss:
    """A loss with the inputs and settings of one call.

    Args:
        inputs: name -> ``[N, K]`` tensor in the head's dtype.
        config: every setting.
        ignored: ``[N, K]`` tokens whose loss and derivative are 0, or None.
    """

    loss: TokenLoss
    inputs: Inputs
    config: Config
    ignored: torch.Tensor | None = None

    def evaluate(self, logp: torch.Tensor) -> Pair:
        """Return ``(loss, d loss / d logp)``."""
        found = self.loss.evaluate(logp.clone(), self.inputs, self.config)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(
                f"token loss {self.loss.name!r} must return (loss, derivative), not {type(found).__name__}"
            )
        for what, value in zip(("loss", "derivative"), found, strict=True):
            if not isinstance(value, torch.Tensor) or value.shape != logp.shape or value.dtype != logp.dtype:
                shape = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                wanted = f"{logp.dtype} {list(logp.shape)}"
                raise ValueError(f"token loss {self.loss.name!r}: its {what} must be {wanted}, as logp, not {shape}")
        return found

    def mask(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``[N, K]`` values with 0 where tokens are ignored."""
        return values if self.ignored is None else values.masked_fill(self.ignored, 0.0)

    def chunk(self, start: int, stop: int) -> BoundLoss:
        """Return the loss of rows ``start`` to ``stop``."""
        return self._part(slice(start, stop))

    def take(self, index: torch.Tensor) -> BoundLoss:
        """Return the loss of some rows."""
        return self._part(index)

    def _part(self, index: slice | torch.Tensor) -> BoundLoss:
        inputs = {key: value[index] for key, value in self.inputs.items()}
        return BoundLoss(self.loss, inputs, self.config, None if self.ignored is None else self.ignored[index])

    def active(self) -> torch.Tensor | None:
        """Return which rows may have a gradient, ``[N]`` bool; None where only the logprobs can tell."""
        return None if self.loss.zero_when is None else self.inputs[self.loss.zero_when].ne(0).any(1)


def cross_entropy(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-weights * logp``; weights are any finite numbers."""
    weights = inputs["weights"]
    return -weights * logp, -weights


def importance_sampling(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-exp(logp - logprobs) * advantages``."""
    gain = _ratio(logp, inputs) * inputs["advantages"]
    return -gain, -gain


def ppo(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-min(r * A, clamp(r, low, high) * A)`` with ``r = exp(logp - logprobs)``; bounds are ratios, not epsilons."""
    ratio, advantages = _ratio(logp, inputs), inputs["advantages"]
    gain = ratio * advantages
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"]) * advantages
    return -torch.minimum(gain, clipped), torch.where(gain <= clipped, -gain, torch.zeros_like(gain))


def cispo(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-stop_gradient(clamp(r, low, high)) * logp * A`` with ``r = exp(logp - logprobs)``."""
    ratio = _ratio(logp, inputs).detach().clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    weight = ratio * inputs["advantages"]
    return -weight * logp, -weight


def dro(logp: torch.Tensor, inputs: Inputs, config: Config) -> Pair:
    """``-(logp * A - beta / 2 * (logp - logprobs) ** 2)``."""
    beta, distance = config["beta"], logp - inputs["logprobs"]
    loss = -(logp * inputs["advantages"] - 0.5 * beta * distance.square())
    return loss, beta * distance - inputs["advantages"]


def _ratio(logp: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    # Where the advantage is 0 the ratio has no say; 1 there keeps an overflow times 0 from becoming NaN.
    ratio = torch.exp(logp - inputs["logprobs"])
    return torch.where(inputs["advantages"] == 0, torch.ones_like(ratio), ratio)


_TWINS = "tickwork_kernels.token_losses_triton:"
_RATIO = ("logprobs", "advantages")
_LOSSES: dict[str, TokenLoss] = {}
_scanned: list[bool] = []
_lock = RLock()


def register_token_loss(loss: TokenLoss) -> TokenLoss:
    """Make a loss known by its name, to ``linear_token_loss``, to the conformance suite and to the bench.

    Raises:
        ValueError: the name is taken, or it is no ``TokenLoss``.
    """
    if not isinstance(loss, TokenLoss):
        raise ValueError(f"loss must be a TokenLoss, not {type(loss).__name__}")
    if loss.name in _LOSSES:
        raise ValueError(f"token loss {loss.name!r} exists already; take another name")
    _LOSSES[loss.name] = loss
    return loss


def unregister_token_loss(name: str) -> None:
    """Forget a loss that was registered."""
    del _LOSSES[name]


def token_losses() -> Mapping[str, TokenLoss]:
    """Return every known loss by name, those of installed packages (entry points) included."""
    with _lock:
        if not _scanned:
            found = [entry.load() for entry in entry_points(group=GROUP)]
            _scanned.append(True)
            for each in found:
                register_token_loss(each)
    return _LOSSES


def bind(loss: str | TokenLoss, inputs: Inputs, config: Config | None = None) -> BoundLoss:
    """Return a loss with its inputs and settings, after checking their names.

    Raises:
        ValueError: an unknown loss, a missing or unknown input or setting; names it.
    """
    known = token_losses()
    if not isinstance(loss, TokenLoss) and not (isinstance(loss, str) and loss in known):
        raise ValueError(f"loss must be one of {sorted(known)} or a TokenLoss, not {loss!r}")
    spec = known[loss] if isinstance(loss, str) else loss
    for what, given, wanted in (("inputs", inputs, spec.inputs), ("config", config or {}, tuple(spec.config))):
        if unknown := set(given) - set(wanted):
            raise ValueError(f"{what} {sorted(unknown)} are not those of {spec.name!r}, which takes {list(wanted)}")
    if missing := set(spec.inputs) - set(inputs):
        raise ValueError(f"inputs {sorted(missing)} of {spec.name!r} are missing")
    return BoundLoss(spec, dict(inputs), {**spec.config, **(config or {})})


for _loss in (
    TokenLoss("cross_entropy", cross_entropy, ("weights",), {}, _TWINS + "cross_entropy", "weights"),
    TokenLoss("importance_sampling", importance_sampling, _RATIO, {}, _TWINS + "importance_sampling", "advantages"),
    TokenLoss(
        "ppo",
        ppo,
        _RATIO,
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        _TWINS + "ppo",
        "advantages",
    ),
    TokenLoss(
        "cispo",
        cispo,
        _RATIO,
        {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
        _TWINS + "cispo",
        "advantages",
    ),
    # The service publishes no default for beta; this is the value its documentation uses as an example.
    TokenLoss("dro", dro, _RATIO, {"beta": 0.05}, _TWINS + "dro"),
):
    register_token_loss(_loss)
