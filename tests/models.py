"""Tiny random transformers models, the plain ways to compute what Tickwork computes, and a device driven by hand."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from planning import plan
from tickwork.catalogue import Catalogue
from tickwork.compute.lora import Adapter
from tickwork.compute.model import BaseModel
from tickwork.compute.rows import Packed, Row, pack
from tickwork.compute.stage import Device, TrainingModel
from tickwork.engine.plan import Stage
from tickwork.engine.request import Outcome, Request
from tickwork.requests import CreateModel, ForwardBackward, Sample
from tickwork.types import Datum, LoraConfig, ModelInput, SamplingParams
from tickwork_kernels import head_logits

# Operations this small lose by threads: on a machine with other work the tests would take several times as long.
torch.set_num_threads(1)

CPU = torch.device("cpu")
VOCAB, CONTEXT = 131, 96
WINDOW = 4
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # logits as far apart as a trained model's
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_GROUPED, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(**_GEMMA, final_logit_softcapping=5.0, attn_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": lambda: GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        **{key: _COMMON[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")},
    ),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "mamba": lambda: MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=4, tie_word_embeddings=False
    ),
}
KINDS = tuple(kind for kind in CONFIGS if kind != "mamba")

_ROOT = tempfile.TemporaryDirectory(prefix="tickwork-tests-")
atexit.register(_ROOT.cleanup)


@functools.cache
def folder(kind: str) -> str:
    """Save a random model of a kind, once for the session, and return where it lies."""
    with torch.random.fork_rng():
        torch.manual_seed(sorted(CONFIGS).index(kind))
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms start at 0 and 1, which would hide mistakes
                    parameter.add_(0.2 * torch.randn_like(parameter))
    place = Path(_ROOT.name) / kind
    model.save_pretrained(place)
    return str(place)


@functools.cache
def base(kind: str) -> BaseModel:
    """Return the base model of a kind, in float32; shared, since it is frozen."""
    return BaseModel(folder(kind), CPU, torch.float32)


def plain(kind: str) -> Any:
    """Load the transformers model itself, which knows nothing of packed rows."""
    model = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@functools.cache
def plain_shared(kind: str) -> Any:
    """Return a plain model that no test changes."""
    return plain(kind)


def plain_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return ``[L, V]`` logits of one row."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the greatest difference relative to the spread of what is wanted."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.std())


def numbers(seed: int) -> np.random.Generator:
    """Return a source of random numbers."""
    return np.random.default_rng(seed)


def tokens_of(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Return random token ids, one row for each length."""
    random = numbers(seed)
    return [random.integers(0, VOCAB, length) for length in lengths]


def adapter_of(base_model: BaseModel, config: LoraConfig, seed: int = 0) -> Adapter:
    """Return an adapter far from its start: B is not zero, so that every gradient flows."""
    adapter = Adapter(base_model.shapes, config, seed, CPU)
    stir(adapter, seed)
    return adapter


def stir(adapter: Adapter, seed: int) -> None:
    """Give B random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.tensors.values():
            b.copy_(0.02 * torch.randn(b.shape, generator=generator))


def packed_logits(base_model: BaseModel, packed: Packed) -> list[torch.Tensor]:
    """Return the logits of each row of a packed batch."""
    logits = head_logits(base_model.hidden(packed), base_model.head)
    return [logits[start:stop] for start, stop in packed.spans]


def pack_rows(rows: Sequence[np.ndarray], adapters: Sequence[Adapter | None] | None = None) -> Packed:
    """Pack training rows."""
    return pack([Row(row, adapter) for row, adapter in zip(rows, adapters or [None] * len(rows), strict=True)], CPU)


class Oracle:
    """A plain transformers model with a hand-written LoRA on every adapted projection, under plain autograd."""

    def __init__(self, kind: str, adapter: Adapter) -> None:
        self.model = plain(kind)
        self.leaves: dict[str, torch.Tensor] = {}
        for path, pair in adapter.tensors.items():
            a, b = (tensor.detach().clone().requires_grad_() for tensor in pair)
            self.leaves[f"base_model.model.{path}.lora_A.weight"] = a
            self.leaves[f"base_model.model.{path}.lora_B.weight"] = b
            self.model.get_submodule(path).register_forward_hook(_low_rank(a, b, 32 / adapter.config.rank))

    def logprobs(self, tokens: Sequence[int], targets: np.ndarray) -> torch.Tensor:
        """Return the live logprobs of ``[N]`` or ``[N, K]`` targets."""
        wanted = torch.from_numpy(np.asarray(targets).reshape(len(tokens), -1).copy())
        logp = plain_logits(self.model, tokens).log_softmax(-1).gather(1, wanted)
        return logp.reshape(np.asarray(targets).shape)

    def of(self, data: Sequence[Datum]) -> list[torch.Tensor]:
        """Return the live logprobs of each datum."""
        return [self.logprobs(d.model_input.to_ints(), d.loss_fn_inputs["target_tokens"].to_numpy()) for d in data]

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Differentiate; gradients by PEFT's names."""
        found = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(self.leaves.items(), found, strict=True)
        }


def _low_rank(a: torch.Tensor, b: torch.Tensor, scale: float) -> Callable[..., torch.Tensor]:
    return lambda module, args, output: output + scale * (args[0] @ a.T @ b.T)


def off(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> float:
    """Return the greatest relative L2 distance of any tensor from what is wanted."""
    assert got.keys() == want.keys()
    assert all(float(tensor.norm()) > 0 for tensor in want.values())
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)


def datum(tokens: np.ndarray, targets: np.ndarray, **inputs: np.ndarray) -> Datum:
    """Build a datum from arrays."""
    return Datum(ModelInput.from_ints(tokens.tolist()), {"target_tokens": targets, **inputs})


def data_of(lengths: Sequence[int], seed: int = 0, width: int | None = None) -> list[Datum]:
    """Return random datums with weights of both signs; targets are ``[N]``, or ``[N, width]``."""
    random = numbers(seed)
    return [
        datum(
            random.integers(0, VOCAB, length),
            random.integers(0, VOCAB, shape),
            weights=random.normal(size=shape).astype(np.float32),
        )
        for length in lengths
        for shape in [(length,) if width is None else (length, width)]
    ]


class Bench:
    """A device run stage by stage, without an engine."""

    def __init__(self, store: Path | None = None, max_tokens: int | None = 64, **options: Any) -> None:
        self.catalogue = Catalogue(store)
        self.device = Device(self.catalogue, "cpu", "float32", max_tokens, **options)

    def create(self, model_id: str, kind: str = "llama", *, stirred: bool = True, **config: Any) -> TrainingModel:
        """Make a training model; its adapter is moved away from its start unless told not to."""
        config = {"rank": 4, "seed": 0, **config}
        self.one(step(CreateModel(model_id, folder(kind), LoraConfig(**config)), model_id))
        if stirred:
            stir(self.model(model_id).state.adapter, config["seed"])
        return self.model(model_id)

    def model(self, model_id: str) -> TrainingModel:
        """Reach into the device for a model."""
        found: TrainingModel = vars(self.device)["_models"][model_id]
        return found

    def gradient(self, model_id: str) -> dict[str, torch.Tensor]:
        """Return a copy of what has been accumulated, by PEFT's names."""
        state = self.model(model_id).state
        return state.adapter.named(state.grad.clone())

    def run(self, *requests: Request, max_tokens: int = 4096) -> list[Outcome]:
        """Plan and run requests to their end; outcomes in the order of the requests."""
        outcomes: dict[Request, Outcome] = {}
        for stage in plan(requests, max_tokens):
            outcomes |= {outcome.request: outcome for outcome in self.device.run(stage, 7, lambda: False)}
        while self.device.sampling:
            stage = Stage(decode=1e-9)
            outcomes |= {outcome.request: outcome for outcome in self.device.run(stage, 7, lambda: False)}
        return [outcomes[request] for request in requests]

    def one(self, request: Request, max_tokens: int = 4096) -> Any:
        """Run one request; return its value or raise its error."""
        (outcome,) = self.run(request, max_tokens=max_tokens)
        if outcome.error is not None:
            raise outcome.error
        return outcome.value


def step(payload: object, lane: str) -> Request:
    """Build a step request."""
    return Request("step", lane, payload)


def train(
    model_id: str,
    data: Sequence[Datum],
    loss_fn: Any = "cross_entropy",
    config: Mapping[str, float] | None = None,
    *,
    backward: bool = True,
) -> Request:
    """Build a forward_backward request."""
    payload = ForwardBackward(model_id, tuple(data), loss_fn, config or {}, backward, given=list(data))
    rows = tuple(d.model_input.length for d in data)
    return Request("pass", model_id, payload, rows=rows, whole=callable(loss_fn), tokens=sum(rows))


def sample(prompt: Sequence[int], params: SamplingParams | None = None, **changes: Any) -> Request:
    """Build a sampling request; the names in ``changes`` are those of ``Sample``."""
    ask = Sample("sampler", tuple(int(t) for t in prompt), 1, params or SamplingParams(max_tokens=8, stop=[]))
    return Request("sample", "sampler", attrs.evolve(ask, **changes))
