"""The JSON body of a search for sessions."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, field_validator

from tickwork.server.strict import Body, Items, Metadata


class SearchOwner(Body):
    """Whose sessions."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: Items[str] | None = None


class StatusQuery(Body):
    """Which sessions by their state."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: Annotated[list[Literal["success", "errored", "interrupted"]], Field(min_length=1)] | None = None


class SearchCursor(Body):
    """Where the last page ended."""

    last_created_at: AwareDatetime
    last_session_id: str

    @field_validator("last_created_at", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        try:
            return datetime.fromisoformat(value) if isinstance(value, str) else value
        except ValueError:
            return value


class SearchSessions(Body):
    """Which sessions are wanted."""

    session_id: str | None = None
    project_ids: Items[str] | None = None
    user_metadata: Metadata = Field(default_factory=dict)
    display_name: Annotated[str, Field(min_length=1)] | None = None
    owner: SearchOwner = SearchOwner()
    statuses: Annotated[list[StatusQuery], Field(min_length=1)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None
