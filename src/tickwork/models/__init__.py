"""Base models by name: those shipped in the wheel, and how a name becomes something transformers loads."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tickwork.errors import ModelLoadError
from tickwork.results import SupportedModel

SHIPPED = {"tickwork/tiny": Path(__file__).parent / "tiny"}


def locate(name: str) -> str:
    """Return the folder of a shipped model or an existing path; any other name is left to the hub."""
    if not isinstance(name, str) or not name.strip():
        raise ModelLoadError(f"base_model {name!r} is not a name or a path")
    return str(SHIPPED.get(name, name))


@functools.lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Any:
    """Load a base model's tokenizer through transformers.

    Raises:
        ModelLoadError: there is none under that name.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415  transformers imports torch

    try:
        return AutoTokenizer.from_pretrained(locate(name))
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"no tokenizer for base_model {name!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def supported() -> list[SupportedModel]:
    """Return the shipped base models."""
    return [SupportedModel(name, _context(folder)) for name, folder in SHIPPED.items()]


def _context(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
