"""Tests of packed rows: every architecture's packed forward and gradients against transformers' plain ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, MixtralConfig

from models import (
    CPU,
    KINDS,
    VOCAB,
    Oracle,
    adapter_of,
    base,
    folder,
    off,
    pack_rows,
    packed_logits,
    plain_logits,
    relative,
    tokens_of,
)
from models import plain_shared as plain
from tickwork.compute.cache import KVPool
from tickwork.compute.model import BaseModel
from tickwork.compute.rows import Row, pack
from tickwork.errors import ModelLoadError
from tickwork.types import LoraConfig
from tickwork_kernels import head_gradients

# Relative to the spread of the logits: float32 through two layers (measured: up to 5e-6; a wrong mask: above 1e-1).
ROUNDING = 1e-5
MIXED = (5, 1, 12, 12, 2, 30, 7, 6, 1, 19)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_rows_equal_plain_forwards(kind: str) -> None:
    """Rows of mixed lengths, packed, have the logits that each has alone in the plain model."""
    rows = tokens_of(MIXED)
    for row, got in zip(rows, packed_logits(base(kind), pack_rows(rows)), strict=True):
        assert relative(got, plain_logits(plain(kind), row)) <= ROUNDING


@pytest.mark.parametrize("lengths", [(1,), (9,), (8, 8, 8), (1, 1, 1, 1), (40, 1)])
@torch.no_grad()
def test_any_mix_of_lengths_packs(lengths: tuple[int, ...]) -> None:
    """One row, equal rows and very unequal rows are packed alike right, sliding windows included."""
    rows = tokens_of(lengths, seed=1)
    for row, got in zip(rows, packed_logits(base("mistral"), pack_rows(rows)), strict=True):
        want = plain_logits(plain("mistral"), row)
        assert float((got - want).abs().max()) <= ROUNDING


def schedule(lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """Return forwards of ``(row, start, stop)``: chunked prefill, decoding, late joiners, and pauses."""
    first = [
        [(0, 0, 5)],
        [(0, 5, 6), (1, 0, 3)],
        [(0, 6, 7), (1, 3, 11), (2, 0, 1)],
        [(2, 1, 2), (0, 7, 8), (1, 11, 12), (3, 0, 9)],
        [(1, 12, 13), (3, 9, 10), (2, 2, 9)],
    ]
    reached = [8, 13, 9, 10]
    while any(at < length for at, length in zip(reached, lengths, strict=True)):
        first.append([(row, at, at + 1) for row, at in enumerate(reached) if at < lengths[row]])
        reached = [min(at + 1, length) for at, length in zip(reached, lengths, strict=True)]
    return first


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_steps_equal_full_forwards(kind: str) -> None:
    """Chunked prefill, decoding and late joiners in shared forwards have the logits of one full forward."""
    rows = tokens_of([12, 16, 14, 10], seed=2)
    pool = KVPool()
    slots = [pool.acquire() for _ in range(7)][::2]  # not side by side
    got: list[list[torch.Tensor]] = [[] for _ in rows]
    for turn in schedule([len(row) for row in rows]):
        pool.reserve(max(stop for _, _, stop in turn))
        parts = [Row(rows[row][start:stop], start=start, slot=slots[row]) for row, start, stop in turn]
        for (row, _, _), logits in zip(turn, packed_logits(base(kind), pack(parts, CPU, pool)), strict=True):
            got[row].append(logits)
    for row, logits in zip(rows, got, strict=True):
        assert relative(torch.cat(logits), plain_logits(plain(kind), row)) <= ROUNDING


@torch.no_grad()
def test_slots_grow_and_fork_and_are_used_again() -> None:
    """Growing capacity, copying a slot and reusing a released one leave every sequence's logits as they were."""
    model, (row, other) = base("llama"), tokens_of([90, 20], seed=3)
    pool = KVPool()
    first = pool.acquire()
    pool.reserve(10)
    packed_logits(model, pack([Row(row[:10], slot=first)], CPU, pool))
    many = [pool.acquire() for _ in range(40)]
    pool.fork(first, [many[-1]], 10)
    pool.release([many.pop(0)], 10)
    again = pool.acquire()
    pool.reserve(90)
    parts = [
        Row(row[10:], start=10, slot=first),
        Row(row[10:11], start=10, slot=many[-1]),
        Row(other, slot=again),
    ]
    whole, copied, fresh = packed_logits(model, pack(parts, CPU, pool))
    want = plain_logits(plain("llama"), row)
    assert relative(whole, want[10:]) <= ROUNDING
    assert relative(copied, want[10:11]) <= ROUNDING
    assert relative(fresh, plain_logits(plain("llama"), other)) <= ROUNDING


@torch.no_grad()
def test_rows_of_several_adapters_attend_together() -> None:
    """Clients with the same mix of lengths take as many attention calls as one of them; each row is as by itself."""
    model, lengths = base("llama"), [3, 30, 12]
    adapters = [adapter_of(model, LoraConfig(rank=2), seed) for seed in range(4)]
    rows = [Row(ids, each) for seed, each in enumerate(adapters) for ids in tokens_of(lengths, seed)]
    packed = pack(rows, CPU)
    assert packed.order is not None
    assert len(packed.blocks) == len(pack(rows[:3], CPU).blocks) == 3
    for row, logits in zip(rows, packed_logits(model, packed), strict=True):
        (alone,) = packed_logits(model, pack([row], CPU))
        assert relative(logits, alone) <= ROUNDING


def test_an_empty_pool_starts_over() -> None:
    """Once all slots are free the memory is given back, and slots are handed out from the first."""
    pool = KVPool()
    slots = [pool.acquire() for _ in range(20)]
    assert sorted(slots) == list(range(20))
    for slot in slots:
        pool.release([slot], 0)
    assert (pool.slots, pool.capacity, pool.keys, pool.values) == (0, 0, {}, {})
    assert pool.acquire() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_gradients_are_those_of_each_alone(kind: str) -> None:
    """Rows of two adapters of different ranks and a bare row in one batch: gradients are each one's own autograd's."""
    model = base(kind)
    adapters = [adapter_of(model, LoraConfig(rank=3), 1), adapter_of(model, LoraConfig(rank=8, train_unembed=True), 2)]
    rows, owners = tokens_of((9, 4, 13, 6, 1, 11)), [0, 1, 0, None, 1, 1]
    random = np.random.default_rng(5)
    targets = [random.integers(0, VOCAB, len(row)) for row in rows]
    weights = [torch.tensor(random.normal(size=len(row)), dtype=torch.float32) for row in rows]
    whose = [None if owner is None else adapters[owner] for owner in owners]
    packed = pack([Row(row, adapter) for row, adapter in zip(rows, whose, strict=True)], CPU, gradient=True)
    hidden = model.hidden(packed)
    upstream = torch.zeros_like(hidden)
    heads = {}
    for owner, adapter in enumerate(adapters):
        mine = [i for i, o in enumerate(owners) if o == owner]
        where = torch.cat([torch.arange(*packed.spans[i]) for i in mine])
        slope = torch.cat([weights[i] for i in mine])[:, None]
        wanted = torch.from_numpy(np.concatenate([targets[i] for i in mine]))[:, None]
        _, grads = head_gradients(hidden.detach()[where], wanted, model.head, slope, adapter.head)
        upstream[where] = grads.hidden
        heads[owner] = list(grads.adapters[0])
    leaves = [leaf for stack in packed.stacks for leaf in stack.leaves]
    nothing = torch.autograd.grad(hidden, leaves, upstream, allow_unused=True)
    assert not any(grad is not None for grad in nothing)
    for owner, adapter in enumerate(adapters):
        (stack,) = [stack for stack in packed.stacks if stack.adapters == [adapter]]
        assert stack.grad is not None
        mine = adapter.split(stack.grad[0])[:-2] + heads[owner]
        oracle = Oracle(kind, adapter)
        loss = sum(
            (oracle.logprobs(rows[i], targets[i]) * weights[i]).sum() for i, o in enumerate(owners) if o == owner
        )
        assert off(dict(zip(adapter.named(), mine, strict=True)), oracle.gradients(loss)) <= 1e-5


@torch.no_grad()
def test_an_adapter_changes_its_own_rows_only() -> None:
    """A row's logits do not depend on the adapters of the rows beside it."""
    model = base("llama")
    adapter = adapter_of(model, LoraConfig(rank=4))
    rows = tokens_of((7, 7, 7))
    alone = packed_logits(model, pack_rows(rows))
    beside = packed_logits(model, pack_rows(rows, [None, adapter, None]))
    assert relative(beside[0], alone[0]) <= ROUNDING
    assert relative(beside[2], alone[2]) <= ROUNDING
    assert relative(beside[1], alone[1]) > 0.01


def test_stop_ids_head_and_context_come_from_the_folder() -> None:
    """What the sampler and the checks rely on is read from the model's own files."""
    model = base("gemma2")
    assert (model.vocab_size, model.context, model.stop_ids) == (VOCAB, 96, frozenset({2}))
    assert model.head.softcap == 5.0
    assert model.arch == "Gemma2ForCausalLM"


def assert_refused(name: str, *words: str) -> None:
    """Loading fails with an error that names the model and says why."""
    with pytest.raises(ModelLoadError) as caught:
        BaseModel(name, CPU, torch.float32)
    for word in (name, *words):
        assert word in str(caught.value)


def test_a_recurrent_model_is_refused() -> None:
    """Mamba, whose rows can not be packed, is refused by name instead of being trained wrongly."""
    assert_refused(folder("mamba"), "MambaForCausalLM", "packed rows")


def test_a_model_that_sees_ahead_is_refused(tmp_path: Path) -> None:
    """A bidirectional encoder loads as a language model but does not pack, and is refused."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=VOCAB, is_decoder=False, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert_refused(str(tmp_path), "BertLMHeadModel", "packed rows")


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    """A mixture of experts, whose experts get no adapters, is refused by name."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = MixtralConfig(**sizes, vocab_size=VOCAB, num_local_experts=2, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert_refused(str(tmp_path), "experts")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", ""])
def test_an_unknown_model_is_refused(name: str) -> None:
    """A folder that is not there, or no name at all, is an error that repeats the name."""
    assert_refused(name)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "no-such-architecture"}'),
        ("model.safetensors", None),
        ("model.safetensors", b"\x08\x00\x00"),
    ],
)
def test_an_unreadable_folder_is_refused(tmp_path: Path, file: str, content: bytes | None) -> None:
    """A folder whose configuration or weights are missing or damaged is refused by name."""
    place = tmp_path / "model"
    shutil.copytree(folder("llama"), place)
    (place / file).unlink()
    if content is not None:
        (place / file).write_bytes(content)
    assert_refused(str(place))


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """Weights that are not in the file are not made up."""
    lame = tmp_path / "lame"
    shutil.copytree(folder("llama"), lame)
    tensors = load_file(lame / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lame / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelLoadError, match=r"lacks the weights model\.norm\.weight"):
        BaseModel(str(lame), CPU, torch.float32)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.pt", "model.pth"])
def test_a_folder_of_pickles_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Weights that may run code are not read, whatever they hold."""
    shutil.copytree(folder("llama"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / name)
    with pytest.raises(ModelLoadError, match=f"pickle \\({name}\\)"):
        BaseModel(str(tmp_path / "model"), CPU, torch.float32)


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    """A folder whose configuration names a class of its own is refused, and its file never imported."""
    import json

    shutil.copytree(folder("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelLoadError):
        BaseModel(str(tmp_path / "model"), CPU, torch.float32)
    assert not (tmp_path / "ran").exists()
