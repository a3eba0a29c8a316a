"""How long a large training body takes from its bytes to the request that the engine gets."""

from __future__ import annotations

import statistics
import time

import numpy as np

from tickwork import build
from tickwork.server import schema, wire

ROWS, LENGTH = 128, 1024
ROUNDS = 15


def median_ms() -> float:
    """Return the median, in milliseconds."""
    body = _body()
    taken = []
    for _ in range(ROUNDS + 3):
        begun = time.perf_counter()
        found = wire.open_training(body)
        ask = found.ask()
        request = build.forward_backward(found.model_id, ask.data, ask.loss_fn, ask.config, not ask.forward_only)
        taken.append(time.perf_counter() - begun)
        assert request.tokens == ROWS * LENGTH
    return 1e3 * statistics.median(taken[3:])


def _body() -> bytes:
    message = schema.ForwardBackwardRequest(model_id="s:train:0", seq_id=1, loss_fn="cross_entropy")
    tokens = np.arange(LENGTH + 1) % 1000
    for _ in range(ROWS):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = tokens[:-1].astype("<i4").tobytes()
        targets, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights"]
        targets.dense, targets.dtype = tokens[1:].astype("<i8").tobytes(), schema.INT64
        weights.dense, weights.dtype = np.ones(LENGTH, "<f4").tobytes(), schema.FLOAT32
        targets.shape.append(LENGTH)
        weights.shape.append(LENGTH)
    return bytes(message.SerializeToString())
