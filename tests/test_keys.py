"""Keys: who they stand for, and that a file holds their digests alone."""

from __future__ import annotations

import hashlib
import hmac

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tickwork.cli import main
from tickwork.errors import InvalidRequestError
from tickwork.server.keys import Keys, new_key, read_keys, stored

LONG = "tml-0123456789abcdef"


def digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def run(*arguments: str, given: str = "") -> click.testing.Result:
    return CliRunner().invoke(main, arguments, input=given)


def test_digests_are_read_from_a_file_and_keys_from_the_environment(tmp_path):
    """A file's entries are digests with comments; the variable takes either form."""
    file = tmp_path / "keys"
    file.write_text(f"# who may come in\n{digest('tml-key1')} ann 2 # her laptop\n\n{digest('tml-key2')}\n")
    keys = read_keys(file, f"tml-key3,{digest('tml-key5')} eve")
    assert (keys.owner("tml-key1"), keys.share("ann"), keys.owner("tml-key5")) == ("ann", 2.0, "eve")
    owners = {keys.owner(key) for key in ("tml-key1", "tml-key2", "tml-key3")}
    assert len(owners) == 3 and None not in owners and "" not in owners
    assert keys.owner("tml-key4") is None
    assert keys.owner(digest("tml-key1")) is None, "a digest opens nothing"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tml-key1 ann", "line 1 .*keys hash"),
        (f"{digest('tml-a123')} ann\nshort", "line 2 .*keys hash"),
        (f"{digest('tml-a123')} ann\n{digest('tml-a123')} bob", "entry 2 is given twice"),
        ("sha256:abc ann", "entry 1 is no digest"),
        (f"{digest('tml-a123').upper()} ann", "line 1"),
        (f"{digest('tml-a123')} ann 1 2", "entry 1 is not KEY"),
        ("# none", "no key in it"),
    ],
)
def test_a_file_that_holds_a_key_itself_or_nonsense_is_refused(tmp_path, text, told):
    """What is wrong is told with its line, and the key never repeated."""
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=told) as refused:
        read_keys(file, None)
    assert "tml-key1" not in str(refused.value)


def test_every_digest_is_compared_in_constant_time(monkeypatch):
    """Whichever key comes, all are compared, by the function that takes the same time for each."""
    seen = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: seen.append(one) or compare(one, other))
    keys = Keys(["tml-key1 ann", "tml-key2 bob", "tml-key3 eve"])
    for key in ("tml-key1", "tml-key3", "tml-none", None):
        seen.clear()
        keys.owner(key)
        assert len(seen) == 3


def test_nothing_kept_of_keys_tells_them():
    """Neither the object nor its text holds a key."""
    keys = Keys([f"{LONG} ann"])
    assert LONG not in repr(keys)
    assert LONG not in str(vars(keys))


def test_an_owner_has_a_share():
    keys = Keys(["tml-key1 ann 3", "tml-key2 ann", "tml-key3 bob", "tml-key4", "tml-key5 eve  0.5 "])
    assert [keys.owner(f"tml-key{number}") for number in (1, 2, 5)] == ["ann", "ann", "eve"]
    assert [keys.share(owner) for owner in ("ann", "bob", "eve", "nobody")] == [3.0, 1.0, 0.5, 1.0]
    assert Keys().share("") == 1.0


@pytest.mark.parametrize("share", ["0", "-1", "inf", "nan", "much", "1 2"])
def test_a_share_is_a_finite_number_above_0(share):
    with pytest.raises(InvalidRequestError, match="entry 2"):
        Keys(["tml-key1 bob", f"tml-key2 ann {share}"])


def test_an_owner_has_one_share():
    Keys(["tml-key1 ann 2", "tml-key2 ann 2.0"])
    with pytest.raises(InvalidRequestError, match="entry 2 gives 'ann' a second"):
        Keys(["tml-key1 ann 2", "tml-key2 ann 3"])


def test_a_key_is_shown_once_and_its_line_stored(tmp_path):
    """``keys new`` prints the key beside the line, and the line lets the key in."""
    made = run("keys", "new", "ann", "--share", "3")
    key = made.stderr.split()[0]
    assert made.stdout == f"{digest(key)} ann 3\n"
    (tmp_path / "keys").write_text(made.stdout)
    keys = read_keys(tmp_path / "keys", None)
    assert (keys.owner(key), keys.share("ann")) == ("ann", 3.0)
    assert run("keys", "new").stdout.count(" ") == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["ann smith"], "one word"), (["ann", "--share", "0"], "above 0"), (["--share", "2"], "name one")],
)
def test_keys_that_can_not_be_made(arguments, told):
    refused = run("keys", "new", *arguments)
    assert refused.exit_code
    assert told in refused.output


def test_a_file_of_keys_is_turned_into_one_of_digests():
    """``keys hash`` keeps comments, owners, shares and what is hashed already."""
    given = f"# mine\n{LONG} ann 2 # laptop\n\n{digest(LONG)} bob\n"
    done = run("keys", "hash", given=given)
    assert done.exit_code == 0
    assert done.stdout == f"# mine\n{digest(LONG)} ann 2  # laptop\n\n{digest(LONG)} bob\n"
    for bad in ("tml-short ann", "secret ann"):
        refused = run("keys", "hash", given=bad)
        assert refused.exit_code == 1
        assert "16 characters" in refused.output
        assert bad.split()[0] not in refused.output


@given(st.text("abc123-_", min_size=16, max_size=40), st.sampled_from(["", "ann", "ann 2.5"]))
def test_a_stored_line_lets_its_key_in(secret, rest):
    """Storing is done once: a line stored again is the same line."""
    key = f"tml-{secret}"
    line = stored(f"{key} {rest}")
    assert stored(line) == line
    assert secret not in line
    assert Keys([line]).owner(key) == Keys([f"{key} {rest}"]).owner(key) is not None


def test_keys_differ():
    assert len({new_key() for _ in range(100)}) == 100
