"""``TrainingClient``: trains one adapter; the order of its calls is the order of execution."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import attrs

from tickwork import build
from tickwork.clients.host import Door, Host
from tickwork.clients.recorded import Recorded
from tickwork.clients.sampling import SamplingClient, open_sampler
from tickwork.engine.request import Request
from tickwork.errors import InvalidRequestError
from tickwork.futures import Future
from tickwork.kept.results import Past
from tickwork.models import load_tokenizer
from tickwork.requests import CheckpointKind, CustomLoss, OpenSampler, Save
from tickwork.results import (
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from tickwork.seal import check_recipients
from tickwork.types import AdamParams, Datum

Metadata = Mapping[str, str] | None


class TrainingClient(Recorded):
    """Trains one LoRA adapter of one base model.

    Calls are ordered as they are made, also across threads, and run in that order, each exactly once. A call
    returns a future at once; its ``_async`` twin waits until the request is accepted and then returns the
    future, so that ``await (await client.optim_step_async(params))`` is the result.

    Where the service has a journal, a call that changes the model or the store waits until it is written, unless that
    would stop an event loop; there its ``_async`` twin does.

    Room: any thread, asyncio loop or Trio run.
    Cancel: before acceptance a request never existed; afterwards it runs, whoever waits for it.
    """

    def __init__(
        self,
        host: Host,
        model_id: str,
        door: Door,
        ready: Future[GetInfoResponse],
        past: Past | None = None,
    ) -> None:
        super().__init__(door, ready, past)
        self._host, self.model_id = host, model_id
        weakref.finalize(self, door.forget, model_id, model_id).atexit = False

    def __repr__(self) -> str:
        return f"<TrainingClient {self.model_id}>"

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Compute logprobs and loss without a gradient; arguments as for ``forward_backward``."""
        return self._door.submit(partial(self._pass, data, loss_fn, loss_fn_config, False))

    async def forward_async(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """``forward``, once accepted."""
        return await self._door.submit_async(partial(self._pass, data, loss_fn, loss_fn_config, False))

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Compute a built-in loss and add its gradient to the model's, until the next ``optim_step``.

        Args:
            data: at least one datum; losses are summed over tokens and datums, never averaged.
            loss_fn: ``cross_entropy``, ``importance_sampling``, ``ppo``, ``cispo`` or ``dro``.
            loss_fn_config: settings of the loss, by name.
        """
        return self._door.submit(partial(self._pass, data, loss_fn, loss_fn_config, True))

    async def forward_backward_async(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """``forward_backward``, once accepted."""
        return await self._door.submit_async(partial(self._pass, data, loss_fn, loss_fn_config, True))

    def forward_backward_custom(self, data: Sequence[Datum], loss_fn: CustomLoss) -> Future[ForwardBackwardOutput]:
        """Compute a loss of your own, in one forward and one backward.

        Args:
            data: at least one datum with ``target_tokens``; other inputs reach the loss untouched.
            loss_fn: ``(data, logprobs of each datum) -> (scalar tensor, metrics)``, called on the device
                thread with float32 tensors of the targets' shapes; it must not wait for futures.
        """
        return self._door.submit(partial(self._pass, data, loss_fn, None, True))

    async def forward_backward_custom_async(
        self, data: Sequence[Datum], loss_fn: CustomLoss
    ) -> Future[ForwardBackwardOutput]:
        """``forward_backward_custom``, once accepted."""
        return await self._door.submit_async(partial(self._pass, data, loss_fn, None, True))

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> Future[OptimStepResponse]:
        """Apply AdamW to the accumulated gradient and clear it; exactly one of the two arguments is given."""
        return self._door.submit(partial(self._optim, _one(optim_params, adam_params)))

    async def optim_step_async(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> Future[OptimStepResponse]:
        """``optim_step``, once accepted."""
        return await self._door.submit_async(partial(self._optim, _one(optim_params, adam_params)))

    def save_state(
        self, name: str, ttl_seconds: int | None = None, overwrite: bool = False, user_metadata: Metadata = None
    ) -> Future[SaveWeightsResponse]:
        """Save weights and optimizer state; a gradient accumulated but not applied is not part of it.

        Args:
            name: 1 to 200 characters without a slash.
            ttl_seconds: time to live; None lives until deleted.
            overwrite: replace a checkpoint of that name; refused otherwise.
            user_metadata: kept with the checkpoint.
        """
        return self._door.submit(partial(self._save, "weights", name, ttl_seconds, overwrite, user_metadata))

    async def save_state_async(
        self, name: str, ttl_seconds: int | None = None, overwrite: bool = False, user_metadata: Metadata = None
    ) -> Future[SaveWeightsResponse]:
        """``save_state``, once accepted."""
        build = partial(self._save, "weights", name, ttl_seconds, overwrite, user_metadata)
        return await self._door.submit_async(build)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: Metadata = None
    ) -> Future[SaveWeightsForSamplerResponse]:
        """Save weights alone, for ``create_sampling_client``; arguments as for ``save_state``."""
        build = partial(self._save, "sampler_weights", name, ttl_seconds, False, user_metadata)
        return self._door.submit(build).then(lambda saved: SaveWeightsForSamplerResponse(saved.path))

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None, user_metadata: Metadata = None
    ) -> Future[SaveWeightsForSamplerResponse]:
        """``save_weights_for_sampler``, once accepted."""
        build = partial(self._save, "sampler_weights", name, ttl_seconds, False, user_metadata)
        return (await self._door.submit_async(build)).then(lambda saved: SaveWeightsForSamplerResponse(saved.path))

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: Sequence[str] | None = None
    ) -> Future[SaveWeightsExternalResponse]:
        """Save the adapter for download, in PEFT's layout; it can not be loaded again.

        Args:
            name: 1 to 200 characters without a slash.
            ttl_seconds: time to live; None lives until deleted.
            age_encryption_recipients: age or SSH public keys that the files are encrypted for; needs ``pyrage``.
        """
        return self._door.submit(partial(self._export, name, ttl_seconds, age_encryption_recipients))

    async def save_weights_external_async(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: Sequence[str] | None = None
    ) -> Future[SaveWeightsExternalResponse]:
        """``save_weights_external``, once accepted."""
        return await self._door.submit_async(partial(self._export, name, ttl_seconds, age_encryption_recipients))

    def load_state(self, path: str, weights_access_token: None = None) -> Future[LoadWeightsResponse]:
        """Load weights; the optimizer starts afresh and the accumulated gradient is dropped."""
        return self._door.submit(partial(self._load, path, False, weights_access_token))

    async def load_state_async(self, path: str, weights_access_token: None = None) -> Future[LoadWeightsResponse]:
        """``load_state``, once accepted."""
        return await self._door.submit_async(partial(self._load, path, False, weights_access_token))

    def load_state_with_optimizer(self, path: str, weights_access_token: None = None) -> Future[LoadWeightsResponse]:
        """Load weights and optimizer state: the next step is the one the saved model would have made."""
        return self._door.submit(partial(self._load, path, True, weights_access_token))

    async def load_state_with_optimizer_async(
        self, path: str, weights_access_token: None = None
    ) -> Future[LoadWeightsResponse]:
        """``load_state_with_optimizer``, once accepted."""
        return await self._door.submit_async(partial(self._load, path, True, weights_access_token))

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, *, kind: Literal["snapshot", "inflight"] = "snapshot"
    ) -> SamplingClient:
        """Return a sampling client of the weights as they are at this point of the order of calls.

        Args:
            name: such a sampler has no name; refused unless None.
            kind: ``"snapshot"``: weights that stay; ``"inflight"``: weights that follow each later call of this kind,
                also while a sample is being drawn.
        """
        key = self._host.next_id("sample")
        ready = self._door.submit(partial(self._snapshot, key, name, kind))
        return SamplingClient(self._door, key, self.model_id, ready, None)

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, *, kind: Literal["snapshot", "inflight"] = "snapshot"
    ) -> SamplingClient:
        """``save_weights_and_get_sampling_client``, once the weights are there."""
        key = self._host.next_id("sample")
        ready = await self._door.submit_async(partial(self._snapshot, key, name, kind))
        return await SamplingClient(self._door, key, self.model_id, ready, None)

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """Return a sampling client of a saved checkpoint."""
        return open_sampler(self._host, model_path, None)

    async def create_sampling_client_async(self, model_path: str) -> SamplingClient:
        """``create_sampling_client``, once the weights are there."""
        return await open_sampler(self._host, model_path, None)

    def set_share(self, share: float) -> None:
        """Set this client's part of a busy device, from the next pass on; nothing is waited for.

        Args:
            share: finite and above 0; 1 unless set. Where what several clients ask for next does not fit into one
                pass, its tokens are divided among them in proportion to their shares; what fits runs all the same.

        Room: any thread.

        Raises:
            InvalidRequestError: any other value.
        """
        self._host.set_share(self.model_id, share)

    def get_info(self) -> GetInfoResponse:
        """Return what is trained, and a hint if time is lost; waits until the model is there."""
        return attrs.evolve(self._ready.result(), hint=self._host.hint(self.model_id))  # type: ignore[no-any-return]

    async def get_info_async(self) -> GetInfoResponse:
        """``get_info``, awaited."""
        return attrs.evolve(await self._ready, hint=self._host.hint(self.model_id))  # type: ignore[no-any-return]

    def get_tokenizer(self) -> Any:
        """Return the base model's transformers tokenizer."""
        return load_tokenizer(self.get_info().model_data.tokenizer_id)

    async def get_tokenizer_async(self) -> Any:
        """Return the base model's transformers tokenizer."""
        return load_tokenizer((await self.get_info_async()).model_data.tokenizer_id)

    def _pass(
        self, data: Sequence[Datum], loss_fn: str | CustomLoss, config: Mapping[str, float] | None, backward: bool
    ) -> Request:
        return build.forward_backward(self.model_id, data, loss_fn, config, backward)

    def _optim(self, params: AdamParams) -> Request:
        return build.optim_step(self.model_id, params)

    def _save(
        self, kind: CheckpointKind, name: str, ttl_seconds: int | None, overwrite: bool, user_metadata: Metadata
    ) -> Request:
        return build.save(Save(self.model_id, kind, name, ttl_seconds, overwrite, user_metadata))

    def _export(self, name: str, ttl_seconds: int | None, recipients: Sequence[str] | None) -> Request:
        return build.save(
            Save(self.model_id, "external_weights", name, ttl_seconds, recipients=check_recipients(recipients or ()))
        )

    def _load(self, path: str, with_optimizer: bool, weights_access_token: None) -> Request:
        if weights_access_token is not None:
            raise InvalidRequestError("in process there are no access tokens", field="weights_access_token")
        return build.load(self.model_id, path, with_optimizer)

    def _snapshot(self, key: str, name: str | None, kind: str) -> Request:
        if name is not None:
            raise InvalidRequestError("a snapshot has no name: use save_weights_for_sampler", field="name")
        if kind not in ("snapshot", "inflight"):
            raise InvalidRequestError(f"{kind!r} is neither 'snapshot' nor 'inflight'", field="kind")
        return Request("step", self.model_id, OpenSampler(key, model_id=self.model_id, inflight=kind == "inflight"))


def _one(optim_params: AdamParams | None, adam_params: AdamParams | None) -> AdamParams:
    given = [params for params in (optim_params, adam_params) if params is not None]
    if len(given) != 1:
        raise TypeError("optim_step takes exactly one of optim_params and adam_params")
    return given[0]
