"""A client of a served model: through the official SDK, and beneath it, where one answer alone is timed."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

from bench.durability.serving import KEY, MODEL, WAIT

RATE = 1e-4


def open_sdk(url: str) -> Any:
    """Open the official client, which wants to be closed while its server lives."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    warnings.simplefilter("ignore")
    import tinker  # noqa: PLC0415  an extra

    return tinker.ServiceClient(base_url=url, api_key=KEY)


@contextmanager
def sdk(url: str) -> Iterator[Any]:
    """Open the official client and close it in the end."""
    service = open_sdk(url)
    try:
        yield service
    finally:
        service.close("success").result(WAIT)


def batch(rows: Sequence[np.ndarray]) -> list[Any]:
    """Return rows of token ids, each one longer than the model input, as the SDK's datums for cross_entropy."""
    from tinker import types  # noqa: PLC0415

    def datum(row: np.ndarray) -> Any:
        inputs: dict[str, Any] = {"target_tokens": row[1:].tolist(), "weights": [1.0] * (len(row) - 1)}
        return types.Datum(model_input=types.ModelInput.from_ints(row[:-1].tolist()), loss_fn_inputs=inputs)

    return [datum(row) for row in rows]


def random_rows(count: int, length: int, vocab: int) -> list[np.ndarray]:
    """Return rows of that many tokens and one more."""
    return list(np.random.default_rng(0).integers(0, vocab, (count, length + 1)))


class Trainer:
    """A training model under the official SDK."""

    def __init__(self, service: Any, data: list[Any], rank: int) -> None:
        from tinker import types  # noqa: PLC0415

        self._adam = types.AdamParams(learning_rate=RATE)
        self._data = data
        self._client = service.create_lora_training_client(MODEL, rank=rank, seed=0).result(WAIT)

    def ahead(self, steps: int) -> None:
        """Submit that many steps, two requests each, and wait for all of them."""
        asked: list[Any] = []
        for _ in range(steps):
            asked += [self._client.forward_backward(self._data, "cross_entropy"), self._client.optim_step(self._adam)]
        for future in asked:
            future.result(WAIT)

    def in_turn(self, steps: int) -> None:
        """Take that many steps, each submitted together and awaited before the next."""
        for _ in range(steps):
            self.ahead(1)

    def logprobs(self) -> list[float]:
        """Return those of the batch as the model is now."""
        outputs = self._client.forward(self._data, "cross_entropy").result(WAIT).loss_fn_outputs
        return [number for output in outputs for number in output["logprobs"].data]


class Poster:
    """A training model under plain HTTP.

    Args:
        data: of each pass, as the SDK would send it.
    """

    def __init__(self, url: str, data: list[Any], rank: int) -> None:
        self._http = httpx.Client(base_url=f"{url}/api/v1/", headers={"X-API-Key": KEY}, timeout=WAIT)
        session = self._post("create_session", tags=[], user_metadata={}, sdk_version="0.38.0")["session_id"]
        lora = {"rank": rank, "seed": 0}
        made = self._post("create_model", session_id=session, model_seq_id=0, base_model=MODEL, lora_config=lora)
        self._model, self._data, self._number = str(made["model_id"]), data, 0
        self._fetch(made)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def step(self) -> tuple[float, float]:
        """Take one step; return the seconds in which its pass and its optimizer step were accepted."""
        self._number += 2
        body = _pass(self._model, self._number - 1, self._data)
        begun = time.perf_counter()
        passed = self._http.post("forward_backward", content=body, headers={"Content-Type": "application/x-protobuf"})
        between = time.perf_counter()
        ask = {"model_id": self._model, "seq_id": self._number, "adam_params": {"learning_rate": RATE}}
        stepped = self._http.post("optim_step", json=ask)
        ended = time.perf_counter()
        for answer in (passed, stepped):
            self._fetch(answer.raise_for_status().json())
        return between - begun, ended - between

    def _post(self, path: str, **body: Any) -> Any:
        return self._http.post(path, json=body).raise_for_status().json()

    def _fetch(self, promised: Any) -> None:
        while (answer := self._http.post("retrieve_future", json={"request_id": promised["request_id"]})).is_error:
            if answer.status_code != 408:
                answer.raise_for_status()


def _pass(model: str, number: int, data: list[Any]) -> bytes:
    """Encode a pass with the SDK's own code."""
    from tinker.proto.request_conv import forward_backward_request_to_proto  # noqa: PLC0415
    from tinker.types.forward_backward_input import ForwardBackwardInput  # noqa: PLC0415
    from tinker.types.forward_backward_request import ForwardBackwardRequest  # noqa: PLC0415

    given = ForwardBackwardInput(data=data, loss_fn="cross_entropy", loss_fn_config=None)
    return bytes(forward_backward_request_to_proto(ForwardBackwardRequest(given, model, number)).SerializeToString())
