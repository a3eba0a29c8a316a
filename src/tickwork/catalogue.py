"""``Catalogue``: which runs and checkpoints a store folder holds. No torch: listing must be cheap.

::

    STORE/runs/RUN/run.json
    STORE/runs/RUN/weights|sampler_weights/NAME/
        adapter_model.safetensors  adapter_config.json     what peft.PeftModel loads
        optimizer.safetensors                              AdamW's moments, in ``weights`` only
        tickwork.json                                      everything else, with checksums
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote, unquote

import attrs

from tickwork.errors import CheckpointError, InvalidRequestError
from tickwork.files import recover, remove, write_json
from tickwork.results import (
    KIND_TYPES,
    Checkpoint,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    WeightsInfoResponse,
    as_json,
)
from tickwork.types import LoraConfig

FORMAT = 1
META = "tickwork.json"
LONGEST_TTL = 315_360_000
# Common file systems allow 255; a folder that is on its way has a prefix besides.
FILE_NAME_BYTES = 245


@attrs.frozen
class Run:
    """One training model, as its ``run.json`` tells."""

    run_id: str
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str]
    time: datetime = attrs.Factory(lambda: datetime.now(UTC))


@attrs.frozen
class Meta:
    """One checkpoint, as its ``tickwork.json`` tells.

    Args:
        steps: optimizer steps taken.
        sizes: bytes of each file.
        checksums: SHA-256 of each file.
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


class Catalogue:
    """The index of a store folder: it reads and changes descriptions, never weights.

    Args:
        folder: the store folder, made when something is first written; None keeps everything in a temporary
            folder that goes with the service.

    Room: any thread.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.temporary = folder is None
        self.root = Path(tempfile.mkdtemp(prefix="tickwork-") if folder is None else folder).absolute()
        self.lock = threading.RLock()
        recover(self.root / "runs")
        if self.temporary:
            self._cleanup = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)

    def close(self) -> None:
        """Delete what was kept only for the life of the service."""
        if self.temporary:
            self._cleanup()

    def folder(self, path: str) -> Path:
        """Return where a checkpoint lies or would lie.

        Raises:
            InvalidRequestError: not a checkpoint path.
        """
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
        return self.run_folder(parsed.training_run_id) / parsed.kind / quote(check_name(parsed.name, "path"), safe="")

    def run_folder(self, run_id: str) -> Path:
        """Return where a run's checkpoints lie.

        Raises:
            InvalidRequestError: not a run's id.
        """
        return self.root / "runs" / quote(check_name(run_id, "run_id"), safe="")

    def meta(self, path: str) -> Meta:
        """Read a checkpoint's description.

        Raises:
            CheckpointError: unknown, expired, or not one of ours.
        """
        folder = self.folder(path)
        if not folder.is_dir():
            raise CheckpointError(f"there is no checkpoint {path}")
        meta = _read_meta(folder)
        if meta.expires_at is not None and meta.expires_at <= datetime.now(UTC):
            raise CheckpointError(f"{path} expired at {meta.expires_at.isoformat()}")
        return meta

    def open_run(self, run: Run) -> None:
        """Record a new training run."""
        folder = self.run_folder(run.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", as_json(run))

    def runs(self) -> list[TrainingRun]:
        """Return all runs, newest first."""
        found = [run for folder in _folders(self.root / "runs") if (run := self._run(folder)) is not None]
        return sorted(found, key=lambda run: run.last_request_time, reverse=True)

    def run(self, run_id: str) -> TrainingRun:
        """Return one run.

        Raises:
            CheckpointError: unknown.
        """
        run = self._run(self.run_folder(run_id))
        if run is None:
            raise CheckpointError(f"there is no training run {run_id!r}")
        return run

    def checkpoints(self, run_id: str | None = None) -> list[Checkpoint]:
        """Return the checkpoints of one run or of all, newest first; expired ones are deleted on the way."""
        runs = _folders(self.root / "runs") if run_id is None else [self.run_folder(run_id)]
        metas = [meta for run in runs for meta in self._alive(run)]
        return [meta.checkpoint() for meta in sorted(metas, key=lambda meta: meta.time, reverse=True)]

    def info(self, path: str) -> WeightsInfoResponse:
        """Return what a checkpoint was trained from."""
        meta = self.meta(path)
        lora = meta.lora
        return WeightsInfoResponse(meta.base_model, lora.rank, lora.train_unembed, lora.train_mlp, lora.train_attn)

    def delete(self, path: str) -> None:
        """Delete a checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        folder = self.folder(path)
        with self.lock:
            if not folder.is_dir():
                raise CheckpointError(f"there is no checkpoint {path}")
            remove(folder)

    def set_public(self, path: str, public: bool) -> None:
        """Mark a checkpoint as published or not."""
        with self.lock:
            write_json(self.folder(path) / META, as_json(attrs.evolve(self.meta(path), public=public)))

    def set_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire that many seconds from now; None lets it live."""
        with self.lock:
            meta = attrs.evolve(self.meta(path), expires_at=expiry(ttl_seconds))
            write_json(self.folder(path) / META, as_json(meta))

    def _run(self, folder: Path) -> TrainingRun | None:
        try:
            data = json.loads((folder / "run.json").read_text())
            rank = int(data["lora"]["rank"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not a run, or a damaged one, which must not spoil a listing
        saved = self.checkpoints(unquote(folder.name))
        latest = {kind: next((c for c in saved if c.checkpoint_type == kind), None) for kind in KIND_TYPES.values()}
        return TrainingRun(
            training_run_id=data["run_id"],
            base_model=data["base_model"],
            model_owner="local",
            is_lora=True,
            last_request_time=max([datetime.fromisoformat(data["time"]), *(c.time for c in saved)]),
            lora_rank=rank,
            last_checkpoint=latest["training"],
            last_sampler_checkpoint=latest["sampler"],
            user_metadata=data["user_metadata"] or None,
        )

    def _alive(self, run: Path) -> Iterator[Meta]:
        for kind in KIND_TYPES:
            for folder in _folders(run / kind):
                try:
                    meta = _read_meta(folder)
                except CheckpointError:
                    continue  # a listing must not fail for one foreign folder; reading it does
                if meta.expires_at is not None and meta.expires_at <= datetime.now(UTC):
                    with self.lock:
                        remove(folder)
                else:
                    yield meta


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


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(child for child in parent.iterdir() if child.is_dir() and not child.name.startswith("."))


def _read_meta(folder: Path) -> Meta:
    try:
        data = json.loads((folder / META).read_text())
        if data["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {data['format']}; this version reads {FORMAT}")
        data["lora"] = LoraConfig(**data["lora"])
        data["sizes"], data["checksums"] = dict(data["sizes"]), dict(data["checksums"])
        data["time"] = datetime.fromisoformat(data["time"])
        data["expires_at"] = data["expires_at"] and datetime.fromisoformat(data["expires_at"])
        return Meta(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a Tickwork checkpoint: its {META} is missing or damaged") from error
