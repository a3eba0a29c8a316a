"""Base models by name: those shipped in the wheel, and how a name becomes something transformers loads."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tickwork.errors import ModelLoadError
from tickwork.results import SupportedModel

SHIPPED = {"tickwork/tiny": Path(__file__).parent / "tiny"}

# Names that a server gives to folders, for the life of the process.
_named: dict[str, str] = {}


def locate(name: str) -> str:
    """Return the folder of a shipped or named model, or an existing path; any other name is left to the hub."""
    if not isinstance(name, str) or not name.strip():
        raise ModelLoadError(f"base_model {name!r} is not a name or a path")
    return _named.get(name) or str(SHIPPED.get(name, name))


def give_name(name: str, source: str) -> None:
    """Let ``name`` stand for a folder or another name, for the life of the process.

    Raises:
        ModelLoadError: it stands for something else already.
    """
    if name == source or locate(name) == source:
        return
    if name in SHIPPED or name in _named:
        raise ModelLoadError(f"{name!r} stands for {locate(name)} already: choose another name")
    _named[name] = source
    load_tokenizer.cache_clear()


@functools.lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Any:
    """Load a base model's tokenizer through transformers.

    Raises:
        ModelLoadError: there is none under that name.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415  transformers imports torch

    try:
        return AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"no tokenizer for base_model {name!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def supported() -> list[SupportedModel]:
    """Return the shipped base models."""
    return [SupportedModel(name, context_length(name)) for name in SHIPPED]


def context_length(name: str) -> int | None:
    """Return how many tokens a model takes; None where its folder does not tell."""
    try:
        config = json.loads((Path(locate(name)) / "config.json").read_text())
        return int(config.get("max_position_embeddings") or config.get("n_positions"))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
