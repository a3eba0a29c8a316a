"""Holds pinned versions to a list of known vulnerabilities, without a network: see ``advisories.txt``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


class Advisory(NamedTuple):
    """One vulnerability: the package, the versions that have it, its id and what it is."""

    package: str
    versions: SpecifierSet
    id: str
    what: str


def read_advisories(text: str) -> list[Advisory]:
    """Read the list.

    Raises:
        ValueError: a line that is not one of the format.
    """
    found = []
    for line in _lines(text):
        package, versions, name, what = [*line.split(maxsplit=3), "", "", ""][:4]
        if not what:
            raise ValueError(f"not PACKAGE VERSIONS ID WHAT: {line}")
        found.append(Advisory(canonicalize_name(package), SpecifierSet(versions), name, what))
    return found


def audit(requirements: Iterable[str], advisories: Iterable[Advisory]) -> list[str]:
    """Return what is wrong with each requirement whose pin, or least version, has a vulnerability."""
    advisories = list(advisories)
    return [
        f"{name} {version} has {each.id}: {each.what}"
        for name, version in _versions(requirements)
        for each in advisories
        if each.package == name and each.versions.contains(version, prereleases=True)
    ]


def _versions(requirements: Iterable[str]) -> Iterator[tuple[str, Version]]:
    for line in requirements:
        asked = Requirement(line)
        for each in asked.specifier:
            if each.operator in ("==", ">="):
                yield canonicalize_name(asked.name), Version(each.version)


def _lines(text: str) -> list[str]:
    return [line for raw in text.splitlines() if (line := raw.partition("#")[0].strip())]


def read_requirements(text: str) -> list[str]:
    """Read a file of requirements, without its comments."""
    return _lines(text)
