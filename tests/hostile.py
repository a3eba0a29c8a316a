"""Sends bodies that are small on the wire and large in memory, and prints what each answer was and what it took.

Run in a process of its own, since the greatest size that a process ever had does not shrink.
"""

from __future__ import annotations

import json
import resource
import sys

import trio
import zstandard

from fakes import Client, fake_server
from served import PROTOBUF


def varint(value: int) -> bytes:
    """Encode a whole number."""
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def field(number: int, inner: bytes) -> bytes:
    """Encode a field of bytes."""
    return varint(number << 3 | 2) + varint(len(inner)) + inner


MILLION = 10**6
LOSS = field(4, b"cross_entropy")
# What follows the model and the number in a pass.
PASSES = {
    "empty datums": field(3, b"") * 2 * MILLION,
    "empty chunks": field(3, field(1, b"") * 2 * MILLION),
    "empty texts": field(3, field(1, field(1, b"")) * 2 * MILLION),
    "empty tensors": field(3, field(2, field(2, b"")) * 2 * MILLION),
    "spans": field(3, field(3, field(1, b"")) * 2 * MILLION),
    "settings": field(7, field(2, b"")) * 2 * MILLION,
    "unknown fields": field(99, b"") * 2 * MILLION,
    "a long shape": field(3, field(2, field(1, b"x") + field(2, field(4, b"\x01" * 20 * MILLION)))),
    "tokens": field(3, field(1, field(1, field(1, bytes(20 * MILLION))))),
}
# The value of a field of a JSON body of each route.
VALUES = {
    "lists": b"[" + b"[]," * 2 * MILLION + b"[]]",
    "objects": b"[" + b"{}," * 2 * MILLION + b"{}]",
    "numbers": b"[" + b"0.1," * 3 * MILLION + b"0]",
    "wrong items": b"[" + b"null," * 2 * MILLION + b"null]",
    "unknown keys": b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b"}",
}
BODIES = {
    "create_session": b'{"tags":%b}',
    "forward": b'{"model_id":"%b","seq_id":1,"forward_input":{"loss_fn":"x","data":%b}}',
    "asample": b'{"sampling_session_id":"%b","seq_id":1,"prompt":{"chunks":[{"tokens":%b}]},"sampling_params":{}}',
    "telemetry": b'{"events":%b}',
}


def peak() -> float:
    """Return the greatest size of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def main() -> None:
    """Try them all."""
    found = {}
    async with fake_server(max_tokens_in_flight=2**20) as server, Client(server) as client:
        model = (await client.model(await client.session())).encode()

        async def measure(name: str, path: str, body: bytes, media: str) -> None:
            headers, packed = {"content-type": media, "content-encoding": "zstd"}, zstandard.compress(body)
            before = peak()
            answer = await client.post(path, content=packed, headers=headers)
            if "request_id" in (told := answer.json()):
                told = (await client.post("retrieve_future", json={"request_id": told["request_id"]})).json()
            found[f"{path}: {name}"] = [answer.status_code, str(told)[:200], len(body) / 2**20, peak() - before]

        for number, (name, body) in enumerate(PASSES.items(), 1):
            start = field(1, model) + varint(2 << 3) + varint(number)
            await measure(name, "forward_backward", start + body + LOSS, PROTOBUF)
        for path, text in BODIES.items():
            for name, value in VALUES.items():
                await measure(
                    name, path, text % ((model, value) if text.count(b"%b") == 2 else value), "application/json"
                )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    trio.run(main)
