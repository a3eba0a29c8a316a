"""``BaseModel``: a frozen transformers model, run on packed rows up to its hidden states."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tickwork.compute.attention import register
from tickwork.compute.budget import DEFAULT, Budget
from tickwork.compute.cache import KVPool
from tickwork.compute.lora import Adapter, install
from tickwork.compute.recompute import Recompute
from tickwork.compute.rows import Packed, Row, pack
from tickwork.errors import ModelLoadError
from tickwork.models import locate
from tickwork.results import GetInfoResponse, ModelData
from tickwork_kernels import Head, head_logits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Greatest difference between the packed and the plain forward's logits at loading, relative to their spread.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class BaseModel:
    """One frozen base model, shared by all adapters trained on it.

    Args:
        name: ``tickwork/tiny``, a local path or a hub name.
        device: where it runs.
        dtype: dtype of its weights.
        checkpoint_activations: whether its layers are run again in the backward instead of keeping what it needs.

    ``budget`` says how many tokens go through it at once; its owner may put another in its place.

    Raises:
        ModelLoadError: unknown, unreadable, or its packed forward differs from its plain one.

    Room: the device thread.
    """

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, *, checkpoint_activations: bool = False
    ) -> None:
        self.name, self.device, self.dtype = name, device, dtype
        self.budget = Budget(DEFAULT)
        self._current: dict[str, Packed] = {}
        model = _load(name, dtype).to(device).eval().requires_grad_(False)
        config = model.config.get_text_config()
        self.arch = str(model.config.architectures[0] if model.config.architectures else type(model).__name__)
        self.vocab_size = int(config.vocab_size)
        self.context = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self.stop_ids = _stop_ids(model)
        self.head = _head(model, config)
        self.parameters = sum(each.numel() for each in model.parameters())
        expected = _plain_logits(model, self._probe())
        self.shapes = install(model, self._current)
        model.set_attn_implementation(register())
        self._body = model.base_model
        self.recompute = Recompute(self._body, self._current) if checkpoint_activations else None
        self._check(expected)

    def info(self, model_id: str, adapter: Adapter) -> GetInfoResponse:
        """Describe a model trained on this base."""
        data = ModelData(arch=self.arch, model_name=self.name, tokenizer_id=self.name)
        return GetInfoResponse(data, model_id, self.name, True, adapter.config.rank, adapter.seed)

    def hidden(self, packed: Packed) -> torch.Tensor:
        """Run packed rows through the decoder.

        Returns:
            final hidden states, ``[T, D]`` in the model's dtype; differentiable in the adapters' tensors.
        """
        self._current["packed"] = packed
        try:
            states: torch.Tensor = self._body(
                input_ids=packed.tokens, position_ids=packed.positions, use_cache=False, packed=packed
            ).last_hidden_state
        finally:
            del self._current["packed"]
        return states.squeeze(0)

    def tensors(self) -> list[torch.Tensor]:
        """Its weights and buffers, which every pass reads and none changes."""
        return [*self._body.parameters(), *self._body.buffers(), self.head.weight]

    def _probe(self) -> list[torch.Tensor]:
        """Two short rows of different tokens and lengths."""
        ids = torch.arange(8, device=self.device) * 7919 % self.vocab_size
        return [ids[:5], ids[5:]]

    @torch.no_grad()
    def _check(self, expected: list[torch.Tensor]) -> None:
        """Compare packed rows with plain forwards: an architecture that does not pack must not train."""
        probe, pool = self._probe(), KVPool()
        pool.reserve(8)
        rows = [Row(ids[:2].cpu().numpy(), slot=pool.acquire()) for ids in probe]
        rest = [Row(ids[2:].cpu().numpy(), start=2, slot=row.slot) for ids, row in zip(probe, rows, strict=True)]
        try:
            whole = self._logits(pack([Row(ids.cpu().numpy()) for ids in probe], self.device))
            self._logits(pack(rows, self.device, pool))
            tails = self._logits(pack(rest, self.device, pool))
        except (TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise ModelLoadError(f"{self.name!r} ({self.arch}) does not run on packed rows: {error}") from error
        for want, got, tail in zip(expected, whole, tails, strict=True):
            spread = float(want.std())
            off = max(float((want - got).abs().max()), float((want[2:] - tail).abs().max()))
            if not off <= TOLERANCE[self.dtype] * spread:
                raise ModelLoadError(
                    f"{self.name!r} ({self.arch}) does not run on packed rows: its logits are off by {off:.2g}. "
                    "Decoder-only attention models pack; recurrent, hybrid and encoder-decoder models do not."
                )

    def _logits(self, packed: Packed) -> list[torch.Tensor]:
        logits = head_logits(self.hidden(packed), self.head)
        return [logits[start:stop] for start, stop in packed.spans]


def _load(name: str, dtype: torch.dtype) -> Any:
    place = locate(name)
    if place.startswith(("/", "./", "../", "~")) and not os.path.isdir(place):
        raise ModelLoadError(f"base_model {name!r}: there is no such folder")
    _refuse_pickles(name, Path(place))
    try:
        # Eager, because that is the definition: transformers' sdpa leaves out Gemma 2's softcap.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, safetensors' and hub errors for what is one case here.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f"base_model {name!r} could not be loaded: {reason} (a shipped model is 'tickwork/tiny'; "
            "otherwise give a local folder or a hub name that is reachable)"
        ) from error
    model, found = loaded
    if found["missing_keys"]:
        # transformers would go on with random values in their place.
        raise ModelLoadError(f"base_model {name!r} lacks the weights {', '.join(sorted(found['missing_keys'])[:3])} …")
    if any(getattr(model.config.get_text_config(), key, None) for key in ("num_experts", "num_local_experts")):
        raise ModelLoadError(f"base_model {name!r} is a mixture of experts, which is not supported")
    return model


def _refuse_pickles(name: str, folder: Path) -> None:
    """Refuse a folder whose weights are a pickle alone: reading one may run what it says."""
    pickles = [*folder.glob("pytorch_model*"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]
    if pickles and not any(folder.glob("*.safetensors")):
        raise ModelLoadError(
            f"base_model {name!r} holds its weights as pickle ({pickles[0].name}), which may run code when it is read: "
            "have them as safetensors, as save_pretrained writes them"
        )


def _head(model: Any, config: Any) -> Head:
    layer = model.get_output_embeddings()
    if layer is None:
        raise ModelLoadError(f"{type(model).__name__} has no language-model head")
    scaling = getattr(config, "logits_scaling", None)
    multiplier = 1.0 / float(scaling) if scaling else float(getattr(config, "logit_scale", None) or 1.0)
    return Head(
        weight=layer.weight.detach(),
        bias=None if getattr(layer, "bias", None) is None else layer.bias.detach(),
        softcap=getattr(config, "final_logit_softcapping", None),
        multiplier=multiplier,
    )


def _stop_ids(model: Any) -> frozenset[int]:
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


@torch.no_grad()
def _plain_logits(model: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in rows]
