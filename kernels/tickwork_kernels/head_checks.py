"""From the arguments of a call to ``Rows``: shapes, dtypes and devices checked, ignored tokens left out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tickwork_kernels.head import Adapters, Head, Lora, Needs, Rows, as_segments
from tickwork_kernels.multi_lora import LoraSegment

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
IGNORE = -100


@dataclass(frozen=True)
class HeadOptions:
    """Everything about a head that is not a tensor of tokens.

    Args:
        bias: ``[V]`` or None.
        multiplier: factor of the logits, before the softcap.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
        temperature: divides the logits after the softcap: a number, or ``[N]`` floats, above 0. Has no gradient.
        lora: one adapter for all tokens, or segments of tokens in order, with an adapter or without.
        ignore_index: tokens with this target get logprob 0 and no gradient; a row of them alone is left out.
        check: whether to look for targets outside the vocabulary, which waits for the device; None checks on CPU.
            Unchecked ones are undefined.
    """

    bias: torch.Tensor | None = None
    multiplier: float = 1.0
    softcap: float | None = None
    temperature: float | torch.Tensor = 1.0
    lora: Adapters = None
    ignore_index: int = IGNORE
    check: bool | None = None

    def __post_init__(self) -> None:
        # Read more than once: an iterator would be empty the second time.
        if isinstance(self.lora, LoraSegment):
            object.__setattr__(self, "lora", (self.lora,))
        elif self.lora is not None and not isinstance(self.lora, Lora):
            object.__setattr__(self, "lora", tuple(self.lora))
            for number, each in enumerate(self.lora):
                if not isinstance(each, LoraSegment):
                    kind = type(each).__name__
                    raise ValueError(f"lora[{number}] must be a LoraSegment, not {kind}; one Lora serves all tokens")


@dataclass(frozen=True)
class Call:
    """A call's rows without the ignored ones.

    Args:
        rows: what is left.
        kept: ``[n]`` their places among all rows; None if all are left.
        ignored: ``[n, K]`` single ignored targets among them; None if there are none.
        count: rows before.
    """

    rows: Rows
    kept: torch.Tensor | None
    ignored: torch.Tensor | None
    count: int

    def own_dtypes(self) -> torch.autocast:
        """Return a region in which an autocast of the caller's changes no dtype."""
        return torch.autocast(self.rows.hidden.device.type, enabled=False)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Bring ``[n, ...]`` values back to all rows; 0 for ignored ones."""
        if self.kept is None:
            return values
        return values.new_zeros(self.count, *values.shape[1:]).index_copy_(0, self.kept, values)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Bring ``[N, ...]`` values to the rows that are left."""
        return values if self.kept is None else values[self.kept]


def prepare(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, options: HeadOptions, needs: Needs, entropy: bool
) -> Call:
    """Check a call's arguments and return what is to be computed.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; names it.
    """
    _check_numbers(options)
    _check_tensors(hidden, weight, targets, options)
    wide = targets if targets.dim() == 2 else targets[:, None]
    segments = [each for each in as_segments(options.lora, len(hidden)) if each.a is not None]
    # Kernels read a bias as one row of memory.
    bias = None if options.bias is None else options.bias.contiguous()
    head = Head(weight, bias, options.softcap, options.multiplier)
    rows = Rows(hidden, wide, head, segments, _temperature(options.temperature, hidden, head), entropy, needs)
    if options.check or (options.check is None and hidden.device.type == "cpu"):
        _check_range(wide, len(weight), options.ignore_index)
    ignored = wide == options.ignore_index
    # One wait for the device; without ignored tokens nothing is gathered.
    alive = (~ignored).any(1).nonzero()[:, 0]
    if len(alive) == len(wide) and (wide.shape[1] == 1 or not bool(ignored.any())):
        return Call(rows, None, None, len(wide))
    rows, ignored = rows.take(alive), ignored[alive]
    # A repeated target is the neutral element here: it changes no other token's value.
    first = rows.targets.gather(1, ignored.int().argmin(1, keepdim=True))
    rows = Rows(**{**vars(rows), "targets": torch.where(ignored, first, rows.targets)})
    return Call(rows, alive, ignored, len(wide))


def _temperature(value: float | torch.Tensor, hidden: torch.Tensor, head: Head) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise NotImplementedError("temperature: has no gradient; detach it, or divide the logits yourself")
        if value.shape not in ((), (len(hidden),)) or value.device != hidden.device:
            raise ValueError(
                f"temperature must be a number or [N] = [{len(hidden)}] on {hidden.device}, not {list(value.shape)} "
                f"on {value.device}"
            )
        if hidden.device.type == "cpu" and not bool(((value > 1e-30) & value.isfinite()).all()):
            raise ValueError("temperature must be finite and above 0 everywhere")
        return value.to(head.dtype).expand(len(hidden))
    if not isinstance(value, int | float) or not 1e-30 < value < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, or a tensor of such, not {value!r}")
    return None if value == 1 else torch.full((len(hidden),), value, dtype=head.dtype, device=hidden.device)


def _check_numbers(options: HeadOptions) -> None:
    for name in ("multiplier", "softcap"):
        value = getattr(options, name)
        if isinstance(value, torch.Tensor):
            raise NotImplementedError(f"{name}: must be a number; a tensor's gradient is not computed")
        if not (isinstance(value, int | float) and math.isfinite(value)) and not (name == "softcap" and value is None):
            raise ValueError(f"{name} must be a finite number, not {value!r}")
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, not {options.softcap}")


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, options: HeadOptions) -> None:
    for name, given in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if not isinstance(given, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(given).__name__}")
    if hidden.is_meta:
        raise ValueError("hidden is on meta, which holds no numbers to compute with")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [N, D], not {list(hidden.shape)}; flatten batch and sequence")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(f"weight must be [V, D] with D = {hidden.shape[1]} as in hidden, not {list(weight.shape)}")
    if weight.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must share one of {[str(dtype) for dtype in DTYPES]}, not {hidden.dtype} and "
            f"{weight.dtype}; cast one to the other's"
        )
    if targets.dim() not in (1, 2) or len(targets) != len(hidden) or (targets.dim() == 2 and targets.shape[1] == 0):
        raise ValueError(f"targets must be [N] or [N, K] with N = {len(hidden)}, not {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
    if options.bias is not None and options.bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{len(weight)}], not {list(options.bias.shape)}")
    if options.bias is not None and not options.bias.is_floating_point():
        raise ValueError(f"bias must be floats, not {options.bias.dtype}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", options.bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move one to the other's")
    _check_adapters(hidden, weight, options.lora)


def _check_adapters(hidden: torch.Tensor, weight: torch.Tensor, lora: Adapters) -> None:
    end = 0
    for number, each in enumerate(as_segments(lora, len(hidden))):
        if not isinstance(each.start, int) or not isinstance(each.stop, int):
            raise ValueError(f"lora[{number}].start and stop must be ints, not {each.start!r} and {each.stop!r}")
        if isinstance(each.scale, torch.Tensor):
            raise NotImplementedError(f"lora[{number}].scale: must be a number; a tensor's gradient is not computed")
        if not end <= each.start <= each.stop <= len(hidden):
            raise ValueError(
                f"lora[{number}] covers tokens {each.start} to {each.stop}: segments must be in order, without overlap "
                f"and within the {len(hidden)} tokens"
            )
        end = each.stop
        if (each.a is None) != (each.b is None):
            raise ValueError(f"lora[{number}] has only one of a and b; give both, or neither for the base alone")
        if each.a is None or each.b is None:
            continue
        if each.grad_a is not None or each.grad_b is not None:
            raise ValueError(f"lora[{number}].grad_a and grad_b must be None: gradients are left to autograd here")
        if each.a.dim() != 2 or each.a.shape[1] != hidden.shape[1]:
            raise ValueError(f"lora[{number}].a must be [r, D] with D = {hidden.shape[1]}, not {list(each.a.shape)}")
        if each.b.shape != (len(weight), len(each.a)):
            wanted = [len(weight), len(each.a)]
            raise ValueError(f"lora[{number}].b must be [V, r] = {wanted}, not {list(each.b.shape)}")
        for name, tensor in (("a", each.a), ("b", each.b)):
            if tensor.device != hidden.device or not tensor.is_floating_point():
                raise ValueError(f"lora[{number}].{name} must be floats on {hidden.device}, not {tensor.dtype} there")


def _check_range(targets: torch.Tensor, vocab: int, ignore: int) -> None:
    outside = ((targets < 0) | (targets >= vocab)) & (targets != ignore)
    if bool(outside.any()):
        row, k = outside.nonzero()[0].tolist()
        raise ValueError(
            f"targets[{row}, {k}] is {int(targets[row, k])}, outside the vocabulary of {vocab}; "
            f"{ignore} marks a token to ignore"
        )
