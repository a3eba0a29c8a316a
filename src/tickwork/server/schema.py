"""The protobuf messages of the wire, made from a table.

They live in a descriptor pool of their own, so that the official SDK's messages of the same names can be in the same
process. Source: the field numbers that the official SDK sends and reads.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "tinker_public"

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
STOP, LENGTH = 0, 1

# One field a line: number, type, name. "*" is repeated, "?" knows whether it is set, "|" is one of its message's
# alternatives, "<" is a map from strings.
MESSAGES: dict[str, str] = {
    "SampleResponse": """
        1 *SampledSequence sequences
        2 ?bytes prompt_logprobs
        3 ?TopkLogprobs topk_prompt_logprobs
        4 int32 prompt_cache_hit_tokens
        5 ?Tensor target_prompt_logprobs
        6 ?PromptAltTokens prompt_alt_tokens""",
    "PromptAltTokens": """
        1 Tensor tokens
        2 Tensor logprobs""",
    "SampledSequence": """
        1 enum stop_reason
        2 bytes tokens
        3 ?bytes logprobs
        4 ?TopkLogprobs topk_sampled_logprobs""",
    "TopkLogprobs": """
        1 bytes token_ids
        2 bytes logprobs
        3 uint32 k
        4 uint32 length""",
    "SparseCsr": """
        1 bytes values
        2 bytes crow_indices
        3 bytes col_indices""",
    "Tensor": """
        1 |bytes dense
        2 |SparseCsr sparse_csr
        3 enum dtype
        4 *int64 shape""",
    "BatchedTensor": """
        1 bytes data
        2 bytes offsets
        3 enum dtype
        4 *int64 trailing_shape""",
    "ArrayRecord": """
        1 string type_tag
        2 <BatchedTensor fields
        3 int64 num_datums""",
    "ForwardBackwardOutput": """
        1 string loss_fn_output_type
        2 *ArrayRecord loss_fn_outputs
        3 <double metrics""",
    "ForwardBackwardRequest": """
        1 string model_id
        2 int32 seq_id
        3 *Datum data
        4 string loss_fn
        5 <double loss_fn_config
        6 bool forward_only
        7 <LossConfigValue loss_fn_config_v2""",
    "LossConfigValue": """
        1 |double number
        2 |string text""",
    "Datum": """
        1 *Chunk model_input
        2 <Tensor loss_fn_inputs
        3 *ProvenanceSpan model_input_spans
        4 *ProvenanceSpan loss_fn_input_spans""",
    "ProvenanceSpan": """
        1 |Span prompt_tokens
        2 |Span sampled_tokens""",
    "Span": """
        1 string sequence_id
        2 int64 offset
        3 int64 length""",
    "Chunk": """
        1 |EncodedTextChunk encoded_text
        2 |bytes image
        3 |bytes dmel""",
    "EncodedTextChunk": """
        1 bytes tokens""",
}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bytes": _Field.TYPE_BYTES,
    "string": _Field.TYPE_STRING,
    "double": _Field.TYPE_DOUBLE,
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    # Enumerations are open: whatever number comes is kept, and judged by what reads it.
    "enum": _Field.TYPE_INT32,
}


def _add_message(file: Any, name: str, table: str) -> None:
    message = file.message_type.add(name=name)
    lines = [line.split() for line in table.strip().splitlines()]
    if any(kind.startswith("|") for _, kind, _ in lines):
        message.oneof_decl.add(name="alternative")
    for number, kind, field_name in lines:
        _add_field(message, int(number), kind, field_name)
    # Presence of a single field is a choice of its own, after the real ones.
    for field in message.field:
        if field.proto3_optional:
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")


def _add_field(message: Any, number: int, kind: str, name: str) -> None:
    mark = kind[0] if kind[0] in "*?|<" else ""
    kind = kind.removeprefix(mark)
    if mark == "<":
        entry = f"{name.title().replace('_', '')}Entry"
        nested = message.nested_type.add(name=entry)
        nested.options.map_entry = True
        _add_field(nested, 1, "string", "key")
        _add_field(nested, 2, kind, "value")
        kind = f"{message.name}.{entry}"
    repeated = mark in ("*", "<")
    field = message.field.add(name=name, number=number, proto3_optional=mark == "?")
    field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if mark == "|":
        field.oneof_index = 0
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"


def _make() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="tickwork_wire.proto", package=PACKAGE, syntax="proto3")
    for name, table in MESSAGES.items():
        _add_message(file, name, table)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


_classes = _make()
ForwardBackwardRequest: Any = _classes["ForwardBackwardRequest"]
ForwardBackwardOutput: Any = _classes["ForwardBackwardOutput"]
SampleResponse: Any = _classes["SampleResponse"]
