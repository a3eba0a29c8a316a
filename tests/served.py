"""What the server's tests share: datums, the official SDK, and raw HTTP beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import tinker
from tinker import types

TINY = "tickwork/tiny"
KEY = "tml-test"
PROTOBUF = "application/x-protobuf"
VERSION = {"sdk_version": "0.38.0"}

TOKENS = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7]


def datum(tokens: list[int] | None = None, weights: list[float] | None = None, **more: Any) -> types.Datum:
    """Make a datum that predicts each next token."""
    tokens = tokens or TOKENS
    count = len(tokens) - 1
    inputs = {"target_tokens": tokens[1:], "weights": weights or [1.0] * count, **more}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def rl_datum(logprobs: list[float], advantages: list[float], tokens: list[int] | None = None) -> types.Datum:
    """Make a datum for the policy losses."""
    tokens = tokens or TOKENS
    inputs = {"target_tokens": tokens[1:], "logprobs": logprobs, "advantages": advantages}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


@contextmanager
def sdk(url: str, key: str = KEY, **more: Any) -> Iterator[tinker.ServiceClient]:
    """Open the official client."""
    client = tinker.ServiceClient(base_url=url, api_key=key, **more)
    try:
        yield client
    finally:
        client.close("success").result(60)


class Raw:
    """Plain HTTP to a server, for what the official client would never send."""

    def __init__(self, url: str, key: str | None = KEY) -> None:
        headers = {} if key is None else {"X-API-Key": key}
        self.http = httpx.Client(base_url=f"{url}/api/v1/", headers=headers, timeout=60)
        self._numbers = itertools.count()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def post(self, path: str, body: object = None, **more: Any) -> httpx.Response:
        """Post JSON."""
        return self.http.post(path, json={} if body is None else body, **more)

    def ok(self, path: str, body: object = None) -> dict[str, Any]:
        """Post JSON that must be taken."""
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def session(self) -> str:
        """Open a session."""
        made = self.ok("create_session", {"tags": [], "user_metadata": {}, **VERSION, "type": "create_session"})
        return str(made["session_id"])

    def model(self, session: str | None = None, number: int = 0, base: str = TINY, **lora: Any) -> str:
        """Make a training model and wait for it."""
        session = session or self.session()
        lora = {"rank": 4, "seed": 1, **lora}
        ask = {"session_id": session, "model_seq_id": number, "base_model": base, "lora_config": lora}
        promised = self.ok("create_model", ask)
        made = self.result(promised["request_id"])
        assert "error" not in made, made
        return str(promised["model_id"])

    def poll(self, request_id: str, *, proto: bool = False) -> httpx.Response:
        """Poll once."""
        headers = {"Accept": PROTOBUF} if proto else {}
        return self.http.post("retrieve_future", json={"request_id": request_id}, headers=headers)

    def result(self, request_id: str) -> dict[str, Any]:
        """Poll until there is a result."""
        while True:
            answer = self.poll(request_id)
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                found: dict[str, Any] = answer.json()
                return found

    def optim(self, model_id: str, seq_id: object, **params: Any) -> httpx.Response:
        """Post an optimizer step."""
        adam = {"learning_rate": 1e-3, **params}
        return self.post("optim_step", {"model_id": model_id, "seq_id": seq_id, "adam_params": adam})

    def forward_backward(self, model_id: str, seq_id: int, data: list[types.Datum], **more: Any) -> httpx.Response:
        """Post a pass as the official client encodes it."""
        return self.raw_pass(pass_body(model_id, seq_id, data, **more))

    def raw_pass(self, body: bytes, **headers: str) -> httpx.Response:
        """Post the bytes of a pass."""
        return self.http.post("forward_backward", content=body, headers={"Content-Type": PROTOBUF, **headers})


def pass_body(
    model_id: str,
    seq_id: int,
    data: list[types.Datum],
    loss_fn: Any = "cross_entropy",
    config: dict[str, float | str] | None = None,
    *,
    forward_only: bool = False,
) -> bytes:
    """Encode a pass with the official client's own code."""
    from tinker.proto.request_conv import forward_backward_request_to_proto
    from tinker.types.forward_backward_input import ForwardBackwardInput
    from tinker.types.forward_backward_request import ForwardBackwardRequest

    given = ForwardBackwardInput(data=data, loss_fn=loss_fn, loss_fn_config=config)
    message = forward_backward_request_to_proto(ForwardBackwardRequest(given, model_id, seq_id))
    message.forward_only = forward_only
    return bytes(message.SerializeToString())
