"""Bodies are counted before they are made: what they may hold, and what hostile ones take of memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from served import datum, pass_body
from tickwork.errors import InvalidRequestError
from tickwork.server import wire, wire_count
from tickwork.server.answers import HttpError
from tickwork.server.body import Bodies, json_of
from tickwork.server.wire_count import Most, check_counts


def test_no_small_body_takes_much_memory():
    """Thirty bodies that would become hundreds of MiB if they were parsed are refused in a few times their size."""
    script = Path(__file__).with_name("hostile.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (status, told, size, grown) in found.items():
        assert grown < 48 + 4 * size, name
        assert status in (413, 422) or "error" in told or name == "telemetry: wrong items", (name, told)
    assert len(found) > 25


def check(body, most, small=0):
    """Count all of a body, however small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire_count, "SMALL", small)
        check_counts(body, most)


def body_of(datums, tokens=10):
    return pass_body("m", 1, [datum([1] * (tokens + 1)) for _ in range(datums)])


def test_datums_and_tokens_are_counted():
    check(body_of(3), Most(3, 30))
    with pytest.raises(InvalidRequestError, match="more than 2 datums"):
        check(body_of(3), Most(2, 30))
    with pytest.raises(InvalidRequestError, match="more than 29 tokens"):
        check(body_of(3), Most(3, 29))


def test_a_body_with_too_much_uses_its_number_up():
    """The client goes on with the next one."""
    found = wire.open_training(body_of(3), Most(2))
    assert (found.model_id, found.seq_id) == ("m", 1)
    with pytest.raises(InvalidRequestError, match="more than 2 datums"):
        found.ask()


@given(st.binary(max_size=64), st.integers(0, 300))
def test_no_bytes_upset_the_count(noise, at):
    """What is no protobuf is left to the parser; the count ends, and says nothing else than that there is too much."""
    good = body_of(2)
    for body in (noise, good[:at] + noise + good[at:], good[:at]):
        with contextlib.suppress(InvalidRequestError):
            check(body, Most(4, 100))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_what_the_sdk_sends_is_counted_right(lengths):
    """The bound is exact: as many tokens as there are pass, one fewer does not."""
    body = pass_body("m", 1, [datum([1] * (length + 1)) for length in lengths])
    check(body, Most(len(lengths), sum(lengths)))
    with pytest.raises(InvalidRequestError, match="tokens"):
        check(body, Most(len(lengths), sum(lengths) - 1))


@pytest.mark.parametrize("text", [b"[" * 200_000, b"{" * 200_000, b"," * 3_000_000, b":" * 70_000])
def test_json_is_counted_before_it_is_parsed(text):
    with pytest.raises(HttpError, match="holds more than") as refused:
        json_of(text)
    assert refused.value.status == 413


def test_bytes_are_given_back():
    """However a request ends."""
    from types import SimpleNamespace

    bodies, request = Bodies(100), SimpleNamespace(state=SimpleNamespace())
    with pytest.raises(KeyError), bodies.of(request):
        request.state.taken.take(150)
        other = SimpleNamespace(state=SimpleNamespace())
        with bodies.of(other), pytest.raises(HttpError, match="too much"):
            other.state.taken.take(1)
        raise KeyError
    assert bodies.held == 0
