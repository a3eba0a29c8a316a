"""The README's table of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_row_of_what_survives_what_is_a_test() -> None:
    """Each fault has an outcome and a test of that name."""
    section = (ROOT / "README.md").read_text().split("### What survives what")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    written = {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(rows) >= 12
    for fault, outcome, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert fault.strip() and outcome.strip() and named
        assert set(named) <= written
