"""Tests of adapters: initial values, what is adapted, and that PEFT reads what is saved."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from models import CPU, Bench, base, folder, pack_rows, plain, plain_logits, relative, step, tokens_of
from tickwork.compute.lora import Adapter
from tickwork.requests import Save
from tickwork.types import LoraConfig
from tickwork_kernels import head_logits


def fresh(kind: str, seed: int = 0, **config: object) -> Adapter:
    """Return an adapter as it starts."""
    return Adapter(base(kind).shapes, LoraConfig(**config), seed, CPU)


def test_initial_values_depend_on_the_seed() -> None:
    """Equal seeds give equal adapters, in every bit; another seed gives other values."""
    assert torch.equal(fresh("llama", 1).arena, fresh("llama", 1).arena)
    for path, (a, _) in fresh("llama", 1).tensors.items():
        assert not torch.equal(a, fresh("llama", 2).tensors[path][0])


def test_initial_values_depend_on_the_module_alone() -> None:
    """What else is adapted does not change a projection's initial values, and no two projections share theirs."""
    whole, part = fresh("llama", rank=4), fresh("llama", rank=4, train_mlp=False, train_unembed=False)
    assert set(part.tensors) < set(whole.tensors)
    for path, (a, _) in part.tensors.items():
        assert torch.equal(a, whole.tensors[path][0])
    starts = [float(a[0, 0].detach()) for a, _ in whole.tensors.values()]
    assert len(set(starts)) == len(starts)


def test_initial_values_do_not_touch_the_global_generator() -> None:
    """Making an adapter leaves the process's random state alone and does not depend on it."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = fresh("llama").arena
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(fresh("llama").arena, one)


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_b_starts_at_zero_and_a_with_a_spread_that_ignores_the_rank(rank: int) -> None:
    """B is zero, A is uniform within one over the root of its inputs, whatever the rank."""
    for a, b in fresh("phi3", rank=rank).tensors.values():
        bound = a.shape[1] ** -0.5
        assert a.shape[0] == b.shape[1] == rank
        assert not b.any()
        assert float(a.detach().abs().max()) <= bound
        if rank == 32:
            assert float(a.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing() -> None:
    """Before the first step the model is the base model, bit for bit in its hidden states."""
    rows, model = tokens_of((6, 9)), base("llama")
    bare, adapted = (model.hidden(pack_rows(rows, [given] * 2)) for given in (None, fresh("llama")))
    assert torch.equal(bare, adapted)


@pytest.mark.parametrize(("rank", "scale"), [(1, 32.0), (2, 16.0), (32, 1.0), (64, 0.5)])
def test_scale_is_32_over_rank(rank: int, scale: float) -> None:
    """The factor of ``B @ A`` is 32 over the rank, in the body and in the head."""
    adapter = fresh("llama", rank=rank)
    assert adapter.scale == scale
    assert adapter.head is not None
    assert adapter.head.scale == scale


PARTS = {
    "llama": {
        "train_attn": {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"},
        "train_mlp": {f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")},
        "train_unembed": {"lm_head"},
    },
    "gpt2": {
        "train_attn": {f"transformer.h.{i}.attn.{p}" for i in (0, 1) for p in ("c_attn", "c_proj")},
        "train_mlp": {f"transformer.h.{i}.mlp.{p}" for i in (0, 1) for p in ("c_fc", "c_proj")},
        "train_unembed": {"lm_head"},
    },
    "phi3": {
        "train_attn": {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("qkv", "o")},
        "train_mlp": {f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate_up", "down")},
        "train_unembed": {"lm_head"},
    },
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("on", [("train_attn",), ("train_mlp",), ("train_unembed",), ("train_attn", "train_unembed")])
def test_switches_choose_the_projections(kind: str, on: tuple[str, ...]) -> None:
    """``train_attn``, ``train_mlp`` and ``train_unembed`` each switch exactly their projections."""
    adapter = fresh(kind, **{name: name in on for name in PARTS[kind]})
    assert set(adapter.tensors) == set.union(*(PARTS[kind][name] for name in on))
    assert (adapter.head is None) == ("train_unembed" not in on)


@pytest.mark.parametrize("kind", PARTS)
def test_all_projections_are_adapted_by_default(kind: str) -> None:
    """By default every projection and the head are adapted, with the shapes of the base."""
    adapter = fresh(kind, rank=2)
    assert set(adapter.tensors) == set.union(*PARTS[kind].values())
    modules = dict(plain(kind).named_modules())
    for path, (a, b) in adapter.tensors.items():
        shape = tuple(modules[path].weight.shape)
        assert {(b.shape[0], a.shape[1])} <= {shape, shape[::-1]}


def test_a_snapshot_is_a_copy() -> None:
    """What is trained after a snapshot does not reach it."""
    adapter = fresh("llama")
    copy = adapter.snapshot()
    assert torch.equal(copy.arena, adapter.arena)
    before = copy.arena.clone()
    adapter.arena.add_(1)
    assert torch.equal(copy.arena, before)
    path = next(iter(copy.tensors))
    assert torch.equal(copy.tensors[path][0].flatten(), before[: copy.tensors[path][0].numel()])


def test_names_are_views_in_the_arenas_order() -> None:
    """PEFT's names cover the arena once, in order, as views that write through."""
    adapter = fresh("gpt2", rank=3)
    named = adapter.named()
    assert torch.equal(torch.cat([view.flatten() for view in named.values()]), adapter.arena)
    for view in named.values():
        view.fill_(7)
    assert bool((adapter.arena == 7).all())


NOISE = {
    "llama": (),
    "qwen3": ("Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",),
    "gpt2": (
        "fan_in_fan_out is set to False but the target module is `Conv1D`",
        "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`",
        "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    ),
}


@pytest.mark.parametrize("kind", NOISE)
@torch.no_grad()
def test_peft_loads_a_checkpoint_and_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    """A saved checkpoint, loaded by PEFT on the plain model, is the model that was trained."""
    bench = Bench(tmp_path)
    model = bench.create("run", kind, rank=4, seed=3)
    bench.one(step(Save("run", "sampler_weights", "done"), "run"))
    place = bench.catalogue.folder("tinker://run/sampler_weights/done")
    with warnings.catch_warnings():
        for message in NOISE[kind]:
            warnings.filterwarnings("ignore", message=f".*{re.escape(message)}")
        theirs = PeftModel.from_pretrained(plain(kind), str(place)).eval()
    row = tokens_of((17,))[0]
    adapter = model.state.adapter
    ours = head_logits(base(kind).hidden(pack_rows([row], [adapter])), base(kind).head, adapter.head)
    assert relative(ours, plain_logits(theirs, row)) <= 3e-6
    assert relative(ours, plain_logits(plain(kind), row)) > 0.05
    loaded = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(loaded) == len(adapter.named())


def test_the_configuration_for_peft_names_what_is_adapted(tmp_path: Path) -> None:
    """``adapter_config.json`` holds the base, the rank, alpha 32 and exactly the adapted modules."""
    bench = Bench(tmp_path)
    bench.create("run", rank=2, train_mlp=False)
    saved = bench.one(step(Save("run", "weights", "x"), "run"))
    config = json.loads((bench.catalogue.folder(saved.path) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 32, folder("llama"))
    assert config["target_modules"] == sorted([*(f"self_attn.{p}_proj" for p in "qkvo"), "lm_head"])
