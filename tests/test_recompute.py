"""Tests of activation checkpointing: the same numbers to the bit, and how much less is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Olmo2Config

from models import CPU, KINDS, Bench, adapter_of, base, data_of, folder, off, tokens_of, train
from tickwork.compute.budget import saved_bytes, token_bytes
from tickwork.compute.lora import Adapter
from tickwork.compute.model import BaseModel
from tickwork.compute.recompute import Recompute, decoder_layers
from tickwork.compute.rows import Packed, Row, pack
from tickwork.errors import ModelLoadError
from tickwork.types import LoraConfig

LENGTHS = (9, 4, 13, 1, 6)
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_same_to_the_bit(kind: str) -> None:
    """Two adapters' requests, one over two passes: running layers again changes no bit of any result."""
    found = []
    for again in (False, True):
        bench = Bench(checkpoint_activations=again)
        for name, seed in (("a", 1), ("b", 2)):
            bench.create(name, kind, seed=seed)
        outcomes = bench.run(train("a", data_of(LENGTHS)), train("b", data_of(LENGTHS, 1)), max_tokens=40)
        gradients = [bench.model(name).state.grad for name in "ab"]
        found.append(([outcome.value.metrics["loss:sum"] for outcome in outcomes], gradients))
    (losses, gradients), (again_losses, again_gradients) = found
    assert losses == again_losses
    assert all(bool(grad.any()) for grad in gradients)
    assert all(torch.equal(one, two) for one, two in zip(gradients, again_gradients, strict=True))


class Runs:
    """What the first layer of a model was run on, call by call; the one that is to fail runs out of memory."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.fails = 0

    def note(self, current: dict[str, Any]) -> None:
        self.seen.append(dict(current))
        if len(self.seen) == self.fails:
            raise torch.OutOfMemoryError("simulated")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs of the first layer of whatever is loaded meanwhile, those of the backward included."""
    runs, init = Runs(), Recompute.__init__

    def watch(self: Recompute, body: torch.nn.Module, current: dict[str, Any]) -> None:
        first = decoder_layers(body)[0]
        forward = first.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            runs.note(current)
            return forward(*args, **kwargs)

        first.forward = noted
        init(self, body, current)

    monkeypatch.setattr(Recompute, "__init__", watch)
    return runs


def test_layers_run_again_only_where_gradients_are_wanted(runs: Runs) -> None:
    """A forward alone runs a layer once; with a backward it runs twice, on the same rows, and leaves nothing behind."""
    bench = Bench(checkpoint_activations=True)
    bench.create("a")
    runs.seen.clear()
    bench.one(train("a", data_of(LENGTHS), backward=False))
    assert len(runs.seen) == 1
    bench.one(train("a", data_of(LENGTHS)))
    assert len(runs.seen) == 3
    assert runs.seen[1]["packed"] is runs.seen[2]["packed"]
    assert vars(bench.model("a").base)["_current"] == {}


def test_a_layer_run_again_may_run_out_of_memory(runs: Runs) -> None:
    """A lack of memory within the backward is one like any other: the pass is run in halves, and nothing is left."""
    bench = Bench(checkpoint_activations=True)
    bench.create("a")
    bench.one(train("a", data_of(LENGTHS)))
    want = bench.gradient("a")
    bench.model("a").state.grad.zero_()
    runs.seen.clear()
    runs.fails = 2
    bench.one(train("a", data_of(LENGTHS)))
    assert len(runs.seen) == 6
    assert off(bench.gradient("a"), want) <= 5e-6
    assert vars(bench.model("a").base)["_current"] == {}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with four layers."""
    place = tmp_path_factory.mktemp("deep")
    config = LlamaConfig(**SMALL, num_hidden_layers=4, num_key_value_heads=2, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return str(place)


def test_a_forward_keeps_a_third_at_most(deep: str) -> None:
    """Of four layers less than a third is kept, and the budget counts with that and one whole layer."""
    plain = BaseModel(deep, CPU, torch.float32)
    again = BaseModel(deep, CPU, torch.float32, checkpoint_activations=True)
    whole, kept = saved_bytes(plain), saved_bytes(again)
    assert 4 * SMALL["hidden_size"] * 4 <= kept <= whole / 3
    assert again.recompute is not None
    with again.recompute.off():
        assert saved_bytes(again) == whole
    assert token_bytes(again) - token_bytes(plain) == kept + whole // 4 - whole


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_found(kind: str) -> None:
    """In every architecture the list of the decoder's layers is found, whatever it is called."""
    assert len(decoder_layers(vars(base(kind))["_body"])) == 2


@pytest.mark.parametrize("config", [GPTNeoXConfig, Olmo2Config])
def test_layers_of_other_architectures_are_found(config: Any) -> None:
    """So they are where they have other names, or other neighbours."""
    body = AutoModelForCausalLM.from_config(config(**SMALL, num_hidden_layers=3, pad_token_id=0)).base_model
    layers = decoder_layers(body)
    assert len(layers) == 3
    assert all("Layer" in type(layer).__name__ for layer in layers)


def test_a_decoder_without_layers_is_refused() -> None:
    """What has no list of layers can not be run again, and is refused by the option's name."""
    with pytest.raises(ModelLoadError, match="checkpoint_activations"):
        Recompute(torch.nn.Linear(2, 2), {})


def test_a_layer_run_again_reads_its_own_pass() -> None:
    """Two forwards before either backward: each is differentiated by its own rows and adapter."""
    model = BaseModel(folder("llama"), CPU, torch.float32, checkpoint_activations=True)
    adapters = [adapter_of(model, LoraConfig(rank=4), seed) for seed in (1, 2)]
    rows = [tokens_of(lengths) for lengths in ((5, 3), (9,))]
    packs = [packed_rows(own, adapter) for own, adapter in zip(rows, adapters, strict=True)]
    states = [model.hidden(packed) for packed in packs]
    for own, adapter, packed, hidden in zip(rows, adapters, packs, states, strict=True):
        plain = packed_rows(own, adapter)
        assert torch.equal(gradient(hidden, packed), gradient(base("llama").hidden(plain), plain))


def packed_rows(rows: list[Any], adapter: Adapter) -> Packed:
    """Pack rows of one adapter for a pass with a gradient."""
    return pack([Row(row, adapter) for row in rows], CPU, gradient=True)


def gradient(hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Run the backward; return the adapter's gradient."""
    (stack,) = packed.stacks
    torch.autograd.grad(hidden.sum(), stack.leaves, allow_unused=True)
    assert stack.grad is not None
    assert bool(stack.grad.any())
    return stack.grad
