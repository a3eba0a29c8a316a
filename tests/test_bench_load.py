"""The load: many SDK clients with mistakes among their requests, each served as if it were alone and made none."""

from __future__ import annotations

import attrs
import pytest
from bench import load
from bench.table import table
from bench.workloads import make_qwen205k

from served import KEY
from tickwork.server import Settings, serving

CLIENTS, REQUESTS = 8, 20


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Eight clients at once, with one mistake in five, and each of them alone."""
    folder = tmp_path_factory.mktemp("load")
    model = str(make_qwen205k(folder / "model"))
    with pytest.MonkeyPatch.context() as patch:
        script = load.script
        patch.setattr(load, "script", lambda seed, count: script(seed, count, 0.2))
        with serving(
            Settings(models=(f"load/qwen3-205k={model}",), store=folder / "store", port=0, device="cpu", invariant=True)
        ) as url:
            told, seconds = load.together(url, KEY, "load/qwen3-205k", CLIENTS, REQUESTS)
        return told, load.alone(model, CLIENTS, REQUESTS), seconds


def test_nothing_is_lost_and_nothing_is_done_twice(measured):
    """Each request has one answer, each mistake is refused, and losses and steps are those of a client alone."""
    told, expected, seconds = measured
    assert [len(each) for each in told] == [REQUESTS] * CLIENTS
    mistakes = sum(each.kind not in load.RIGHT for client in told for each in client)
    assert mistakes > CLIENTS
    for got, want in zip(told, expected, strict=True):
        assert load.differences(got, want) == []
        steps = [each.value for each in got if each.kind == "step"]
        assert steps == sorted(steps)
    rows = load.rows_of(told, expected, seconds)
    assert rows[-1]["ours"] == f"0 of {CLIENTS * REQUESTS}"
    assert f"{mistakes} of {CLIENTS * REQUESTS} wrong" in rows[0]["workload"]
    assert [row.style for row in table(rows).rows] == [""] * 3


@pytest.mark.parametrize("change", ["lost", "twice", "another loss", "another step", "a mistake taken"])
def test_what_is_not_as_alone_is_found(measured, change):
    """A client that lost a result, or whose step was taken twice, would be told."""
    told, expected, _ = measured
    who = next(place for place, each in enumerate(told) if any(one.kind not in load.RIGHT for one in each))
    got = list(told[who])
    loss, step, mistake = (
        next(place for place, each in enumerate(got) if each.kind == "loss"),
        next(place for place, each in enumerate(got) if each.kind == "step"),
        next(place for place, each in enumerate(got) if each.kind not in load.RIGHT),
    )
    if change == "lost":
        del got[loss]
    elif change == "twice":
        got.insert(step, got[step])
    elif change == "another loss":
        got[loss] = attrs.evolve(got[loss], value=got[loss].value * (1 + 3e-5))
    elif change == "another step":
        got[step] = attrs.evolve(got[step], value=got[step].value + 1)
    else:
        got[mistake] = attrs.evolve(got[mistake], value=1.0)
    assert load.differences(got, expected[who])
    rows = load.rows_of([*told[:who], got, *told[who + 1 :]], expected, 1.0)
    assert table(rows).rows[-1].style == "bold red"
