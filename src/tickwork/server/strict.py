"""How JSON bodies are checked: strictly, and nothing that is not known is taken."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tickwork.errors import InvalidRequestError

Seq = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Metadata = dict[str, str]

# How many errors of one body are told.
MOST_ERRORS = 3


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


M = TypeVar("M", bound=Body)


def parse(model: type[M], value: object) -> M:
    """Check a JSON value.

    Raises:
        InvalidRequestError: naming the fields.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        told = "; ".join(f"{_field(item['loc'])}: {item['msg']}" for item in found[:MOST_ERRORS])
        more = f"; and {len(found) - MOST_ERRORS} more" if len(found) > MOST_ERRORS else ""
        raise InvalidRequestError(told + more) from None


def _field(where: tuple[int | str, ...]) -> str:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:100]}" for part in where)
    return name.lstrip(".") or "body"
