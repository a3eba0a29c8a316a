"""``Settings``: everything a server can be told, with its defaults and bounds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import attrs

from tickwork.convert import is_finite
from tickwork.errors import InvalidRequestError
from tickwork.journal.database import Durability
from tickwork.server.keys import Keys

MIB = 2**20
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _models(given: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(given, Mapping):
        return dict(given)
    return dict(_model(item) for item in given)


def _model(item: str) -> tuple[str, str]:
    """Read ``NAME``, ``PATH`` or ``NAME=PATH``."""
    name, found, source = item.partition("=")
    if not name.strip() or (found and not source.strip()):
        raise InvalidRequestError(f"{item!r} is not NAME, PATH or NAME=PATH", field="model")
    source = source if found else name
    if Path(source).expanduser().is_dir():
        folder = str(Path(source).expanduser().absolute())
        return (name if found else folder), folder
    return name, source


def _at_least(low: float) -> Any:
    def check(_: object, field: attrs.Attribute[Any], value: float) -> None:
        if not is_finite(value) or value < low:
            raise InvalidRequestError(f"{value!r}; at least {low:g} is needed", field=field.name)

    return check


@attrs.frozen
class Settings:
    """What a server serves, to whom, and within which bounds.

    Args:
        models: base models by name: ``NAME``, a folder, or ``NAME=FOLDER``. No other can be named by a client.
        store: folder of the checkpoints; None keeps them for the life of the server only.
        host: address to listen on; only loopback without keys.
        port: 0 takes a free one.
        keys: who may come in; none lets everybody on this machine in.
        device: see ``ServiceClient``.
        dtype: see ``ServiceClient``.
        cycle_period: see ``ServiceClient``.
        max_tokens_per_pass: see ``ServiceClient``.
        merge: see ``ServiceClient``.
        invariant: see ``ServiceClient``.
        checkpoint_activations: see ``ServiceClient``.
        adapter_memory: see ``ServiceClient``.
        max_models: training models that one key may hold at once.
        max_samplers: samplers of one key whose weights are held at once; the one unused for longest goes first.
        max_sessions: sessions that one key may have; for one more, one of its ended ones is forgotten.
        max_tokens_in_flight: tokens of one key accepted and not fetched, those to be drawn included.
        max_results: requests of one key accepted and not fetched; also its results that are kept once fetched.
        max_requests: HTTP requests of one key under way at once, held polls included.
        max_connections: connections at once; past it idle ones go, and where none is idle new ones are turned away.
        max_body: bytes of one request body, as sent.
        max_decompressed: bytes of one request body, decompressed.
        max_bodies: bytes of all bodies that are being read and answered; one alone always has room.
        chunk_datums: datums that a client puts into one request; more are refused.
        chunk_bytes: bytes that a client puts into one request, by its own estimate.
        gap_seconds: how long requests wait for an earlier one of their model that never comes.
        poll_seconds: how long a poll is held before the client is told to ask again.
        session_seconds: a session without a sign of life for that long is closed.
        result_seconds: how long a result that nobody fetches is kept.
        refetch_seconds: how long a result is kept once fetched, for a client whose connection broke.
        journal: what was accepted outlives the end of the process (``"process"``) or of the machine (``"power"``); None
            keeps it in memory, as does a server without a store.
        journal_optional: whether to go on in memory, and say so, where the journal can not be written; otherwise
            nothing is accepted then.
        snapshot_seconds: seconds of the device that a model works between two snapshots of it, at least.
        drain_seconds: how long a stopping server waits for clients to fetch what is done.

    Raises:
        InvalidRequestError: naming the setting.
    """

    models: dict[str, str] = attrs.field(converter=_models)
    store: str | os.PathLike[str] | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = attrs.field(factory=Keys)
    device: str | None = None
    dtype: str | None = None
    cycle_period: float = 0.0
    max_tokens_per_pass: int | None = None
    merge: bool = True
    invariant: bool = False
    checkpoint_activations: bool = False
    adapter_memory: int | None = None
    max_models: int = attrs.field(default=64, validator=_at_least(1))
    max_samplers: int = attrs.field(default=64, validator=_at_least(1))
    max_sessions: int = attrs.field(default=4096, validator=_at_least(1))
    max_tokens_in_flight: int = attrs.field(default=2**24, validator=_at_least(1))
    max_results: int = attrs.field(default=2**16, validator=_at_least(1))
    max_requests: int = attrs.field(default=2048, validator=_at_least(1))
    max_connections: int = attrs.field(default=4096, validator=_at_least(1))
    max_body: int = attrs.field(default=64 * MIB, validator=_at_least(1024))
    max_decompressed: int = attrs.field(default=256 * MIB, validator=_at_least(1024))
    max_bodies: int = attrs.field(default=1024 * MIB, validator=_at_least(1024))
    chunk_datums: int = attrs.field(default=100_000, validator=_at_least(1))
    chunk_bytes: int = attrs.field(default=48 * MIB, validator=_at_least(1))
    gap_seconds: float = attrs.field(default=60.0, validator=_at_least(0))
    poll_seconds: float = attrs.field(default=30.0, validator=_at_least(0))
    session_seconds: float = attrs.field(default=3600.0, validator=_at_least(0))
    result_seconds: float = attrs.field(default=3600.0, validator=_at_least(0))
    refetch_seconds: float = attrs.field(default=120.0, validator=_at_least(0))
    journal: Durability | None = attrs.field(
        default="process", validator=attrs.validators.optional(attrs.validators.in_(get_args(Durability)))
    )
    journal_optional: bool = False
    snapshot_seconds: float = attrs.field(default=5.0, validator=_at_least(0))
    drain_seconds: float = attrs.field(default=5.0, validator=_at_least(0))

    def __attrs_post_init__(self) -> None:
        if not self.models:
            raise InvalidRequestError("at least one base model is needed", field="model")
        if self.keys.open and self.host not in LOOPBACK:
            raise InvalidRequestError(
                f"without API keys only loopback is served, not {self.host!r}: give keys, or bind to 127.0.0.1",
                field="host",
            )

    def client_config(self) -> dict[str, Any]:
        """The switches that the official SDK asks for first, and obeys."""
        return {
            "fwdbwd_max_chunk_len": self.chunk_datums,
            "fwdbwd_max_chunk_bytes_count": self.chunk_bytes,
            "fwdbwd_dispatch_bytes_semaphore_size": max(50_000_000, self.chunk_bytes),
            "parallel_fwdbwd_chunks": True,
            "proto_compress_fwdbwd": False,
            "pjwt_auth_enabled": False,
            "sample_use_retrieve_futures": True,
            "sample_join_sampling_session": True,
            "custom_loss_server_side": True,
        }

    def dynamic_config(self) -> dict[str, Any]:
        """The switches that it asks for again every few minutes."""
        return {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}
