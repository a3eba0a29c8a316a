"""``Catalogue``: which runs and checkpoints a store folder holds. No torch: listing must be cheap.

::

    STORE/runs/RUN/run.json
    STORE/runs/RUN/weights|sampler_weights|external_weights/NAME/
        adapter_model.safetensors  adapter_config.json     what peft.PeftModel loads
        optimizer.safetensors                              AdamW's moments, in ``weights`` only
        tickwork.json                                      everything else, with checksums
        *.age                                              in ``external_weights`` made for recipients, in their place
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import attrs

from tickwork.errors import CheckpointError
from tickwork.files import NEW, put, recover, remove, sync, write_json
from tickwork.records import META, RUN, Meta, Run, check_name, expiry, read_meta, read_run
from tickwork.results import (
    KIND_TYPES,
    Checkpoint,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    WeightsInfoResponse,
    as_json,
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
        meta = read_meta(folder)
        if meta.expires_at is not None and meta.expires_at <= datetime.now(UTC):
            raise CheckpointError(f"{path} expired at {meta.expires_at.isoformat()}")
        return meta

    def open_run(self, run: Run) -> None:
        """Record a new training run."""
        folder = self.run_folder(run.run_id)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, as_json(run))

    def begin_run(self, run: Run) -> None:
        """Record a training run, unless it is one that is made again after a crash."""
        if read_run(self.run_folder(run.run_id)) is None:
            self.open_run(run)

    def runs(self, owner: str | None = None, project_id: str | None = None) -> list[TrainingRun]:
        """Return runs, newest first.

        Args:
            owner: only this one's.
            project_id: only those of this project.
        """
        found = [self._run(run) for run in self._records(owner) if project_id in (None, run.project_id)]
        return sorted(found, key=lambda run: run.last_request_time, reverse=True)

    def run(self, run_id: str) -> TrainingRun:
        """Return one run.

        Raises:
            CheckpointError: unknown.
        """
        return self._run(self.run_record(run_id))

    def run_record(self, run_id: str) -> Run:
        """Return one run as it is recorded.

        Raises:
            CheckpointError: unknown.
        """
        run = read_run(self.run_folder(run_id))
        if run is None:
            raise CheckpointError(f"there is no training run {run_id!r}")
        return run

    def find_run(self, run_id: str) -> Run | None:
        """Return one run as it is recorded, or None."""
        return read_run(self.run_folder(run_id))

    def set_project(self, session_id: str, project_id: str | None) -> None:
        """Put the runs of a session into a project."""
        with self.lock:
            for run in self._records(None):
                if run.session_id == session_id:
                    self.open_run(attrs.evolve(run, project_id=project_id))

    def checkpoints(self, run_id: str | None = None, owner: str | None = None) -> list[Checkpoint]:
        """Return checkpoints, newest first; expired ones are deleted on the way.

        Args:
            run_id: only those of this run.
            owner: only those of this one's runs.
        """
        if run_id is not None:
            runs = [self.run_folder(run_id)]
        elif owner is None:
            runs = _folders(self.root / "runs")
        else:
            runs = [self.run_folder(run.run_id) for run in self._records(owner)]
        metas = [meta for run in runs for meta in self._alive(run)]
        return [meta.checkpoint() for meta in sorted(metas, key=lambda meta: meta.time, reverse=True)]

    def files(self, path: str) -> dict[str, Path]:
        """Return the files of a checkpoint, by name.

        Raises:
            CheckpointError: unknown, expired, or not one of ours.
        """
        folder = self.folder(path)
        return {name: folder / name for name in self.meta(path).sizes}

    def copy(
        self,
        path: str,
        *,
        owner: str = "",
        session_id: str = "",
        ttl_seconds: int | None = None,
        project_id: str | None = None,
    ) -> str:
        """Copy a checkpoint into a run of its own and return its path.

        Raises:
            CheckpointError: unknown, expired, or not one of ours.
            InvalidRequestError: a time to live that is not allowed.
            OSError: the disk.
        """
        meta = self.meta(path)
        run_id = f"copy-{uuid.uuid4()}"
        lasting = attrs.evolve(
            meta, run_id=run_id, expires_at=expiry(ttl_seconds), public=False, time=datetime.now(UTC)
        )
        target = self.folder(lasting.path)
        target.parent.mkdir(parents=True)
        temporary = target.with_name(f"{NEW}{uuid.uuid4().hex}")
        shutil.copytree(self.folder(path), temporary)
        for file in temporary.iterdir():
            sync(file)
        write_json(temporary / META, as_json(lasting))
        put(temporary, target)
        sync(target.parent)
        run = Run(run_id, meta.base_model, meta.lora, meta.user_metadata)
        self.open_run(attrs.evolve(run, owner=owner, session_id=session_id, project_id=project_id))
        return lasting.path

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

    def _records(self, owner: str | None) -> list[Run]:
        found = [run for folder in _folders(self.root / "runs") if (run := read_run(folder)) is not None]
        return [run for run in found if owner in (None, run.owner)]

    def _run(self, run: Run) -> TrainingRun:
        saved = self.checkpoints(run.run_id)
        latest = {kind: next((c for c in saved if c.checkpoint_type == kind), None) for kind in KIND_TYPES.values()}
        return TrainingRun(
            training_run_id=run.run_id,
            base_model=run.base_model,
            model_owner=run.owner or "local",
            is_lora=True,
            last_request_time=max([run.time, *(c.time for c in saved)]),
            lora_rank=run.lora.rank,
            last_checkpoint=latest["training"],
            last_sampler_checkpoint=latest["sampler"],
            user_metadata=run.user_metadata or None,
        )

    def _alive(self, run: Path) -> Iterator[Meta]:
        for kind in KIND_TYPES:
            for folder in _folders(run / kind):
                try:
                    meta = read_meta(folder)
                except CheckpointError:
                    continue  # a listing must not fail for one foreign folder; reading it does
                if meta.expires_at is not None and meta.expires_at <= datetime.now(UTC):
                    with self.lock:
                        remove(folder)
                else:
                    yield meta


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(child for child in parent.iterdir() if child.is_dir() and not child.name.startswith("."))
