"""Tests of the journal's codec: what is written is read bit by bit, and nothing else is ever read."""

from __future__ import annotations

import json
import math
import struct
from datetime import UTC, datetime
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from tickwork import errors, requests, results
from tickwork.errors import InvalidRequestError, JournalError, LossError
from tickwork.journal.codec import _pack, decode, encode
from tickwork.journal.columns import Column, Columns
from tickwork.journal.fields import fields
from tickwork.journal.losses import GraphLoss, PastLoss
from tickwork.journal.numbers import SHORTEST_RUN, Numbers, as_run
from tickwork.journal.records import LaneRecord, LossRecord, SamplerRecord, SessionRecord
from tickwork.journal.values import BY_CLASS, ERRORS
from tickwork.tensors import TensorData
from tickwork.types import AdamParams, Datum, EncodedTextChunk, LoraConfig, ModelInput, SamplingParams

FAST = settings(max_examples=60, deadline=None)

text = st.text(max_size=8)
ids = st.text(min_size=1, max_size=8)
counts = st.integers(0, 2**70)
words = st.integers(-(2**63), 2**63 - 1)
reals = st.floats(width=64)
singles = st.floats(width=32)
metadata = st.dictionaries(text, text, max_size=3)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def runs(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Lists, short ones and such as are stored as arrays."""
    return st.lists(values, max_size=3) | st.lists(values, min_size=SHORTEST_RUN, max_size=SHORTEST_RUN + 4)


@st.composite
def tensors(draw: st.DrawFn) -> TensorData:
    dtype = draw(st.sampled_from(["float32", "int64"]))
    shape = draw(stnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    if draw(st.booleans()):
        return TensorData([1.0, 2.0, 3.0], "float32", (3, 4), (0, 1, 1, 3), (2, 0, 3))
    return TensorData(draw(stnp.arrays(dtype, shape)), dtype, shape)


def build(cls: type, **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of a class, each field given or of its annotated type."""
    rest = {name: st.from_type(hint) for name, hint in fields(cls).items() if name not in given}
    return st.builds(cls, **given, **rest)


chunks = build(EncodedTextChunk, tokens=runs(counts).map(tuple))
inputs = st.lists(chunks, max_size=2).map(ModelInput)
datums = build(Datum, model_input=inputs, loss_fn_inputs=st.dictionaries(ids, tensors(), max_size=2))
loras = build(LoraConfig, rank=counts, seed=maybe(words))
encoded = st.recursive(
    st.none() | st.booleans() | words | reals | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=6,
)
nodes = build(requests.LossNode, args=st.lists(encoded, max_size=3), kwargs=st.dictionaries(text, encoded, max_size=2))
graphs = build(
    requests.LossGraph,
    inputs=st.lists(st.tuples(text, st.integers(0, 2)), max_size=2).map(tuple),
    nodes=st.lists(nodes, max_size=2).map(tuple),
)
losses = (
    text
    | st.builds(GraphLoss, text)
    | st.builds(
        PastLoss, text, maybe(st.lists(stnp.arrays("<f4", st.tuples(st.integers(0, 9))), max_size=2).map(tuple))
    )
)
stops = st.none() | text | st.lists(text, max_size=2) | st.lists(words, max_size=2).map(tuple)
params = build(SamplingParams, max_tokens=maybe(counts), seed=maybe(words), stop=stops, temperature=reals, top_p=reals)
REQUESTS = {
    requests.CreateModel: build(requests.CreateModel, lora=maybe(loras), user_metadata=maybe(metadata), model_id=text),
    requests.OptimStep: build(requests.OptimStep, params=build(AdamParams, learning_rate=reals, eps=reals)),
    requests.Save: build(
        requests.Save,
        kind=st.sampled_from(["weights", "sampler_weights"]),
        ttl_seconds=maybe(counts),
        user_metadata=maybe(metadata),
    ),
    requests.Load: build(requests.Load),
    requests.OpenSampler: build(requests.OpenSampler, base_model=maybe(text), path=maybe(text), model_id=maybe(text)),
    requests.Release: build(requests.Release),
    requests.Sample: build(
        requests.Sample,
        prompt=runs(counts).map(tuple),
        params=params,
        prompt_logprobs_last_n=maybe(counts),
        target_prompt_logprobs=maybe(tensors()),
    ),
    requests.MakeLoss: build(requests.MakeLoss, graph=graphs),
}
metrics = st.dictionaries(text, reals, max_size=3)
pairs = st.lists(st.tuples(words, reals), max_size=2)
sequences = build(
    results.SampledSequence,
    stop_reason=st.sampled_from(["stop", "length"]),
    tokens=runs(counts),
    logprobs=runs(singles) | runs(reals),
    topk_logprobs=maybe(st.lists(pairs, max_size=2)),
)
RESULTS = {
    results.ForwardBackwardOutput: build(
        results.ForwardBackwardOutput,
        loss_fn_outputs=st.lists(st.dictionaries(text, tensors(), max_size=2), max_size=2),
        metrics=metrics,
    ),
    results.OptimStepResponse: build(results.OptimStepResponse, metrics=metrics),
    results.SaveWeightsResponse: build(results.SaveWeightsResponse),
    results.SaveWeightsForSamplerResponse: build(results.SaveWeightsForSamplerResponse, path=maybe(text)),
    results.SaveWeightsExternalResponse: build(results.SaveWeightsExternalResponse, size_bytes=maybe(counts)),
    results.LoadWeightsResponse: build(results.LoadWeightsResponse),
    results.GetInfoResponse: build(results.GetInfoResponse, lora_rank=maybe(counts), seed=maybe(words)),
    results.SampleResponse: build(
        results.SampleResponse,
        sequences=st.lists(sequences, max_size=2),
        prompt_logprobs=maybe(runs(maybe(reals))),
        topk_prompt_logprobs=maybe(st.lists(maybe(pairs), max_size=2)),
        target_prompt_logprobs=maybe(tensors()),
        prompt_alt_tokens=maybe(build(results.PromptAltTokens, tokens=tensors(), logprobs=tensors())),
    ),
}
RECORDS = {
    SessionRecord: build(
        SessionRecord,
        user_metadata=metadata,
        created_at=st.datetimes(timezones=st.just(UTC)),
        tags=st.lists(text, max_size=2).map(tuple),
        finish=maybe(st.dictionaries(text, encoded, max_size=2)),
    ),
    LaneRecord: build(LaneRecord, lora=maybe(loras), base_model=maybe(text)),
    SamplerRecord: build(SamplerRecord, model_path=maybe(text)),
    LossRecord: build(LossRecord, graph=graphs),
}


def same(one: Any, other: Any) -> bool:
    """Whether two values are of one type and equal in every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, BaseException):
        return one.args == other.args and vars(one) == vars(other)
    if attrs.has(type(one)):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in attrs.fields(type(one)))
    return bool(one == other)


@FAST
@given(st.one_of(*REQUESTS.values(), *RESULTS.values(), *RECORDS.values()))
def test_what_is_written_is_read(value: Any) -> None:
    """Requests, results and records come back with every bit: NaN, infinities, big numbers, empty arrays, any text."""
    assert same(decode(encode(value)), value)


@FAST
@given(st.lists(datums, max_size=2).map(tuple), losses, st.dictionaries(text, encoded, max_size=2), st.booleans())
def test_passes_are_read_with_their_data(data: Any, loss: Any, config: Any, backward: bool) -> None:
    """A pass comes back with its datums, its named or graph loss, and the gradients that a callable gave."""
    ask = requests.ForwardBackward("m", data, loss, config, backward, given=data)
    assert same(decode(encode(ask)), ask)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Datum, ...]:
    """Datums that are alike, as those of a training script are."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    names = draw(st.lists(ids, min_size=1, max_size=3, unique=True))
    dtypes = {name: draw(st.sampled_from(["float32", "int64"])) for name in names}
    tail = draw(st.lists(st.integers(0, 3), max_size=2))

    def inputs(length: int) -> dict[str, TensorData]:
        shape = (length, *tail)
        return {name: TensorData(draw(stnp.arrays(dtype, shape)), dtype, shape) for name, dtype in dtypes.items()}

    tokens = st.integers(-(2**31), 2**31 - 1)
    return tuple(
        Datum(ModelInput.from_ints(draw(st.lists(tokens, min_size=n, max_size=n))), inputs(n)) for n in lengths
    )


@FAST
@given(batches())
def test_batches_are_read_from_their_columns(data: tuple[Datum, ...]) -> None:
    """Datums that are alike are stored name by name, and come back with every bit; so do the outputs of a pass."""
    ask = requests.ForwardBackward("m", data, "cross_entropy", {}, True, given=data)
    body = encode(ask)
    assert (b"Columns" in body) == any(datum.model_input.length for datum in data)
    assert same(decode(body), ask)
    told = results.ForwardBackwardOutput("ArrayRecord", [datum.loss_fn_inputs for datum in data], {"loss:sum": 0.5})
    assert b"Column" in encode(told)
    assert same(decode(encode(told)), told)


UNEVEN = Column("float32", np.zeros(3, "<f4"), np.array([[1], [1]]))


@pytest.mark.parametrize(
    "columns",
    [
        Columns(np.arange(3, dtype="<i4"), np.array([1, 1]), {}),
        Columns(np.arange(3, dtype="<i4"), np.array([4, -1]), {}),
        Columns(np.arange(3, dtype="<i4"), np.array([1.0, 2.0]), {}),
        Columns(np.arange(3, dtype="<i4"), np.array([1, 2]), {"weights": UNEVEN}),
        Columns(np.arange(3, dtype="<i4"), np.array([3]), {"weights": Column("int64", np.zeros(3), np.array([[3]]))}),
        Columns(np.arange(3, dtype="<i4"), np.array([1, 2]), {"w": Column("float32", UNEVEN.values, np.array([[3]]))}),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(columns: Columns) -> None:
    """Nothing is cut where its lengths do not say so."""
    tree = json.loads(encode(requests.ForwardBackward("m", (), "x", {}, True, ()))[10:].decode("ascii"))
    numbers = Numbers()
    tree["ForwardBackward"]["data"] = _pack(columns, numbers)
    with pytest.raises(JournalError):
        decode(frame(json.dumps(tree), b"".join(numbers.parts)))


@FAST
@given(st.lists(st.none() | words | reals | text | stnp.arrays("<f4", 3), max_size=4), st.booleans())
def test_plain_values_are_read(values: list[Any], as_tuple: bool) -> None:
    """Lists and tuples of plain values and arrays stay what they are."""
    value = tuple(values) if as_tuple else values
    assert same(decode(encode(value)), value)


def test_every_stored_class_is_tried() -> None:
    """No class of the table is left out above."""
    inner = {Datum, ModelInput, EncodedTextChunk, TensorData, AdamParams, LoraConfig, SamplingParams}
    inner |= {Column, Columns, requests.ForwardBackward, requests.LossNode, requests.LossGraph, GraphLoss, PastLoss}
    inner |= {results.ModelData, results.SampledSequence, results.PromptAltTokens}
    tried = {cls.__name__ for cls in inner | REQUESTS.keys() | RESULTS.keys() | RECORDS.keys()}
    assert {cls.__name__ for cls in BY_CLASS} == tried | {"AdamOptimizerConfig"}


def test_every_error_of_the_tree_is_read() -> None:
    """Each class of the tree comes back by its name, with its message and fields."""
    found = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.TickworkError)]
    assert set(found) == set(ERRORS)
    for cls in found:
        assert same(decode(encode(cls("what is wrong: ünïcode"))), cls("what is wrong: ünïcode"))
    wrong = InvalidRequestError("is bad", field="loss_fn_inputs['x']", datum=3)
    again = decode(encode(wrong))
    assert (str(again), again.field, again.datum) == (str(wrong), wrong.field, 3)
    assert same(decode(encode(JournalError("gone", lane="m", number=7))), JournalError("gone", lane="m", number=7))


def test_an_error_of_a_subclass_is_stored_as_its_nearest_class() -> None:
    """A class that others define is no class of the journal's; what it is a kind of is."""

    class OwnError(LossError):
        """A kind of LossError."""

    again = decode(encode(OwnError("mine")))
    assert type(again) is LossError
    assert str(again) == "mine"


def test_a_callable_is_stored_by_name_and_fails_by_name() -> None:
    """A loss in process is not stored: its request says, when it is called again, what is gone."""

    def my_loss(data: Any, logprobs: Any) -> Any:
        return None

    ask = requests.ForwardBackward("m", (), my_loss, {}, True, given=("what the caller gave",))
    again = decode(encode(ask))
    assert again.loss_fn.gradients is None
    with pytest.raises(LossError, match=r"my_loss went with the process"):
        again.loss_fn([], [])
    with pytest.raises(LossError, match="'s:loss:1' is not made"):
        GraphLoss("s:loss:1")([], [])


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1: 2},
        {"a": b"bytes"},
        [lambda: 0],
        [10**5000],
        np.zeros(2, complex),
        ValueError("not ours"),
        AdamParams(learning_rate="fast"),  # type: ignore[arg-type]
        requests.OptimStep("m", None),  # type: ignore[arg-type]
        SamplingParams(max_tokens=True),
        LoraConfig(rank=2.5),  # type: ignore[arg-type]
    ],
)
def test_what_could_not_be_read_is_not_written(value: Any) -> None:
    """Foreign values, and ours with fields of a wrong type, are refused before they are in the journal."""
    with pytest.raises(JournalError, match="stored"):
        encode(value)


def test_a_list_within_itself_is_refused() -> None:
    """What never ends is no value."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(JournalError):
        encode(endless)


def test_numbers_are_compact() -> None:
    """Tokens take 4 bytes each, logprobs that are float32 as well; only what needs it takes 8."""
    assert as_run([5] * 8).dtype == "<i4"  # type: ignore[union-attr]
    assert as_run([2**40] * 8).dtype == "<i8"  # type: ignore[union-attr]
    assert as_run([2**70] * 8) is None
    assert as_run([0.5, math.nan] * 4).dtype == "<f4"  # type: ignore[union-attr]
    assert as_run([0.1] * 8).dtype == "<f8"  # type: ignore[union-attr]
    assert as_run([1, True] * 8) is None
    prompt = tuple(range(4000))
    assert len(encode(requests.Sample("k", prompt, 1, SamplingParams()))) < 4 * 4000 + 600


GOOD = encode(
    requests.ForwardBackward(
        "m", (Datum(ModelInput.from_ints(range(9)), {"weights": [1.0] * 9}),), "cross_entropy", {"x": math.inf}, True
    )
)


def survives(body: bytes) -> None:
    """Read bytes: a value or a JournalError, nothing else."""
    try:
        decode(body)
    except JournalError:
        pass


@FAST
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.integers(0, len(GOOD)))
def test_damaged_bytes_give_a_value_or_a_journal_error(place: int, flip: int, end: int) -> None:
    """A changed byte, a cut and an addition are read as some value or refused by name."""
    changed = bytearray(GOOD)
    changed[place] ^= flip
    survives(bytes(changed))
    for body in (GOOD[:end], GOOD + bytes(changed[:end])) if end < len(GOOD) else (GOOD + b"\0",):
        if body != GOOD:
            with pytest.raises(JournalError):
                decode(body)


def frame(tree: str | bytes, numbers: bytes = b"", version: int = 1) -> bytes:
    """Return a body of any tree."""
    raw = tree if isinstance(tree, bytes) else tree.encode()
    return struct.pack("<4sHI", b"TKWJ", version, len(raw)) + raw + numbers


TAGS = [
    "tuple",
    "map",
    "float",
    "time",
    "array",
    "run",
    "error",
    *(kind.name for kind in BY_CLASS.values()),
    "os.system",
]
trees = st.recursive(
    st.none()
    | st.booleans()
    | words
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
    | st.sampled_from(["<f4"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(TAGS), inner, min_size=1, max_size=1)
        | st.dictionaries(text, inner, max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(trees, st.binary(max_size=16))
@example({"array": ["<f4", [10**30, 0]]}, b"")
@example({"array": ["<f4", [2**40]]}, b"")
@example({"array": ["O", [1]]}, b"\0" * 8)
@example({"error": [["LossError"], "x", {}]}, b"")
@example({"error": ["InvalidRequestError", "x", {"field": [], "datum": None}]}, b"")
@example({"tuple": "ab"}, b"")
def test_no_tree_leads_to_anything_but_a_journal_error(tree: Any, numbers: bytes) -> None:
    """Whatever the structure says, reading it ends in a value or a JournalError."""
    survives(frame(json.dumps(tree), numbers))


@FAST
@given(st.binary(max_size=64))
def test_no_bytes_lead_to_anything_but_a_journal_error(raw: bytes) -> None:
    """Whatever the bytes, with a head or without."""
    with pytest.raises(JournalError):
        decode(raw if not raw.startswith(b"TKWJ") else b"")
    survives(frame(raw))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (frame("1", version=2), "is of format 2; this version of Tickwork reads 1"),
        (b"", "no body"),
        (frame("[1,2")[:-1], "cut short"),
        (frame("1", b"\0"), "1 bytes belong to nothing"),
        (frame('{"Explode": {}}'), "'Explode' is no kind"),
        (frame('{"error": ["SystemExit", "x", {}]}'), "'SystemExit' is no error"),
        (frame('{"Release": {}}'), "Release has fields too many or too few: key"),
        (frame('{"Release": {"key": "a", "more": 1}}'), "too many or too few: more"),
        (frame('{"Release": {"key": 3}}'), "Release.key holds 3"),
        (frame('{"a": 1, "b": 2}'), "2 keys"),
        (frame('{"map": {"a": 1, "a": 2}}'), "comes twice"),
        (frame("NaN"), "NaN is no JSON"),
        (frame("1e999"), "1e999 is no JSON"),
        (frame("[" * 100_000), "RecursionError"),
        (frame("1" * 5000), "ValueError"),
        (frame('{"run": ["<i4", [2]]}', b"\0" * 7), "cut short"),
    ],
)
def test_bad_bodies_are_named(body: bytes, why: str) -> None:
    """Versions, kinds and fields that are not known are told by name."""
    with pytest.raises(JournalError) as caught:
        decode(body)
    assert why in str(caught.value)


def test_times_are_read() -> None:
    """A moment keeps its zone."""
    now = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
    assert decode(encode([now])) == [now]
