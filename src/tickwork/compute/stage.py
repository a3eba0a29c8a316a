"""``Device``: all that lives on one accelerator, and the running of stages on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch

from tickwork import requests
from tickwork.catalogue import Catalogue
from tickwork.compute.bases import Bases
from tickwork.compute.create import create
from tickwork.compute.failure import failure
from tickwork.compute.graph import make_loss
from tickwork.compute.lora import Adapter
from tickwork.compute.losses import check
from tickwork.compute.optimizer import step_together
from tickwork.compute.parts import Progress
from tickwork.compute.passes import run_together
from tickwork.compute.residency import Residency
from tickwork.compute.sampler import Sampler
from tickwork.compute.state import capture, restore
from tickwork.compute.threads import Threads
from tickwork.compute.weights import Shelf, TrainingModel, Weights
from tickwork.engine.plan import Pass, Stage
from tickwork.engine.request import Outcome, Request
from tickwork.errors import InvalidRequestError, RequestFailedError
from tickwork.records import Meta
from tickwork.requests import CreateModel, ForwardBackward, Load, MakeLoss, OpenSampler, OptimStep, Release, Save
from tickwork.results import (
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsExternalResponse,
    SaveWeightsResponse,
)
from tickwork.store import Store


class Device:
    """Base models, training models and samplers of one device.

    Args:
        catalogue: where checkpoints lie.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …; None takes CUDA where there is one.
        dtype: see ``Bases``. Adapters, gradients, moments and logits are always float32.
        max_tokens: see ``Bases``.
        invariant: see ``Bases``.
        checkpoint_activations: see ``BaseModel``.
        adapter_memory: see ``Residency``.
        spare_core: see ``Threads``.

    Room: the device thread; ``max_tokens`` may be read by any.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        device: str | None,
        dtype: str | None,
        max_tokens: int | None,
        *,
        invariant: bool = False,
        checkpoint_activations: bool = False,
        adapter_memory: int | None = None,
        spare_core: bool = False,
    ) -> None:
        self._store = Store(catalogue)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._invariant = invariant
        self._bases = Bases(self._device, dtype, max_tokens, invariant, checkpoint_activations)
        self._residency = Residency(adapter_memory, self._device)
        self._models: dict[str, TrainingModel] = {}
        self._threads = Threads(spare=spare_core and self._device.type == "cpu", invariant=invariant)
        self._weights: dict[str, Weights] = {}
        self._shelf = Shelf(self._bases.get, self._model, self._store, self._device)
        self._samplers: dict[str, Sampler] = {}
        self._progress: dict[Request, Progress | None] = {}
        # What unfinished samples draw from, which stays where it is until they are done.
        self._drawn_from: dict[Request, Adapter | None] = {}
        self._lost: dict[str, RequestFailedError] = {}
        self._steps: dict[type, Callable[..., object]] = {
            CreateModel: self._create,
            Save: self._save,
            Load: self._load,
            OpenSampler: self._open_sampler,
            MakeLoss: lambda ask: make_loss(ask.graph),
            requests.Capture: self._capture,
            requests.Restore: self._restore,
            Release: self._release,
        }

    @property
    def sampling(self) -> bool:
        """Whether any sampler has unfinished requests."""
        return any(sampler.busy for sampler in self._samplers.values())

    @property
    def max_tokens(self) -> int:
        """Tokens that one pass may hold now."""
        return self._bases.max_tokens

    @property
    def adapter_bytes(self) -> int:
        """Bytes of adapters, gradients and moments that lie on the device."""
        return self._residency.nbytes

    def run(self, stage: Stage, cycle: int, nudged: Callable[[], bool]) -> list[Outcome]:
        """Run one stage.

        Args:
            cycle: number of the cycle, which results report.
            nudged: asked between decode steps; True ends the turn of decoding.

        Returns:
            one outcome for each request that finished.
        """
        # Samples first: a step of the same stage may release the weights they were asked of.
        admissions = [_outcome(request, self._admit) for request in stage.samples]
        outcomes = [refusal for refusal in admissions if refusal.error is not None]
        for item in stage.passes:
            outcomes += self._run_pass(item, cycle)
        self._count(outcomes)
        self._threads.steps()
        outcomes += self._run_steps(stage.steps)
        self._count(outcomes)
        if stage.decode:
            outcomes += self._decode(stage.decode, nudged)
        for outcome in outcomes:
            self._drawn_from.pop(outcome.request, None)
        self._residency.settle(self._drawn_from.values())
        return outcomes

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        """Note how far each lane has come."""
        for request in (outcome.request for outcome in outcomes):
            if request.number is not None and (model := self._models.get(request.lane)) is not None:
                model.number = max(model.number, request.number)

    def _decode(self, seconds: float, nudged: Callable[[], bool]) -> list[Outcome]:
        busy = [sampler for sampler in self._samplers.values() if sampler.busy]
        return [outcome for sampler in busy for outcome in sampler.decode(seconds / len(busy), nudged)]

    def _run_pass(self, item: Pass, cycle: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for piece in item.pieces:
            if piece.request not in self._progress:
                outcomes += self._begin(piece.request, several=not piece.last)
        work = [(progress, piece) for piece in item.pieces if (progress := self._progress[piece.request]) is not None]
        for progress in (progress for progress, _ in work if progress.error is None):
            self._hold(progress)
        run_together(work, self._threads)
        for piece in item.pieces:
            if piece.last and (progress := self._progress.pop(piece.request)) is not None:
                outcomes.append(_finish(progress, cycle))
        return outcomes

    def _begin(self, request: Request, *, several: bool) -> list[Outcome]:
        """Check a request and start its progress; a bad one has None, so that its pieces are passed over."""
        payload: ForwardBackward = request.payload
        self._progress[request] = None
        try:
            model = self._model(payload.model_id)
            check(payload, model.base.vocab_size, model.base.context)
        except Exception as error:
            return [Outcome(request, error=failure(error))]
        self._progress[request] = Progress(request, model.base, model.state, several)
        return []

    def _hold(self, progress: Progress) -> None:
        """Have what a request adds to on the device: between its passes it may have moved."""
        try:
            self._residency.use(progress.model)
            if progress.payload.backward:
                progress.model.hold_grad()
        except Exception as error:
            progress.fail(failure(error))

    def _run_steps(self, steps: Sequence[Request]) -> list[Outcome]:
        """Run steps, each of another lane; all optimizers of the stage in one call."""
        optim = [request for request in steps if isinstance(request.payload, OptimStep)]
        outcomes = [_outcome(request, self._step) for request in steps if request not in optim]
        asks = []
        for request in optim:
            try:
                state = self._model(request.payload.model_id).state
                state.prepare(request.payload.params)
            except Exception as error:
                outcomes.append(Outcome(request, error=failure(error)))
            else:
                asks.append((request, state))
        try:
            metrics = step_together([(state, request.payload.params) for request, state in asks])
        except Exception as error:
            return outcomes + [Outcome(request, error=failure(error)) for request, _ in asks]
        answers = zip(asks, metrics, strict=True)
        return outcomes + [Outcome(request, value=OptimStepResponse(found)) for (request, _), found in answers]

    def _step(self, request: Request) -> object:
        return self._steps[type(request.payload)](request.payload)

    def _model(self, model_id: str) -> TrainingModel:
        if model_id in self._models:
            self._residency.use(self._models[model_id].state)
            return self._models[model_id]
        if model_id in self._lost:
            raise self._lost[model_id]
        raise InvalidRequestError(f"there is no training model {model_id!r}", field="model_id")

    def _create(self, ask: CreateModel) -> GetInfoResponse:
        try:
            model = self._models[ask.model_id] = create(ask, self._bases.get, self._store, self._device)
        except Exception as error:
            self._lost[ask.model_id] = failure(error)
            raise
        self._residency.use(model.state)
        self._threads.created()
        return model.base.info(ask.model_id, model.state.adapter)

    def _save(self, ask: Save) -> SaveWeightsResponse | SaveWeightsExternalResponse:
        model = self._model(ask.model_id)
        meta = Meta(
            run_id=ask.model_id,
            kind=ask.kind,
            name=ask.name,
            base_model=model.base.name,
            lora=attrs.evolve(model.state.adapter.config, seed=model.state.adapter.seed),
            steps=model.state.steps,
            user_metadata=dict(ask.user_metadata or {}),
            request_id=ask.request_id,
        )
        path = self._store.write(meta, model.state, ask.ttl_seconds, ask.overwrite, ask.recipients)
        if ask.kind != "external_weights":
            return SaveWeightsResponse(path)
        return SaveWeightsExternalResponse(path, sum(self._store.catalogue.meta(path).sizes.values()))

    def _load(self, ask: Load) -> LoadWeightsResponse:
        model = self._model(ask.model_id)
        saved = self._store.read(ask.path)
        saved.check_fits(model.base.name, model.state.adapter)
        saved.restore(model.state, with_optimizer=ask.with_optimizer)
        return LoadWeightsResponse(ask.path, ask.model_id)

    def _open_sampler(self, ask: OpenSampler) -> None:
        try:
            self._weights[ask.key] = weights = self._shelf.open(ask)
            self._residency.use(weights.adapter)
        except Exception as error:
            self._lost[ask.key] = failure(error)
            raise

    def _capture(self, ask: requests.Capture) -> requests.Captured:
        model = self._model(ask.model_id)
        taken = [(key, weights) for key, weights in self._weights.items() if weights.model_id == ask.model_id]
        return capture(model, dict(taken) if ask.samplers else {})

    def _restore(self, ask: requests.Restore) -> GetInfoResponse:
        model, samplers = restore(ask.model_id, ask.state, self._bases.get, self._device)
        self._models[ask.model_id] = model
        self._residency.use(model.state)
        for key, weights in samplers.items():
            if key in ask.samplers and weights.adapter is not None:
                self._weights[key] = weights
                self._residency.use(weights.adapter)
                if weights.inflight:
                    self._shelf.follow(ask.model_id, weights.adapter)
        return model.base.info(ask.model_id, model.state.adapter)

    def _release(self, ask: Release) -> None:
        for held in (self._models, self._weights, self._lost):
            held.pop(ask.key, None)

    def _admit(self, request: Request) -> None:
        key = request.payload.key
        if key not in self._weights:
            raise self._lost.get(key) or InvalidRequestError(f"there is no sampler {key!r}", field="sampler")
        weights = self._weights[key]
        name = weights.base.name
        if name not in self._samplers:
            budget = weights.base.budget.tokens
            self._samplers[name] = Sampler(weights.base, budget, invariant=self._invariant)
        self._residency.use(weights.adapter)
        self._samplers[name].admit(request, weights.adapter)
        self._drawn_from[request] = weights.adapter


def _outcome(request: Request, act: Callable[[Request], object]) -> Outcome:
    try:
        return Outcome(request, value=act(request))
    except Exception as error:
        return Outcome(request, error=failure(error))


def _finish(progress: Progress, cycle: int) -> Outcome:
    if progress.error is not None:
        return Outcome(progress.request, error=progress.error)
    progress.model.requests += progress.payload.backward
    return Outcome(progress.request, value=progress.output(cycle), gradients=progress.recorded())
