"""``Store``: writes and reads checkpoints, as PEFT folders (layout: ``catalogue.py``).

A checkpoint is written to a temporary folder, synced and renamed: a name either holds all of it or nothing.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tickwork.catalogue import Catalogue
from tickwork.compute.lora import ALPHA, Adapter
from tickwork.compute.optimizer import Trainable
from tickwork.errors import CheckpointError
from tickwork.files import NEW, checksum, put, sync, write_json
from tickwork.records import META, Meta, check_name, expiry, read_meta
from tickwork.results import as_json
from tickwork.seal import seal

ADAPTER, CONFIG, MOMENTS = "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"

log = logging.getLogger("tickwork")


@attrs.frozen(eq=False)
class Saved:
    """A checkpoint read back and verified; tensors on the CPU, by PEFT's names."""

    meta: Meta
    tensors: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]

    def check_fits(self, base_model: str, adapter: Adapter) -> None:
        """Refuse to load into a model of another base or shape.

        Raises:
            CheckpointError: saying what differs.
        """
        if self.meta.base_model != base_model:
            raise CheckpointError(f"{self.meta.path} was trained on {self.meta.base_model!r}, not on {base_model!r}")
        mine = {name: tuple(tensor.shape) for name, tensor in adapter.named().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if mine != theirs:
            raise CheckpointError(
                f"{self.meta.path} does not fit: its adapter has rank {self.meta.lora.rank} and {len(theirs)} tensors, "
                f"this model's has rank {adapter.config.rank} and {len(mine)}"
            )

    def restore(self, state: Trainable, *, with_optimizer: bool) -> None:
        """Put the weights, and the optimizer's state or a fresh one, into a model; its gradient is cleared.

        Raises:
            CheckpointError: the shapes differ, or the optimizer's state was not saved.
        """
        self.check_fits(self.meta.base_model, state.adapter)
        if with_optimizer and self.meta.kind != "weights":
            raise CheckpointError(f"{self.meta.path} holds no optimizer state: save_state checkpoints do")
        _copy(self.tensors, state.adapter.named())
        state.reset()
        if with_optimizer and self.moments:
            state.steps = self.meta.steps
            state.exp_avg, state.exp_avg_sq = (torch.zeros_like(state.adapter.arena) for _ in range(2))
            for part, arena in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
                named = state.adapter.named(arena)
                _copy({name: self.moments[f"{part}.{name}"] for name in named}, named)


class Store:
    """The weights behind a catalogue.

    Room: the device thread.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._told = not catalogue.temporary

    def write(
        self,
        meta: Meta,
        state: Trainable,
        ttl_seconds: int | None,
        overwrite: bool,
        recipients: tuple[str, ...] = (),
    ) -> str:
        """Write a checkpoint and return its path.

        Args:
            recipients: age public keys; with any, each file is encrypted for them and gets the suffix ``.age``.

        Raises:
            CheckpointError: the name is taken and ``overwrite`` is off.
            InvalidRequestError: a name or time to live that is not allowed.
            OSError: the disk.
        """
        check_name(meta.name)
        meta = attrs.evolve(meta, expires_at=expiry(ttl_seconds))
        target = self.catalogue.folder(meta.path)
        if target.exists() and not overwrite and not _saved_by(target, meta.request_id):
            raise CheckpointError(f"{meta.path} exists: choose another name or pass overwrite=True")
        self.tell()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{NEW}{uuid.uuid4().hex}")
        temporary.mkdir()
        try:
            self._fill(temporary, meta, state, recipients)
            with self.catalogue.lock:
                put(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(target.parent)
        return meta.path

    def tell(self) -> None:
        """Say once what becomes of everything where no folder was given."""
        if not self._told:
            log.warning("no store folder was given: runs and checkpoints live until this service is closed")
            self._told = True

    def read(self, path: str) -> Saved:
        """Read a checkpoint and verify every byte.

        Raises:
            CheckpointError: unknown, expired, foreign or damaged.
        """
        meta, folder = self.catalogue.meta(path), self.catalogue.folder(path)
        if meta.kind == "external_weights":
            raise CheckpointError(f"{path} is for download: load what save_state or save_weights_for_sampler saved")
        for name, expected in meta.checksums.items():
            if not (folder / name).is_file() or checksum(folder / name) != expected:
                raise CheckpointError(f"{path} is damaged: {name} is missing or not what was written")
        try:
            moments = load_file(folder / MOMENTS) if MOMENTS in meta.checksums else {}
            return Saved(meta, load_file(folder / ADAPTER), moments)
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error

    def _fill(self, folder: Path, meta: Meta, state: Trainable, recipients: tuple[str, ...]) -> None:
        _save(state.adapter.named(), folder / ADAPTER)
        write_json(folder / CONFIG, _peft_config(meta, state.adapter))
        if meta.kind == "weights" and state.exp_avg is not None and state.exp_avg_sq is not None:
            parts = (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq))
            moments = {f"{part}.{k}": v for part, arena in parts for k, v in state.adapter.named(arena).items()}
            _save(moments, folder / MOMENTS)
        if recipients:
            seal(folder, recipients)
        files = sorted(folder.iterdir())
        sizes = {file.name: file.stat().st_size for file in files}
        checksums = {file.name: checksum(file) for file in files}
        write_json(folder / META, as_json(attrs.evolve(meta, sizes=sizes, checksums=checksums)))


def _saved_by(folder: Path, request_id: str) -> bool:
    """Whether a checkpoint is what this very request has saved, before a crash kept it from saying so."""
    try:
        return bool(request_id) and read_meta(folder).request_id == request_id
    except CheckpointError:
        return False


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(f"{file.name} could not be written: {error}") from error
    sync(file)


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _peft_config(meta: Meta, adapter: Adapter) -> dict[str, object]:
    modules = sorted({".".join(path.split(".")[-2:]) for path in adapter.shapes})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": meta.base_model,
        "r": meta.lora.rank,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
