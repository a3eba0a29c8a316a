"""What stands for a custom loss in the journal, which holds data and never code."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np

from tickwork.errors import LossError
from tickwork.requests import CustomLoss


@attrs.frozen(eq=False)
class GraphLoss:
    """A loss that was made from a graph: to be replaced, before its request runs, by the loss of that id."""

    loss_id: str

    def __call__(self, *_: Any) -> Any:
        """Refuse to be called.

        Raises:
            LossError: always.
        """
        raise LossError(f"the loss {self.loss_id!r} is not made: create it again")


@attrs.frozen(eq=False)
class MadeLoss(GraphLoss):
    """The loss itself, which is stored by its id.

    Args:
        made: what the graph describes.
    """

    made: CustomLoss

    def __call__(self, *given: Any) -> Any:
        """Call it."""
        return self.made(*given)


@attrs.frozen(eq=False)
class PastLoss:
    """A callable of a process that has ended.

    Args:
        name: its module and name.
        gradients: d loss / d logprobs of each datum, float32, if it was called before the end; with them its request
            can be applied again, without them it can not.
    """

    name: str
    gradients: tuple[np.ndarray, ...] | None = None

    def __call__(self, *_: Any) -> Any:
        """Refuse to be called.

        Raises:
            LossError: always.
        """
        raise LossError(f"the custom loss {self.name} went with the process that defined it: submit the request again")


def stored(loss: str | CustomLoss) -> str | GraphLoss | PastLoss:
    """Return what stands for a loss: a name for itself, a graph's by its id, a callable by its name alone."""
    if isinstance(loss, MadeLoss):
        return GraphLoss(loss.loss_id)
    if isinstance(loss, str | GraphLoss | PastLoss):
        return loss
    kind = loss if hasattr(loss, "__qualname__") else type(loss)
    return PastLoss(f"{kind.__module__}.{kind.__qualname__}")
