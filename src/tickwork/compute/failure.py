"""What an exception means: a request's failure, too little memory, or the end of the device."""

from __future__ import annotations

import torch

from tickwork.errors import CapacityError, RequestFailedError


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text


def failure(error: Exception) -> RequestFailedError:
    """Turn what one request ran into to its failure.

    Raises:
        Exception: ``error`` itself, where the device can not go on after it.
    """
    if isinstance(error, RequestFailedError):
        return error
    if out_of_memory(error):
        what: RequestFailedError = CapacityError(f"{first_line(error)}; lower the rank, or free other models")
    elif isinstance(error, OSError):
        what = RequestFailedError(f"the store: {error}")
    elif isinstance(error, RuntimeError) and ("CUDA" in str(error) or "device-side" in str(error)):
        raise error
    else:
        what = RequestFailedError(f"{type(error).__name__}: {first_line(error)}")
    what.__cause__ = error
    return what


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, whatever its text does."""
    try:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    except Exception:
        return type(error).__name__
