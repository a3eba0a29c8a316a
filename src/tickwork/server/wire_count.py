"""What a protobuf body of a pass holds, counted before it is parsed: two bytes may become an object of hundreds."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from tickwork.errors import InvalidRequestError
from tickwork.server.schema import MESSAGES

# Bodies up to this size are counted by datums alone: what else is in them can not become much.
SMALL = 2**20
# Fields, those of datums included: of any body, for each datum, and of all.
FREE_FIELDS, DATUM_FIELDS, MOST_FIELDS = 1024, 256, 2**22
# Bytes of one tensor's shape.
MOST_SHAPE = 256

# Message -> field number -> the message in it; the entry of a map is one whose field 2 is the value.
_INSIDE: dict[str, dict[int, str]] = {}


def _read_table() -> None:
    for name, table in MESSAGES.items():
        _INSIDE[name] = {}
        for number, kind, _ in (line.split() for line in table.strip().splitlines()):
            inner = kind.lstrip("*?|<")
            if kind.startswith("<"):
                _INSIDE[f"{inner} entry"] = {2: inner}
                inner = f"{inner} entry"
            _INSIDE[name][int(number)] = inner


_read_table()
_DATA = next(int(line.split()[0]) for line in MESSAGES["ForwardBackwardRequest"].splitlines() if line.endswith(" data"))
_SHAPE = next(int(line.split()[0]) for line in MESSAGES["Tensor"].splitlines() if line.endswith(" shape"))


@attrs.frozen
class Most:
    """Bounds of one pass.

    Args:
        datums: rows.
        tokens: token ids of all rows.
    """

    datums: int = 100_000
    tokens: int = 2**24


def check_counts(body: bytes, most: Most) -> None:
    """Refuse a body that holds more than is taken; one that is no protobuf is left to the parser.

    Raises:
        InvalidRequestError: saying what there is too much of.
    """
    datums = others = 0
    for number, _, _ in _fields(body, 0, len(body)):
        datums, others = datums + (number == _DATA), others + (number != _DATA)
        if datums > most.datums:
            raise InvalidRequestError(f"more than {most.datums} datums in one request", field="data")
        if others > FREE_FIELDS:
            raise InvalidRequestError(f"more than {FREE_FIELDS} fields beside the datums", field="loss_fn_config")
    if len(body) > SMALL:
        _check_inside(body, min(FREE_FIELDS + DATUM_FIELDS * datums, MOST_FIELDS), most.tokens)


def _check_inside(body: bytes, most_fields: int, most_tokens: int) -> None:
    left, tokens = [("ForwardBackwardRequest", 0, len(body))], 0
    while left:
        message, start, stop = left.pop()
        inside = _INSIDE.get(message, {})
        for number, begin, end in _fields(body, start, stop):
            most_fields -= 1
            inner = inside.get(number)
            if inner in _INSIDE:
                left.append((inner, begin, end))
            elif message == "EncodedTextChunk":
                tokens += (end - begin) // 4
            elif message == "Tensor" and number == _SHAPE and end - begin > MOST_SHAPE:
                raise InvalidRequestError(f"more than {MOST_SHAPE} bytes", field="shape")
            if most_fields < 0:
                raise InvalidRequestError("the datums have more fields than are taken", field="data")
            if tokens > most_tokens:
                raise InvalidRequestError(f"more than {most_tokens} tokens in one request", field="data")


def _fields(body: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field of a message, and where its bytes begin and end; stop at what is no field."""
    while at < stop:
        key, at = _varint(body, at, stop)
        kind, begin = key & 7, at
        if kind == 0:
            _, at = _varint(body, at, stop)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == 2:
            size, begin = _varint(body, at, stop)
            at = begin + size
        else:
            return
        if at > stop:
            return
        yield key >> 3, begin, at


def _varint(body: bytes, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = body[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    return 0, stop + 1
