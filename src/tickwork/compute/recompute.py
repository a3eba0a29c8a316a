"""Activation checkpointing: a layer keeps its input alone, and the backward runs its forward again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tickwork.compute.rows import Packed
from tickwork.errors import ModelLoadError


class Recompute:
    """Wraps each of a decoder's layers, so that of what it computes only its input outlives the forward.

    Passes that want no gradient keep nothing and are not touched.

    Args:
        body: the decoder.
        current: what its projections read of the pass under way. It is gone by the time of the backward, and is
            there again while a layer is run again.

    Raises:
        ModelLoadError: the decoder has no list of layers.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
    """

    def __init__(self, body: torch.nn.Module, current: dict[str, Packed]) -> None:
        layers = decoder_layers(body)
        if not layers:
            raise ModelLoadError(f"checkpoint_activations: {type(body).__name__} has no list of layers; leave it off")
        self.layers = len(layers)
        self._current = current
        self._on = True
        for layer in layers:
            layer.forward = self._wrapped(layer.forward)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Keep what each layer computes, as without: to measure what that is."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def _wrapped(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._on or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            held = dict(self._current)

            def again(*args: Any, **kwargs: Any) -> Any:
                with self._holding(held):
                    return forward(*args, **kwargs)

            # Nothing here is random, so no state of a generator is kept.
            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    @contextmanager
    def _holding(self, held: dict[str, Packed]) -> Iterator[None]:
        before = dict(self._current)
        self._current.update(held)
        try:
            yield
        finally:
            self._current.clear()
            self._current.update(before)


def decoder_layers(body: torch.nn.Module) -> list[Any]:
    """Return a decoder's layers: of its lists of modules, that with the most parameters, the outermost if equal."""
    lists = [module for module in body.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=()))
