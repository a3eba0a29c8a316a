"""The search among sessions."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tickwork.errors import InvalidRequestError
from tickwork.results import Checkpoint
from tickwork.server import bodies_search as bodies
from tickwork.server.answers import reply
from tickwork.server.server import Server
from tickwork.server.session import Session


async def search_sessions(server: Server, owner: str, request: HttpRequest) -> Response:
    """Find an owner's sessions by name, metadata, project and status, newest first."""
    ask = await server.parse(bodies.SearchSessions, request)
    if ask.owner.type == "user":
        raise InvalidRequestError("a key sees its own sessions only; 'own' is offered", field="owner.type")
    found = [session for session in server.sessions.of(owner) if _matches(session, ask)]
    if ask.cursor is not None:
        last = (ask.cursor.last_created_at, ask.cursor.last_session_id)
        found = [session for session in found if (session.created_at, session.session_id) < last]
    rest, found = found[ask.limit :], found[: ask.limit]
    checkpoints: list[Checkpoint] = await server.in_thread(lambda: server.catalogue.checkpoints(owner=owner))
    cursor = {"last_created_at": found[-1].created_at, "last_session_id": found[-1].session_id} if rest else None
    return reply({"sessions": [_summary(session, checkpoints) for session in found], "next_cursor": cursor})


def _matches(session: Session, ask: bodies.SearchSessions) -> bool:
    if ask.session_id is not None or ask.display_name is not None:
        named = ask.display_name is not None and _named(session, ask.display_name)
        if session.session_id != ask.session_id and not named:
            return False
    if ask.project_ids is not None and session.project_id not in ask.project_ids:
        return False
    if any(session.user_metadata.get(key) != value for key, value in ask.user_metadata.items()):
        return False
    return ask.statuses is None or any(_is(session, status) for status in ask.statuses)


def _named(session: Session, words: str) -> bool:
    name = (session.display_name or "").lower()
    return all(word in name for word in words.lower().split())


def _is(session: Session, wanted: Any) -> bool:
    status = _status(session)
    if status is None or wanted.type != status["type"]:
        return False
    reasons = getattr(wanted, "reasons", None)
    return reasons is None or status["reason"]["type"] in reasons


def _status(session: Session) -> dict[str, Any] | None:
    if session.ended is None:
        return {"type": "active"}
    return session.finish


def _summary(session: Session, checkpoints: list[Checkpoint]) -> dict[str, Any]:
    mine = [item for item in checkpoints if item.tinker_path.startswith(f"tinker://{session.session_id}:")]
    return {
        "session_id": session.session_id,
        "created_at": session.created_at,
        "owner": session.owner or "local",
        "project_id": session.project_id or "",
        "status": _status(session),
        "checkpoints_count": len(mine),
        "display_name": session.display_name,
        "user_metadata": session.user_metadata or None,
        "checkpoint_storage_bytes": sum(item.size_bytes or 0 for item in mine),
    }
