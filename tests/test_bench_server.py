"""The bench of the server: its stub satisfies the official SDK, and its rows say what was measured."""

from __future__ import annotations

from bench import server
from bench.server import decode
from bench.table import table
from tinker import types

from served import datum, sdk


def test_the_sdk_takes_the_stub_for_a_server():
    with server._stub() as url, sdk(url) as service:
        client = service.create_lora_training_client("stub", rank=8).result(60)
        passed, stepped = client.forward_backward([datum()], "cross_entropy"), client.optim_step(types.AdamParams())
        assert passed.result(60).metrics["loss:sum"] == 1.0
        assert stepped.result(60).metrics == {}
        sampler = client.save_weights_and_get_sampling_client().result(60)
        drawn = [sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)) for _ in "abc"]
        assert [each.result(60).sequences[0].tokens for each in drawn] == [[5]] * 3


def test_a_large_body_is_decoded(monkeypatch):
    monkeypatch.setattr(decode, "ROUNDS", 1)
    assert decode.median_ms() > 0


def test_a_row_that_misses_is_red():
    rows = [server._row("a", "w", 3.0, "stub", 1.0, "<= 2"), server._row("b", "w", 1.0, "stub", 2.0, "<= 2")]
    assert [row["ratio"] for row in rows] == [3.0, 0.5]
    assert [row.style for row in table(rows).rows] == ["bold red", ""]
