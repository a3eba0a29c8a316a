"""The engine behind HTTP, as the official Tinker SDK speaks it."""

from tickwork.server.serve import run, serving
from tickwork.server.settings import Settings

__all__ = ["Settings", "run", "serving"]
