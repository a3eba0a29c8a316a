"""What the server writes about itself: a line of text or a JSON object for each event, to standard error."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Literal

import orjson

Form = Literal["json", "text"]
# What a log call may say besides its message.
FIELDS = ("error_id", "route", "owner", "session_id", "model_id", "request_id")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``message``, what was given with it, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one event."""
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in FIELDS if hasattr(record, name)},
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(told, default=str).decode()


def configure(form: Form) -> None:
    """Write what this process logs, warnings of Python's included, to standard error in that form."""
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.getLogger("tickwork").setLevel(logging.INFO)
    logging.captureWarnings(True)
