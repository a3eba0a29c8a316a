"""Servers that do one thing wrong each: ours, with a fault put in where requests are read or answers written."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from tickwork import requests, types
from tickwork.server import (
    bodies,
    bodies_sampling,
    lanes,
    routes_models,
    routes_training,
    strict,
    wire,
)
from tickwork.tensors import TensorData

# What each fault must turn red, and nothing else; the verdict is the first probe's.
FAULTS: dict[str, tuple[str, set[str]]] = {}
_PUT: dict[str, Any] = {}


def fault(verdict: str, *red: str) -> Any:
    """Declare a fault, the verdict it deserves, and the probes that must find it."""

    def declare(put: Any) -> Any:
        FAULTS[put.__name__] = (verdict, set(red))
        _PUT[put.__name__] = put
        return put

    return declare


def put(name: str, patch: pytest.MonkeyPatch) -> None:
    """Put a fault into the server of this process."""
    _PUT[name](patch)


def _on_asks(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Change what a training request asks for."""
    original = routes_training._pass_request

    def changed(found: Any, losses: Any) -> Any:
        ask = found.ask
        return original(attrs.evolve(found, ask=lambda: change(ask())), losses)

    patch.setattr(routes_training, "_pass_request", changed)


def _with_weights(ask: Any, change: Any) -> Any:
    def datum(item: Any) -> Any:
        weights = item.loss_fn_inputs.get("weights")
        if weights is None:
            return item
        inputs = {**item.loss_fn_inputs, "weights": TensorData.from_numpy(change(weights.to_numpy()))}
        return types.Datum(item.model_input, inputs)

    return attrs.evolve(ask, data=tuple(map(datum, ask.data)))


def _adam(patch: pytest.MonkeyPatch, **fixed: float) -> None:
    original = bodies.OptimStep.params
    patch.setattr(bodies.OptimStep, "params", lambda self: attrs.evolve(original(self), **fixed))


def _lora(patch: pytest.MonkeyPatch, **fixed: Any) -> None:
    def made(rank: int, seed: int | None, unembed: bool, mlp: bool, attn: bool) -> Any:
        return attrs.evolve(types.LoraConfig(rank, seed, unembed, mlp, attn), **fixed)

    patch.setattr(routes_models, "LoraConfig", made)


def _sampling(patch: pytest.MonkeyPatch, **fixed: Any) -> None:
    original = bodies_sampling.Sample._params
    patch.setattr(bodies_sampling.Sample, "_params", lambda self: attrs.evolve(original(self), **fixed))


def _payload(patch: pytest.MonkeyPatch, **fixed: Any) -> None:
    original = bodies_sampling.Sample.payload
    patch.setattr(bodies_sampling.Sample, "payload", lambda self, key: attrs.evolve(original(self, key), **fixed))


@fault("WRONG", "losses_are_sums_over_tokens", "targets_of_several_tokens")
def means_over_tokens(patch: pytest.MonkeyPatch) -> None:
    _on_asks(patch, lambda ask: _with_weights(ask, lambda w: w / np.float32(len(w))))


@fault("WRONG", "gradients_do_not_depend_on_batch_size", "losses_are_sums_over_datums")
def means_over_datums(patch: pytest.MonkeyPatch) -> None:
    _on_asks(patch, lambda ask: _with_weights(ask, lambda w: w / np.float32(len(ask.data))))


@fault("IGNORED", "negative_weights_push_away", "ppo", "dro")
def no_negative_weights(patch: pytest.MonkeyPatch) -> None:
    _on_asks(patch, lambda ask: _with_weights(ask, lambda w: np.maximum(w, 0)))


@fault("WRONG", "fractional_weights_scale", "targets_of_several_tokens")
def whole_weights(patch: pytest.MonkeyPatch) -> None:
    _on_asks(patch, lambda ask: _with_weights(ask, np.ceil))


@fault("WRONG", "ppo_thresholds", "cispo", "dro", "dro_beta", "unknown_loss_settings_are_refused")
def no_loss_settings(patch: pytest.MonkeyPatch) -> None:
    _on_asks(patch, lambda ask: ask if ask.loss_fn == "custom" else attrs.evolve(ask, config={}))


@fault("WRONG", "ppo", "ppo_thresholds")
def unclipped_ppo(patch: pytest.MonkeyPatch) -> None:
    wide = {"clip_low_threshold": 0.0, "clip_high_threshold": 1e6}
    _on_asks(patch, lambda ask: attrs.evolve(ask, config=wide) if ask.loss_fn == "ppo" else ask)


@fault("IGNORED", "unknown_losses_are_refused")
def any_loss_is_cross_entropy(patch: pytest.MonkeyPatch) -> None:
    known = ("importance_sampling", "ppo", "cispo", "dro", "custom")
    _on_asks(patch, lambda ask: ask if ask.loss_fn in known else attrs.evolve(ask, loss_fn="cross_entropy"))


@fault("WRONG", "forward_leaves_no_gradient")
def forward_with_a_gradient(patch: pytest.MonkeyPatch) -> None:
    _on_asks(patch, lambda ask: attrs.evolve(ask, forward_only=False))


@fault("IGNORED", "beta1")
def no_beta1(patch: pytest.MonkeyPatch) -> None:
    _adam(patch, beta1=0.9)


@fault("IGNORED", "beta2")
def no_beta2(patch: pytest.MonkeyPatch) -> None:
    _adam(patch, beta2=0.95)


@fault("IGNORED", "eps")
def no_eps(patch: pytest.MonkeyPatch) -> None:
    _adam(patch, eps=1e-8)


@fault("IGNORED", "weight_decay")
def no_weight_decay(patch: pytest.MonkeyPatch) -> None:
    _adam(patch, weight_decay=0.0)


@fault("IGNORED", "grad_clip_norm")
def no_clipping(patch: pytest.MonkeyPatch) -> None:
    _adam(patch, grad_clip_norm=0.0)


@fault("WRONG", "learning_rate", "learning_rate_is_per_step")
def a_fixed_learning_rate(patch: pytest.MonkeyPatch) -> None:
    _adam(patch, learning_rate=0.01)


@fault("IGNORED", "seed")
def no_seed(patch: pytest.MonkeyPatch) -> None:
    _lora(patch, seed=3)


@fault("WRONG", "rank", "absurd_ranks_are_refused")
def a_fixed_rank(patch: pytest.MonkeyPatch) -> None:
    _lora(patch, rank=8)


@fault("IGNORED", "train_mlp", "train_attn", "train_unembed")
def all_layers(patch: pytest.MonkeyPatch) -> None:
    _lora(patch, train_mlp=True, train_attn=True, train_unembed=True)


@fault("IGNORED", "logprobs_are_of_the_temperature", "temperature_0_is_greedy")
def no_temperature(patch: pytest.MonkeyPatch) -> None:
    _sampling(patch, temperature=1.0)


@fault("WRONG", "seeds_are_honoured")
def no_sampling_seed(patch: pytest.MonkeyPatch) -> None:
    _sampling(patch, seed=None)


@fault("IGNORED", "top_k")
def no_top_k(patch: pytest.MonkeyPatch) -> None:
    _sampling(patch, top_k=-1)


@fault("IGNORED", "top_p")
def no_top_p(patch: pytest.MonkeyPatch) -> None:
    _sampling(patch, top_p=1.0)


@fault("IGNORED", "stop_tokens", "stop_strings")
def no_stops(patch: pytest.MonkeyPatch) -> None:
    _sampling(patch, stop=())


@fault("IGNORED", "last_prompt_logprobs")
def the_whole_prompt_scored(patch: pytest.MonkeyPatch) -> None:
    _payload(patch, prompt_logprobs_last_n=None)


@fault("IGNORED", "named_prompt_logprobs")
def no_named_logprobs(patch: pytest.MonkeyPatch) -> None:
    _payload(patch, target_prompt_logprobs=None)


@fault("IGNORED", "alternative_prompt_tokens")
def no_alternatives(patch: pytest.MonkeyPatch) -> None:
    _payload(patch, prompt_alt_tokens_k=0)


@fault("WRONG", "a_logprob_for_each_token")
def a_logprob_too_few(patch: pytest.MonkeyPatch) -> None:
    original = wire.sample_proto

    def fewer(response: Any, names: Any) -> bytes:
        short = [attrs.evolve(seq, logprobs=seq.logprobs[:-1]) for seq in response.sequences]
        return original(attrs.evolve(response, sequences=short), names)

    patch.setattr(wire, "sample_proto", fewer)


@fault("WRONG", "snapshots_stay")
def snapshots_that_follow(patch: pytest.MonkeyPatch) -> None:
    from tickwork.compute.lora import Adapter

    patch.setattr(Adapter, "snapshot", lambda self: self)


@fault("WRONG", "the_same_number_twice_is_one_request")
def repeats_are_done_again(patch: pytest.MonkeyPatch) -> None:
    original = lanes.Lane.take

    def take(self: Any, seq_id: int, kind: Any, make: Any, *also: Any) -> Any:
        if 0 < seq_id < self.next and isinstance(ask := make(), lanes.Request):
            promise = self.promises.make(self.request_id(seq_id), self.owner, kind, 0)
            self.door.post(ask, promise)
            return promise
        return original(self, seq_id, kind, make, *also)

    patch.setattr(lanes.Lane, "take", take)


@fault("WRONG", "early_numbers_wait")
def first_come_first_served(patch: pytest.MonkeyPatch) -> None:
    original = lanes.Lane.take

    def take(self: Any, seq_id: int, kind: Any, make: Any, *also: Any) -> Any:
        if seq_id > self.next:
            promise = self.promises.make(self.request_id(seq_id), self.owner, kind, 0)
            self.door.post(make(), promise)
            return promise
        return original(self, seq_id, kind, make, *also)

    patch.setattr(lanes.Lane, "take", take)


@fault("IGNORED", "unknown_options_are_refused")
def unknown_options_are_swallowed(patch: pytest.MonkeyPatch) -> None:
    original = strict.parse

    def parse(model: Any, value: Any) -> Any:
        if isinstance(value, dict) and "adam_params" in value:
            adam = {k: v for k, v in value["adam_params"].items() if k != "amsgrad"}
            value = {k: v for k, v in value.items() if k != "nesterov"} | {"adam_params": adam}
        return original(model, value)

    patch.setattr(strict, "parse", parse)


@fault("WRONG", "checkpoints_resume")
def optimizers_start_afresh(patch: pytest.MonkeyPatch) -> None:
    def fresh(*args: Any, **kwargs: Any) -> Any:
        made = requests.CreateModel(*args, **kwargs)
        return attrs.evolve(made, with_optimizer=False)

    patch.setattr(routes_models, "CreateModel", fresh)
