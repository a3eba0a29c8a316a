"""``Resuming``: what a service makes of the runs that an earlier process left in its journal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, get_args

from tickwork.catalogue import Catalogue
from tickwork.clients.host import Host
from tickwork.clients.training import TrainingClient
from tickwork.engine.engine import Engine
from tickwork.errors import InvalidRequestError
from tickwork.futures import Future
from tickwork.kept.results import Past, ResumableRun

if TYPE_CHECKING:
    from tickwork.kept.keeper import Keeper

Durability = Literal["process", "power"]


class Resuming:
    """Base of ``ServiceClient``: runs of its journal.

    Args:
        host: whose journal.
    """

    def __init__(self, host: Host) -> None:
        self.host = host

    def resumable(self) -> list[ResumableRun]:
        """Return the runs that earlier processes left in the journal and that have no client yet, oldest first."""
        keeper = self.host.keeper
        return [] if keeper is None else [run.about for run in list(keeper.runs.values())]

    def resume_training_client(self, run_id: str) -> TrainingClient:
        """Return a client of a run that an earlier process left in the journal.

        Its state is that after all requests that were accepted, each applied once; it takes requests at once, and runs
        them once that state is there. A pass with a custom loss that was not done has failed by name, since its code
        went with its process; see ``past_results``.

        Args:
            run_id: see ``resumable``.

        Raises:
            InvalidRequestError: there is no such run, or it has had a client of this service.
            TickworkError: why it can not be resumed.
        """
        from tickwork.kept.catch_up import resume  # noqa: PLC0415  only where there is a journal

        lane, ready = resume(_keeper(self.host), self.host.portal, run_id)
        return TrainingClient(self.host, run_id, lane, ready, Past(lane.next - 1, lane.past))

    async def resume_training_client_async(self, run_id: str) -> TrainingClient:
        """``resume_training_client``, once the model is there."""
        return await self.resume_training_client(run_id)

    def forget_run(self, run_id: str) -> Future[None]:
        """Let go of a run in the journal, after all that was asked of it: it can not be resumed any more.

        Checkpoints stay. A client that the run has takes no further requests.

        Raises:
            InvalidRequestError: the journal holds no such run.
        """
        return _keeper(self.host).forget(run_id)

    async def forget_run_async(self, run_id: str) -> None:
        """``forget_run``, awaited."""
        await self.forget_run(run_id)


def open_keeper(
    store: str | os.PathLike[str] | None, journal: Durability | None, engine: Engine, catalogue: Catalogue
) -> Keeper | None:
    """Open the journal of a store, if that is wanted.

    Raises:
        JournalError: see ``Journal``.
    """
    if journal is None or store is None:
        return None
    from tickwork.kept.keeper import Keeper  # noqa: PLC0415  only where there is a journal

    return Keeper(store, journal, catalogue.find_run, engine.device_seconds)


def check_journal(store: object, journal: object) -> None:
    """Refuse a journal that there can not be.

    Raises:
        InvalidRequestError: without a store, or what is not offered.
    """
    if journal not in (None, *get_args(Durability)):
        raise InvalidRequestError(f"{journal!r}; 'process', 'power' or None", field="journal")
    if journal is not None and store is None:
        raise InvalidRequestError("needs a folder to lie in: give a store too, or leave it out", field="journal")


def _keeper(host: Host) -> Keeper:
    if host.keeper is None:
        raise InvalidRequestError("there is none: make the service with a store and journal='process'", field="journal")
    return host.keeper
