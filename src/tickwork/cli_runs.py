"""What ``tickwork runs`` lists: the runs of a store, and what its journal tells of those that were served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from tickwork.catalogue import Catalogue
from tickwork.errors import JournalError
from tickwork.journal.report import LaneReport, report
from tickwork.results import TrainingRun, as_json

COLUMNS = ("training_run_id", "base_model", "lora_rank", "last_request_time", "journal")


@attrs.frozen
class ListedRun:
    """A run and its training model in the journal, each as far as it is there.

    Args:
        run: None for a model that was accepted and not made yet.
        lane: None for a run of a client in process.
    """

    run: TrainingRun | None
    lane: LaneReport | None

    def as_json(self) -> dict[str, Any]:
        """Return the fields of the run, and ``lane`` with those of the journal."""
        found = dict.fromkeys(field.name for field in attrs.fields(TrainingRun))
        if self.run is not None:
            found = as_json(self.run)
        elif self.lane is not None:
            owner = self.lane.owner or "local"
            found |= {"training_run_id": self.lane.lane, "base_model": self.lane.base_model, "model_owner": owner}
            found |= {"lora_rank": self.lane.rank, "is_lora": True}
        return {**found, "lane": as_json(self.lane)}

    def cells(self) -> list[Any]:
        """Return what stands in the columns."""
        found, lane = self.as_json(), self.lane
        when = None if self.run is None else self.run.last_request_time
        known = [found["training_run_id"], found["base_model"], found["lora_rank"], when]
        return [*known, None if lane is None else "; ".join(_told(lane))]


def listed(store: Path, tell: Callable[[str], object]) -> list[ListedRun]:
    """Return the runs of a store, newest first, then models that were accepted and not made yet.

    Args:
        tell: given what is wrong with the journal besides its lanes.
    """
    lanes: dict[str, LaneReport] = {}
    try:
        if (found := report(store)) is not None:
            lanes = dict(found.lanes)
            for damage in found.damage:
                tell(damage)
    except JournalError as error:
        tell(str(error))
    runs = [ListedRun(run, lanes.pop(run.training_run_id, None)) for run in Catalogue(store).runs()]
    return runs + [ListedRun(None, lane) for lane in lanes.values()]


def _told(lane: LaneReport) -> list[str]:
    """Say how far a lane has come, what the next start has to do, and how it came back at the last one."""
    told = [f"{lane.accepted} requests, {lane.recorded} done"]
    if lane.snapshot is not None:
        told.append(f"snapshot at {lane.snapshot}")
    if lane.broken is not None:
        return [*told, f"broken: {lane.broken}"]
    if lane.again:
        told.append(f"{lane.again} to run at the next start")
    if lane.back is not None:
        told.append(f"back at request {lane.back}, {lane.ran_again} ran again")
    return [*told, *lane.damage]
