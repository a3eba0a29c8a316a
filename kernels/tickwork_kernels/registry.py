"""Implementations of one operation side by side, and the choice between them, which is never silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Generic, Protocol, TypeVar

Case_contra = TypeVar("Case_contra", contravariant=True)


class Implementation(Protocol[Case_contra]):
    """One way to compute an operation."""

    name: str

    def why_not(self, case: Case_contra) -> str | None:
        """Return why this case can not be computed this way, naming the argument; None where it can."""

    def preference(self, case: Case_contra) -> int:
        """Return how well it suits the case, for ``impl="auto"``: the highest is taken, below 0 only by name."""


I = TypeVar("I", bound=Implementation[Any])  # noqa: E741


class RefusedError(NotImplementedError):
    """No implementation can run what was asked, or the one named can not; says why."""


@dataclass(frozen=True)
class Choice(Generic[I]):
    """What was chosen.

    Args:
        implementation: that will run.
        why: in words.
        refused: name -> why not, of those that can not run this case.
        memory: bytes it will need besides inputs and outputs, where it can tell.
    """

    implementation: I
    why: str
    refused: Mapping[str, str]
    memory: int | None = None

    @property
    def name(self) -> str:
        """Name of the implementation."""
        return self.implementation.name


class Registry(Generic[I]):
    """The implementations of one operation, by name.

    Args:
        operation: its name, for messages.
        group: entry-point group from which installed packages' implementations are loaded at the first choice.
    """

    def __init__(self, operation: str, group: str) -> None:
        self.operation, self._group = operation, group
        self._known: dict[str, I] = {}
        self._loaded = False
        self._lock = RLock()

    def register(self, implementation: I) -> I:
        """Add an implementation; its name must be free. Returns it, so that it serves as a decorator of instances.

        Raises:
            ValueError: the name is taken.
        """
        name = getattr(implementation, "name", None)
        if isinstance(implementation, type) or not isinstance(name, str) or not name:
            raise ValueError(
                f"an implementation of {self.operation} must be an object with a name, not {implementation!r}"
            )
        if implementation.name in self._known or implementation.name == "auto":
            raise ValueError(f"impl {implementation.name!r} of {self.operation} exists already; take another name")
        self._known[implementation.name] = implementation
        return implementation

    def unregister(self, name: str) -> None:
        """Remove an implementation that was registered."""
        del self._known[name]

    def all(self) -> list[I]:
        """Return every implementation, in order of registration, those of installed packages included."""
        with self._lock:
            self._load()
        return list(self._known.values())

    def _load(self) -> None:
        if not self._loaded:
            # All or none: after a package that does not load, none is missing silently at the next call.
            found = [entry.load() for entry in entry_points(group=self._group)]
            self._loaded = True
            for each in found:
                self.register(each)

    def choose(self, case: Any, impl: str = "auto") -> Choice[I]:
        """Return the implementation named, or the preferred one of those that can run the case.

        Raises:
            ValueError: no implementation has that name.
            NotImplementedError: the one named can not run this case; says why, and which can.
        """
        known = {each.name: each for each in self.all()}
        if impl != "auto" and impl not in known:
            raise ValueError(f"impl must be 'auto' or one of {sorted(known)}, not {impl!r}")
        refused = {name: why for name, each in known.items() if (why := _refusal(each, case)) is not None}
        able = [each for each in known.values() if each.name not in refused]
        if impl != "auto":
            if impl in refused:
                names = ", ".join(repr(each.name) for each in able) or "none"
                raise RefusedError(f"impl={impl!r}: {refused[impl]}; able to run this {self.operation}: {names}")
            return Choice(known[impl], "named by the caller", refused)
        willing = [each for each in able if each.preference(case) >= 0]
        if not willing:
            only = {each.name: "only by name" for each in able}
            reasons = "; ".join(f"{name}: {why}" for name, why in (refused | only).items()) or "none is registered"
            raise RefusedError(f"no implementation of {self.operation} can run this: {reasons}")
        best = max(willing, key=lambda each: each.preference(case))
        return Choice(best, f"preferred among {', '.join(each.name for each in able)}", refused)


def _refusal(implementation: Implementation[Any], case: Any) -> str | None:
    """Return why an implementation can not run a case; one that fails at the question can not run it either."""
    try:
        return implementation.why_not(case)
    except Exception as error:
        return f"its why_not raised {type(error).__name__}: {error}"
