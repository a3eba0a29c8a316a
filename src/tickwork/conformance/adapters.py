"""Every choice of an adapter: seed, rank, layers."""

from __future__ import annotations

from typing import Any

from tickwork.conformance.probe import differs, probe, refused, require, same
from tickwork.conformance.target import Target


def _acts(target: Target, what: str, **lora: Any) -> str:
    usual, other = target.effect(), target.effect(lora=lora)
    differs(usual, other, f"{what} has no effect")
    return "acts"


@probe
def seed(target: Target) -> str:
    """The same seed gives the same adapter, another another."""
    same(target.effect(lora={"seed": 5}), target.effect(lora={"seed": 5}), "the same seed twice", tolerance=1e-5)
    differs(target.effect(lora={"seed": 5}), target.effect(lora={"seed": 6}), "seeds 5 and 6 give the same adapter")
    return "same seed, same adapter; another seed, another"


@probe
def rank(target: Target) -> str:
    """The rank asked for is the rank made."""
    clients = {rank: target.client(rank=rank) for rank in (1, 16)}
    for wanted, client in clients.items():
        told = client.get_info().lora_rank
        require(told in (None, wanted), f"asked for rank {wanted}, told {told}")
    differs(target.effect(lora={"rank": 1}), target.effect(lora={"rank": 16}), "ranks 1 and 16 have the same effect")
    return "ranks 1 and 16 differ"


@probe
def absurd_ranks_are_refused(target: Target) -> str:
    """A rank of 0, or past any model, is not quietly another one."""
    for wrong in (0, -1, 10**9):
        with refused(target, f"rank {wrong}"):
            target.client(rank=wrong)
    return "refused"


@probe
def train_mlp(target: Target) -> str:
    """The feed-forward layers can be left out."""
    return _acts(target, "train_mlp=False", train_mlp=False)


@probe
def train_attn(target: Target) -> str:
    """The attention can be left out."""
    return _acts(target, "train_attn=False", train_attn=False)


@probe
def train_unembed(target: Target) -> str:
    """The head can be left out."""
    return _acts(target, "train_unembed=False", train_unembed=False)


@probe
def unknown_base_models_are_refused(target: Target) -> str:
    """A model that is not there is not replaced by another."""
    with refused(target, "base model 'nobody/no-such-model'"):
        target.wait(target.service.create_lora_training_client("nobody/no-such-model", rank=8))
    return "refused"


@probe
def a_fresh_adapter_changes_nothing(target: Target) -> str:
    """Before its first step an adapter leaves the base model as it is."""
    sampler = target.wait(target.service.create_sampling_client(base_model=target.model))
    prompt = target.types.ModelInput.from_ints([3, 14, 15, 9])
    client = target.client()
    trained = target.wait(client.save_weights_and_get_sampling_client())
    base, fresh = (target.wait(each.compute_logprobs(prompt))[1:] for each in (sampler, trained))
    same(fresh, base, "a fresh adapter against its base", tolerance=1e-3)
    return "logprobs are the base model's"
