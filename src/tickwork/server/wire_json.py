"""Passes in JSON, as SDKs before 0.25 send them."""

from __future__ import annotations

from typing import Any

from tickwork.errors import InvalidRequestError
from tickwork.server.bodies_sampling import ModelInput, Tensor
from tickwork.server.strict import Body, Items, parse
from tickwork.types import Datum, EncodedTextChunk
from tickwork.types import ModelInput as Tokens


class DatumBody(Body):
    """One datum."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, Tensor]

    def datum(self, index: int) -> Datum:
        """Return it as ours.

        Raises:
            InvalidRequestError: naming the datum and the field.
        """
        try:
            inputs = {name: given.tensor(f"loss_fn_inputs[{name!r}]") for name, given in self.loss_fn_inputs.items()}
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), datum=index) from None
        return Datum(Tokens(tuple(EncodedTextChunk(chunk.tokens) for chunk in self.model_input.chunks)), inputs)


class PassInput(Body):
    """Datums and their loss."""

    data: Items[DatumBody]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackward(Body):
    """A pass with a gradient."""

    forward_backward_input: PassInput
    model_id: str
    seq_id: int
    type: str = "forward_backward"


class Forward(Body):
    """A pass without."""

    forward_input: PassInput
    model_id: str
    seq_id: int
    type: str = "forward"


def number_of(value: Any) -> tuple[Any, Any]:
    """Return what a JSON body has for its model and number."""
    return (value.get("model_id"), value.get("seq_id")) if isinstance(value, dict) else (None, None)


def pass_of(value: object, forward_only: bool) -> PassInput:
    """Check a JSON body.

    Raises:
        InvalidRequestError: naming the field.
    """
    return parse(Forward, value).forward_input if forward_only else parse(ForwardBackward, value).forward_backward_input
