"""A server that computes nothing: what is left of a call's time then is the official SDK's own.

``python -m bench.server.stub`` prints its base URL and serves until it is killed. It answers every call at once, with
as few instructions as asyncio allows, so that nobody's web framework stands in the floor.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import orjson

from bench.server.shape import LENGTH, ROWS
from tickwork.results import ForwardBackwardOutput, SampledSequence, SampleResponse
from tickwork.server.settings import Settings
from tickwork.server.wire_results import sample_proto, training_proto
from tickwork.tensors import TensorData

PROTOBUF = b"application/x-protobuf"
JSON = b"application/json"
NUMBERS = itertools.count(1)
# The same switches as ours, so that the SDK goes the same way to both.
SETTINGS = Settings(models={"stub": "stub"})

_LOGPROBS = TensorData.from_numpy(np.full(LENGTH, -7.0, np.float32))
PASS = training_proto(ForwardBackwardOutput("ArrayRecord", [{"logprobs": _LOGPROBS}] * ROWS, {"loss:sum": 1.0}))
SAMPLE = sample_proto(SampleResponse([SampledSequence("length", [5], [-7.0])]), ["0"])

# What has been promised to the clients of each sampler, in order.
PROMISED: dict[str, list[str]] = {}


def answer(path: str, body: bytes) -> tuple[bytes, bytes]:
    """Return media type and body of an answer."""
    if path == "forward_backward":
        return JSON, orjson.dumps({"request_id": f"pass-{next(NUMBERS)}"})
    ask = orjson.loads(body or b"{}")
    if path == "retrieve_future":
        return _result(ask["request_id"])
    return JSON, orjson.dumps(_plain(path, ask))


def _result(request_id: str) -> tuple[bytes, bytes]:
    if request_id.startswith("pass-"):
        return PROTOBUF, PASS
    if request_id.startswith("sample-"):
        return PROTOBUF, SAMPLE
    if request_id.startswith("model-"):
        return JSON, orjson.dumps({"type": "create_model", "model_id": request_id.removeprefix("model-")})
    if request_id.startswith("sampler-"):
        return JSON, orjson.dumps({"path": None, "sampling_session_id": request_id.removeprefix("sampler-")})
    return JSON, b'{"type":"optim_step","metrics":{}}'


def _plain(path: str, ask: dict[str, Any]) -> Any:
    if path == "asample":
        name = f"sample-{next(NUMBERS)}"
        PROMISED.setdefault(ask["sampling_session_id"], []).append(name)
        return {"request_id": name, "sample_sequence_ids": [f"{name}:{i}" for i in range(ask["num_samples"])]}
    if path == "retrieve_futures":
        names = PROMISED.get(ask["target"]["sampling_session_id"], [])
        fresh = names[ask["prev_cursor"] :]
        return {"completions": [{"state": "finished", "request_id": n} for n in fresh], "cursor": len(names)}
    if path == "create_session":
        return {"type": path, "session_id": f"stub{next(NUMBERS)}"}
    if path == "create_model":
        model_id = f"{ask['session_id']}:train:{ask['model_seq_id']}"
        return {"request_id": f"model-{model_id}", "model_id": model_id}
    if path == "get_info":
        data = {"arch": "stub", "model_name": "stub", "tokenizer_id": "stub"}
        return {"type": path, "model_data": data, "model_id": ask["model_id"], "is_lora": True, "lora_rank": 8}
    if path == "save_weights_for_sampler":
        session = ask["model_id"].partition(":")[0]
        return {"request_id": f"sampler-{session}:sample:{ask['sampling_session_seq_id']}"}
    fixed = {
        "client/config": SETTINGS.client_config(),
        "client/dynamic_config": SETTINGS.dynamic_config(),
        "optim_step": {"request_id": f"step-{next(NUMBERS)}"},
        "join_sampling_session": {"client_counter": next(NUMBERS)},
        "telemetry": {"status": "accepted"},
        "session_heartbeat": {"type": "session_heartbeat"},
    }
    return fixed.get(path, {})


async def _connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            path = head.split(" ", 2)[1].partition("/api/v1/")[2]
            _, found, rest = head.partition("content-length:")
            body = await reader.readexactly(int(rest.split("\r\n", 1)[0])) if found else b""
            if path == "retrieve_futures":
                await _until_promised(orjson.loads(body))
            media, sent = answer(path, body)
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (media, len(sent), sent)
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _until_promised(ask: dict[str, Any]) -> None:
    """Hold a poll that has nothing to tell, as a server does: the SDK would ask again at once."""
    for _ in range(2000):
        if ask.get("timeout") == 0 or len(PROMISED.get(ask["target"]["sampling_session_id"], [])) > ask["prev_cursor"]:
            return
        await asyncio.sleep(0.005)


async def main() -> None:
    """Serve on a free port of this machine."""
    server = await asyncio.start_server(_connection, "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
