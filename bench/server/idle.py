"""What clients that wait cost a server: each with a session, its heartbeat, and a poll for a request not yet due."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import trio

from bench.server.shape import RANK

CLIENTS = 64
SECONDS = 60.0
HEARTBEAT = 10.0
SETTLING = 3.0


def share_of_a_core(pid: int, url: str, key: str, model: str) -> float:
    """Return the share of one core that a server process uses for clients with open long polls and heartbeats."""
    return trio.run(_measure, pid, url, key, model)


async def _measure(pid: int, url: str, key: str, model: str) -> float:
    headers, limits = {"X-API-Key": key}, httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(base_url=f"{url}/api/v1/", headers=headers, limits=limits, timeout=60)
    async with http, trio.open_nursery() as nursery:
        for _ in range(CLIENTS):
            await nursery.start(_idle, http, model)
        await trio.sleep(SETTLING)
        before = _cpu_seconds(pid)
        await trio.sleep(SECONDS)
        used = _cpu_seconds(pid) - before
        nursery.cancel_scope.cancel("measured")
    return used / SECONDS


async def _idle(http: httpx.AsyncClient, model: str, task_status: trio.TaskStatus[None]) -> None:
    async def post(path: str, **body: Any) -> Any:
        answer = await http.post(path, json=body)
        return answer.raise_for_status().json() if answer.status_code != 408 else None

    async def for_ever(path: str, pause: float, **body: Any) -> None:
        while True:
            await post(path, **body)
            await trio.sleep(pause)

    session = (await post("create_session", tags=[], user_metadata={}, sdk_version="0.38.0"))["session_id"]
    promised = await post(
        "create_model", session_id=session, model_seq_id=0, base_model=model, lora_config={"rank": RANK}
    )
    await post("retrieve_future", request_id=promised["request_id"])
    early = await post("optim_step", model_id=promised["model_id"], seq_id=2, adam_params={"learning_rate": 1e-4})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: for_ever("retrieve_future", 0.0, request_id=early["request_id"]))
        nursery.start_soon(lambda: for_ever("session_heartbeat", HEARTBEAT, session_id=session))
        task_status.started()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
