"""``Run`` and ``Meta``: what the files of a store tell about a run and about a checkpoint. No torch."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import attrs

from tickwork.errors import CheckpointError, InvalidRequestError
from tickwork.results import KIND_TYPES, Checkpoint
from tickwork.types import LoraConfig

FORMAT = 1
RUN, META = "run.json", "tickwork.json"
LONGEST_TTL = 315_360_000
# Common file systems allow 255; a folder that is on its way has a prefix besides.
FILE_NAME_BYTES = 245


@attrs.frozen
class Run:
    """One training model, as its ``run.json`` tells.

    Args:
        owner: whose it is; the empty one is that of clients in process.
        session_id: the session that made it, if any.
    """

    run_id: str
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str]
    time: datetime = attrs.Factory(lambda: datetime.now(UTC))
    owner: str = ""
    session_id: str = ""
    project_id: str | None = None


@attrs.frozen
class Meta:
    """One checkpoint, as its ``tickwork.json`` tells.

    Args:
        steps: optimizer steps taken.
        sizes: bytes of each file.
        checksums: SHA-256 of each file.
        request_id: the request that saved it, where that may come again after a crash.
    """

    run_id: str
    kind: str
    name: str
    base_model: str
    lora: LoraConfig
    steps: int
    user_metadata: dict[str, str]
    expires_at: datetime | None = None
    public: bool = False
    time: datetime = attrs.Factory(lambda: datetime.now(UTC))
    sizes: dict[str, int] = attrs.Factory(dict)
    checksums: dict[str, str] = attrs.Factory(dict)
    request_id: str = ""
    format: int = FORMAT

    @property
    def path(self) -> str:
        """Its ``tinker://`` path."""
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    def checkpoint(self) -> Checkpoint:
        """Return the public view."""
        return Checkpoint(
            checkpoint_id=f"{self.kind}/{self.name}",
            checkpoint_type=KIND_TYPES[self.kind],
            time=self.time,
            tinker_path=self.path,
            size_bytes=sum(self.sizes.values()),
            public=self.public,
            user_metadata=self.user_metadata or None,
            expires_at=self.expires_at,
        )


def read_run(folder: Path) -> Run | None:
    """Read a run's description; None where there is none, or a damaged one."""
    try:
        data = json.loads((folder / RUN).read_text())
        data["lora"] = LoraConfig(**data["lora"])
        data["user_metadata"] = dict(data["user_metadata"])
        data["time"] = datetime.fromisoformat(data["time"])
        return Run(**data)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_meta(folder: Path) -> Meta:
    """Read a checkpoint's description.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    name = "/".join(folder.parts[-3:])  # where the store lies is nothing for a client of a server
    try:
        data = json.loads((folder / META).read_text())
        if data["format"] != FORMAT:
            raise CheckpointError(f"{name} has format {data['format']}; this version reads {FORMAT}")
        data["lora"] = LoraConfig(**data["lora"])
        data["sizes"], data["checksums"] = dict(data["sizes"]), dict(data["checksums"])
        data["time"] = datetime.fromisoformat(data["time"])
        data["expires_at"] = data["expires_at"] and datetime.fromisoformat(data["expires_at"])
        return Meta(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} is not a Tickwork checkpoint: its {META} is missing or damaged") from error


def expiry(ttl_seconds: int | None) -> datetime | None:
    """Return the moment that many seconds from now.

    Raises:
        InvalidRequestError: not a whole number of seconds, at least 1.
    """
    if ttl_seconds is None:
        return None
    if isinstance(ttl_seconds, bool) or not isinstance(ttl_seconds, int) or not 1 <= ttl_seconds <= LONGEST_TTL:
        raise InvalidRequestError(
            f"{ttl_seconds!r}; a whole number of seconds, 1 to {LONGEST_TTL} (ten years)", field="ttl_seconds"
        )
    return datetime.now(UTC) + timedelta(seconds=ttl_seconds)


def check_name(name: str, field: str = "name") -> str:
    """Return a checkpoint's name if it is allowed.

    Raises:
        InvalidRequestError: empty, too long, with a slash, or beginning with a dot.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 200 or "/" in name or "\0" in name or name.startswith("."):
        raise InvalidRequestError(
            f"{name!r}: 1 to 200 characters without '/', not beginning with '.', are allowed", field=field
        )
    try:
        size = len(quote(name, safe=""))
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name!r} is not valid text", field=field) from None
    if size > FILE_NAME_BYTES:
        raise InvalidRequestError(
            f"{name!r}: {size} bytes when percent-encoded, {FILE_NAME_BYTES} are allowed", field=field
        )
    return name
