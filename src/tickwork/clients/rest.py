"""``RestClient``: runs and checkpoints of the store, read and changed beside the engine's cycles."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from tickwork.catalogue import Catalogue
from tickwork.clients.host import Host
from tickwork.errors import InvalidRequestError
from tickwork.futures import Future
from tickwork.results import (
    CheckpointsListResponse,
    Cursor,
    ExternalWeightsUrlsResponse,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)

T = TypeVar("T")

# A file on disk is there until it is deleted.
LAST = datetime.max.replace(tzinfo=UTC)


class RestClient:
    """The catalogue of one service's store. Each method has an ``_async`` twin that returns the result itself.

    Room: any thread, asyncio loop or Trio run.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._catalogue: Catalogue = host.catalogue

    def list_training_runs(self, limit: int = 20, offset: int = 0) -> Future[TrainingRunsResponse]:
        """Return a page of runs, newest first."""
        return self._call(lambda: _page(self._catalogue.runs(), limit, offset, TrainingRunsResponse))

    async def list_training_runs_async(self, limit: int = 20, offset: int = 0) -> TrainingRunsResponse:
        """``list_training_runs``, awaited."""
        return await self.list_training_runs(limit, offset)

    def get_training_run(self, training_run_id: str) -> Future[TrainingRun]:
        """Return one run."""
        return self._call(lambda: self._catalogue.run(training_run_id))

    async def get_training_run_async(self, training_run_id: str) -> TrainingRun:
        """``get_training_run``, awaited."""
        return await self.get_training_run(training_run_id)

    def get_training_run_by_tinker_path(self, tinker_path: str) -> Future[TrainingRun]:
        """Return the run that a checkpoint belongs to."""
        return self._call(lambda: self._catalogue.run(_parse(tinker_path).training_run_id))

    async def get_training_run_by_tinker_path_async(self, tinker_path: str) -> TrainingRun:
        """``get_training_run_by_tinker_path``, awaited."""
        return await self.get_training_run_by_tinker_path(tinker_path)

    def list_checkpoints(self, training_run_id: str) -> Future[CheckpointsListResponse]:
        """Return a run's checkpoints, newest first."""
        return self._call(lambda: CheckpointsListResponse(self._catalogue.checkpoints(training_run_id)))

    async def list_checkpoints_async(self, training_run_id: str) -> CheckpointsListResponse:
        """``list_checkpoints``, awaited."""
        return await self.list_checkpoints(training_run_id)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> Future[CheckpointsListResponse]:
        """Return a page of all checkpoints, newest first."""
        return self._call(lambda: _page(self._catalogue.checkpoints(), limit, offset, CheckpointsListResponse))

    async def list_user_checkpoints_async(self, limit: int = 100, offset: int = 0) -> CheckpointsListResponse:
        """``list_user_checkpoints``, awaited."""
        return await self.list_user_checkpoints(limit, offset)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> Future[WeightsInfoResponse]:
        """Return what a checkpoint was trained from."""
        return self._call(lambda: self._catalogue.info(tinker_path))

    async def get_weights_info_by_tinker_path_async(self, tinker_path: str) -> WeightsInfoResponse:
        """``get_weights_info_by_tinker_path``, awaited."""
        return await self.get_weights_info_by_tinker_path(tinker_path)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> Future[None]:
        """Delete a checkpoint by run and ``kind/name``."""
        return self.delete_checkpoint_from_tinker_path(f"tinker://{training_run_id}/{checkpoint_id}")

    async def delete_checkpoint_async(self, training_run_id: str, checkpoint_id: str) -> None:
        """``delete_checkpoint``, awaited."""
        await self.delete_checkpoint(training_run_id, checkpoint_id)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        """Delete a checkpoint."""
        return self._call(lambda: self._catalogue.delete(tinker_path))

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """``delete_checkpoint_from_tinker_path``, awaited."""
        await self.delete_checkpoint_from_tinker_path(tinker_path)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        """Mark a checkpoint as public; publishing it twice is no error."""
        return self._call(lambda: self._catalogue.set_public(tinker_path, True))

    async def publish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """``publish_checkpoint_from_tinker_path``, awaited."""
        await self.publish_checkpoint_from_tinker_path(tinker_path)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        """Mark a checkpoint as private."""
        return self._call(lambda: self._catalogue.set_public(tinker_path, False))

    async def unpublish_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """``unpublish_checkpoint_from_tinker_path``, awaited."""
        await self.unpublish_checkpoint_from_tinker_path(tinker_path)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> Future[None]:
        """Let a checkpoint expire that many seconds from now; None lets it live."""
        return self._call(lambda: self._catalogue.set_ttl(tinker_path, ttl_seconds))

    async def set_checkpoint_ttl_from_tinker_path_async(self, tinker_path: str, ttl_seconds: int | None) -> None:
        """``set_checkpoint_ttl_from_tinker_path``, awaited."""
        await self.set_checkpoint_ttl_from_tinker_path(tinker_path, ttl_seconds)

    def copy_weights(
        self, path: str, destination_project_id: str | None = None, *, ttl_seconds: int | None = None
    ) -> Future[str]:
        """Copy a checkpoint into a run of its own and return its path."""
        copy = self._catalogue.copy
        return self._call(lambda: copy(path, ttl_seconds=ttl_seconds, project_id=destination_project_id))

    async def copy_weights_async(
        self, path: str, destination_project_id: str | None = None, *, ttl_seconds: int | None = None
    ) -> str:
        """``copy_weights``, awaited."""
        return await self.copy_weights(path, destination_project_id, ttl_seconds=ttl_seconds)

    def get_external_weights_urls(self, tinker_path: str) -> Future[ExternalWeightsUrlsResponse]:
        """Return where the files of a checkpoint for download are: in process, on this machine's disk."""
        return self._call(lambda: self._urls(tinker_path))

    async def get_external_weights_urls_async(self, tinker_path: str) -> ExternalWeightsUrlsResponse:
        """``get_external_weights_urls``, awaited."""
        return await self.get_external_weights_urls(tinker_path)

    def _urls(self, path: str) -> ExternalWeightsUrlsResponse:
        if _parse(path).checkpoint_type != "external":
            raise InvalidRequestError(f"{path!r} is not for download: use save_weights_external", field="tinker_path")
        urls = {name: file.as_uri() for name, file in self._catalogue.files(path).items()}
        return ExternalWeightsUrlsResponse(urls, self._catalogue.meta(path).expires_at or LAST)

    def _call(self, act: Callable[[], T]) -> Future[T]:
        return self._host.submit(lambda: self._host.call(act))


def _parse(path: str) -> ParsedCheckpointTinkerPath:
    return ParsedCheckpointTinkerPath.from_tinker_path(path)


def _page(items: list[Any], limit: int, offset: int, response: Callable[[list[Any], Cursor], T]) -> T:
    if limit < 0 or offset < 0:
        raise InvalidRequestError(f"limit {limit}, offset {offset}; both are at least 0", field="limit")
    return response(items[offset : offset + limit], Cursor(offset, limit, len(items)))
