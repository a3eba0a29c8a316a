"""``ServiceClient``: owns an engine and makes the clients that use it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Literal, Self

import trio

from tickwork import build
from tickwork.catalogue import Catalogue
from tickwork.clients.host import Host, make_engine
from tickwork.clients.rest import RestClient
from tickwork.clients.resuming import Durability, Resuming, check_journal, open_keeper
from tickwork.clients.sampling import SamplingClient, open_sampler
from tickwork.clients.training import TrainingClient
from tickwork.convert import as_metadata
from tickwork.engine.request import Request
from tickwork.engine.statistics import EngineStatistics
from tickwork.errors import InvalidRequestError
from tickwork.futures import Future
from tickwork.models import supported
from tickwork.requests import CreateModel
from tickwork.results import GetServerCapabilitiesResponse
from tickwork.types import AdamOptimizerConfig, LoraConfig

DTypeName = Literal["float32", "bfloat16"]
Path = str | os.PathLike[str]
Metadata = Mapping[str, str] | None


class ServiceClient(Resuming):
    """One engine, in a thread of its own that starts with the first client.

    Args:
        user_metadata: kept with every training run of this service.
        store: folder for checkpoints; None keeps them for the life of the service only, and says so.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None takes CUDA where there is one.
        dtype: of base models: ``"float32"`` or ``"bfloat16"``; None means float32 on CPU, bfloat16 on CUDA.
        cycle_period: seconds that a window of arrivals stays open for other clients to join a cycle.
        max_tokens_per_pass: tokens that go through the model at once; None measures how many fit into half of the
            memory that is free, up to 4096 on CPU and 65536 on CUDA.
        merge: whether rows of several training clients may share a pass. Without, passes take turns and each holds
            one client's rows, cut as if it were alone; for measuring what sharing gains.
        invariant: a client's results are bit-equal whoever else is served, as long as no pass runs out of memory.
            Passes are then never merged, whatever ``merge`` says, which only allows it: it costs what merging gains.
        checkpoint_activations: whether each layer is run again in the backward instead of keeping what it computes:
            several times as many tokens fit into a pass, which takes a third to a half longer.
        adapter_memory: bytes that adapters, their gradients and moments may take of the device; those unused for
            longest wait in host memory. None means a quarter of the device on CUDA, and no bound on CPU.
        journal: what training clients have accepted outlives the end of the process (``"process"``) or of the machine
            (``"power"``), and is there for ``resume_training_client``; needs a store, which no other process may have
            open with a journal. None keeps nothing but checkpoints.

    Room: any thread, asyncio loop or Trio run. Leaving ``with`` or ``async with`` normally drains what was
    accepted and joins; leaving by an exception lets the current job end, fails the rest and joins.
    """

    def __init__(
        self,
        user_metadata: Metadata = None,
        *,
        store: Path | None = None,
        device: str | None = None,
        dtype: DTypeName | None = None,
        cycle_period: float = 0.0,
        max_tokens_per_pass: int | None = None,
        merge: bool = True,
        invariant: bool = False,
        checkpoint_activations: bool = False,
        adapter_memory: int | None = None,
        journal: Durability | None = None,
    ) -> None:
        check_journal(store, journal)
        catalogue = Catalogue(store)
        engine = make_engine(
            catalogue,
            device,
            dtype,
            cycle_period,
            max_tokens_per_pass,
            merge=merge,
            invariant=invariant,
            checkpoint_activations=checkpoint_activations,
            adapter_memory=adapter_memory,
        )
        super().__init__(Host(engine, catalogue, user_metadata, open_keeper(store, journal, engine, catalogue)))

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Metadata = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """Return a client that trains a fresh adapter.

        Args:
            base_model: ``"tickwork/tiny"``, a local folder or a hub name; loaded when first named.
            rank: of the adapter, >= 1; its scale is 32 / rank.
            seed: of the initial values; None draws one.
            train_mlp: adapt the feed-forward projections.
            train_attn: adapt the attention projections.
            train_unembed: adapt the head.
            user_metadata: kept with the run.
            optimizer: AdamW, the only one there is.
        """
        lora = LoraConfig(rank, seed, train_unembed, train_mlp, train_attn)
        return self._training(base_model, lora, None, False, user_metadata, optimizer)

    async def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Metadata = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """``create_lora_training_client``, once the model is there."""
        lora = LoraConfig(rank, seed, train_unembed, train_mlp, train_attn)
        return await self._training(base_model, lora, None, False, user_metadata, optimizer)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Metadata = None,
        weights_access_token: None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """Return a client that starts from a checkpoint's weights, with a fresh optimizer."""
        _no_token(weights_access_token)
        return self._training(base_model, None, path, False, user_metadata, optimizer)

    async def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Metadata = None,
        weights_access_token: None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """``create_training_client_from_state``, once the model is there."""
        _no_token(weights_access_token)
        return await self._training(base_model, None, path, False, user_metadata, optimizer)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Metadata = None,
        weights_access_token: None = None,
    ) -> TrainingClient:
        """Return a client whose next step is the one the saved model would have made."""
        _no_token(weights_access_token)
        return self._training(base_model, None, path, True, user_metadata, None)

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Metadata = None,
        weights_access_token: None = None,
    ) -> TrainingClient:
        """``create_training_client_from_state_with_optimizer``, once the model is there."""
        _no_token(weights_access_token)
        return await self._training(base_model, None, path, True, user_metadata, None)

    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> SamplingClient:
        """Return a client that samples from a checkpoint, or from a bare base model."""
        build.open_sampler("", model_path, base_model)  # a call with neither is wrong at once
        return open_sampler(self.host, model_path, base_model)

    async def create_sampling_client_async(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """``create_sampling_client``, once the weights are there."""
        return await self.create_sampling_client(model_path, base_model)

    def create_rest_client(self) -> RestClient:
        """Return a client for the runs and checkpoints of this service's store."""
        return RestClient(self.host)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """Return the base models that need no network."""
        return GetServerCapabilitiesResponse(supported())

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """Return the base models that need no network."""
        return self.get_server_capabilities()

    def statistics(self) -> EngineStatistics:
        """Return the engine's counters."""
        return self.host.statistics()

    def close(self, status: Literal["success", "errored", "interrupted"] = "success") -> Future[None]:
        """End the engine and wait for it; the future it returns is done.

        Args:
            status: ``"success"`` drains what was accepted; the others let only the current job end.

        Raises:
            Exception: what the engine died of.
        """
        self.host.close(abort=status != "success")
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # fmt: skip  # noqa: E501
        self.host.close(abort=error is not None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # fmt: skip  # noqa: E501
        await _end(self.host, abort=error is not None)

    def _training(
        self,
        base_model: str | None,
        lora: LoraConfig | None,
        path: str | None,
        with_optimizer: bool,
        user_metadata: Metadata,
        optimizer: AdamOptimizerConfig | None,
    ) -> TrainingClient:
        model_id = self.host.next_id("train")

        def ask() -> Request:
            metadata = {**self.host.user_metadata, **as_metadata(user_metadata)}
            return build.create_model(
                CreateModel(model_id, base_model, lora, path, with_optimizer, metadata), optimizer
            )

        door = self.host.door(model_id)
        return TrainingClient(self.host, model_id, door, door.submit(ask))


def _no_token(weights_access_token: None) -> None:
    if weights_access_token is not None:
        raise InvalidRequestError("in process there are no access tokens", field="weights_access_token")


async def _end(host: Host, *, abort: bool) -> None:
    """Close from async code; being cancelled while it drains lets only the current job end."""
    if trio.lowlevel.in_trio_task():
        try:
            await trio.to_thread.run_sync(partial(host.close, abort=abort), abandon_on_cancel=True)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(host.abandon)
            raise
    else:
        import asyncio  # noqa: PLC0415

        try:
            await asyncio.to_thread(host.close, abort=abort)
        except asyncio.CancelledError:
            await asyncio.to_thread(host.abandon)
            raise
