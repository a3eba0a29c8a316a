"""How JSON bodies are checked: strictly, and nothing that is not known is taken."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tickwork.errors import InvalidRequestError

Seq = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[int, Field(ge=-(2**63), lt=2**63)]
# How many errors of one body are told, and characters of what is kept of one: of a name, and of metadata all together.
MOST_ERRORS, MOST_NAME, MOST_METADATA = 3, 1000, 2**16

T = TypeVar("T")
# A list is wrong with its first wrong item: a million errors would be a million objects.
Items = Annotated[list[T], Field(fail_fast=True)]
Name = Annotated[str, Field(max_length=MOST_NAME)]


def _small(value: dict[str, str]) -> dict[str, str]:
    if sum(len(key) + len(text) for key, text in value.items()) > MOST_METADATA:
        raise ValueError(f"more than {MOST_METADATA} characters")
    return value


Metadata = Annotated[dict[str, str], AfterValidator(_small)]


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
