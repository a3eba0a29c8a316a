"""Tests of the planner, for any requests of any lanes."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tickwork.engine.plan import Pass, Piece, Stage, plan
from tickwork.engine.request import Request

rows = st.lists(st.integers(0, 12), max_size=6).map(tuple)
lanes = st.sampled_from("abc")
passes = st.builds(
    lambda lane, rows, whole: Request("pass", lane, None, rows, whole=whole, tokens=sum(rows)),
    lanes,
    rows,
    st.booleans(),
)
steps = st.builds(lambda lane: Request("step", lane, None), lanes)
samples = st.builds(lambda lane: Request("sample", lane, None), lanes)
requests = st.lists(passes | passes | steps | samples, max_size=16)
budgets = st.integers(1, 20)


def one(lane: str, *rows: int, whole: bool = False) -> Request:
    return Request("pass", lane, None, rows, whole=whole, tokens=sum(rows))


def step(lane: str) -> Request:
    return Request("step", lane, None)


def pieces_of(stages: list[Stage]) -> list[Piece]:
    return [piece for stage in stages for item in stage.passes for piece in item.pieces]


def by_lane(requests: list[Request]) -> dict[str, list[Request]]:
    """Each lane's requests, in order; lanes with none are not there."""
    found: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        found[request.lane].append(request)
    return dict(found)


def placed(stages: list[Stage]) -> list[Request]:
    """Passes and steps in the order in which they run, each once."""
    return list(
        dict.fromkeys(
            request
            for stage in stages
            for request in [piece.request for item in stage.passes for piece in item.pieces] + list(stage.steps)
        )
    )


@given(requests, budgets)
def test_each_request_is_planned_exactly_once(requests: list[Request], max_tokens: int) -> None:
    """Steps and samples appear once; a pass's datums are run once each, in order, or probed and applied once each."""
    stages = plan(requests, max_tokens)

    others = [request for stage in stages for request in (*stage.steps, *stage.samples)]
    assert sorted(map(id, others)) == sorted(id(request) for request in requests if request.kind != "pass")
    seen: dict[Request, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for piece in pieces_of(stages):
        seen[piece.request][piece.phase] += range(piece.start, piece.stop)
    assert set(seen) == {request for request in requests if request.kind == "pass"}
    for request, phases in seen.items():
        every = list(range(len(request.rows)))
        assert dict(phases) in ({"run": every}, {"probe": every, "apply": every})
        assert request.whole or "run" in phases


@given(requests, budgets)
def test_a_lane_keeps_its_order(requests: list[Request], max_tokens: int) -> None:
    """Passes and steps of one lane run in the order in which they arrived."""
    ran = placed(plan(requests, max_tokens))

    assert by_lane(ran) == by_lane([request for request in requests if request.kind != "sample"])


@given(requests, budgets)
def test_nothing_passes_a_barrier_of_its_own_lane(requests: list[Request], max_tokens: int) -> None:
    """Each request's stage is the number of its lane's steps before it, so a step has all before it behind it."""
    stages = plan(requests, max_tokens)

    where = {piece.request: index for index, stage in enumerate(stages) for piece in pieces_of([stage])}
    where |= {request: index for index, stage in enumerate(stages) for request in (*stage.steps, *stage.samples)}
    levels = sorted(
        {sum(r.kind == "step" for r in mine[:at]) for mine in by_lane(requests).values() for at in range(len(mine))}
    )
    for mine in by_lane(requests).values():
        for at, request in enumerate(mine):
            assert where[request] == levels.index(sum(other.kind == "step" for other in mine[:at]))


@given(requests, budgets)
def test_a_stage_has_one_step_of_a_lane_at_most(requests: list[Request], max_tokens: int) -> None:
    """Two barriers of one lane are two stages."""
    for stage in plan(requests, max_tokens):
        assert len({request.lane for request in stage.steps}) == len(stage.steps)


@given(requests, budgets)
def test_no_pass_has_two_pieces_of_one_lane(requests: list[Request], max_tokens: int) -> None:
    """Whether two requests of a client fall into one cycle is chance, so they must not share a pass."""
    for stage in plan(requests, max_tokens):
        for item in stage.passes:
            assert len({piece.request.lane for piece in item.pieces}) == len(item.pieces) > 0


@given(requests, budgets)
def test_no_pass_is_over_budget(requests: list[Request], max_tokens: int) -> None:
    """A pass holds more than ``max_tokens`` only when it is a single datum."""
    for stage in plan(requests, max_tokens):
        for item in stage.passes:
            alone = len(item.pieces) == 1 and item.pieces[0].stop - item.pieces[0].start == 1
            assert item.tokens <= max_tokens or alone
            assert item.tokens == sum(sum(p.request.rows[p.start : p.stop]) for p in item.pieces)


@given(requests, budgets)
def test_a_custom_loss_sees_all_logprobs_first(requests: list[Request], max_tokens: int) -> None:
    """A ``whole`` request is one ``run`` piece, or all its ``probe`` pieces come before its ``apply`` pieces."""
    phases: dict[Request, list[str]] = defaultdict(list)
    for piece in pieces_of(plan(requests, max_tokens)):
        phases[piece.request].append(piece.phase)
    for request, mine in phases.items():
        half = len(mine) // 2
        if request.whole:
            assert mine == ["run"] or (half > 1 and mine == ["probe"] * half + ["apply"] * half)


@given(requests, budgets)
def test_the_last_piece_of_a_request_says_so(requests: list[Request], max_tokens: int) -> None:
    """An executor learns from its pieces when a request is through."""
    marks: dict[Request, list[bool]] = defaultdict(list)
    for piece in pieces_of(plan(requests, max_tokens)):
        marks[piece.request].append(piece.last)
    for mine in marks.values():
        assert mine == [False] * (len(mine) - 1) + [True]


@given(requests, budgets)
def test_jobs_are_a_stage_cut_between_its_passes(requests: list[Request], max_tokens: int) -> None:
    """A stage's jobs hold one pass each: samples are admitted with the first, steps run after the last."""
    for stage in plan(requests, max_tokens):
        first, *others = jobs = stage.jobs()
        assert all(len(job.passes) == 1 for job in jobs) or (not others and not stage.passes)
        assert tuple(item for job in jobs for item in job.passes) == stage.passes
        assert (first.samples, jobs[-1].steps) == (stage.samples, stage.steps)
        assert not any(job.samples for job in others)
        assert not any(job.steps for job in jobs[:-1])


@given(requests, budgets)
def test_a_small_request_never_waits_for_a_large_neighbour(requests: list[Request], max_tokens: int) -> None:
    """Among the n-th requests of all lanes in a level, the smaller one is finished before the larger one begins."""
    for stage in plan(requests, max_tokens):
        order = [piece.request for item in stage.passes for piece in item.pieces]
        first = {request: order.index(request) for request in order}
        last = {request: index for index, request in enumerate(order)}
        mine = by_lane(list(first))
        for turn in range(len(order)):
            rivals = [requests[turn] for requests in mine.values() if turn < len(requests)]
            for small in rivals:
                for large in rivals:
                    assert small.tokens >= large.tokens or last[small] < first[large]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 9))
def test_a_request_is_cut_into_as_few_pieces_as_it_needs(rows: list[int], max_tokens: int) -> None:
    """Two neighbouring pieces of a request would not have fitted into one pass."""
    cut = pieces_of(plan([one("a", *rows)], max_tokens))

    assert all(left.tokens + right.tokens > max_tokens for left, right in pairwise(cut))


def test_lanes_share_passes_and_cycles() -> None:
    """Two clients who each ask for forward-backward, step, forward-backward need two passes in all."""
    a, b = ([one(lane, 3, 2), step(lane), one(lane, 4)] for lane in "ab")

    assert plan([*a, *b], 16) == [
        Stage((Pass((Piece(a[0], 0, 2), Piece(b[0], 0, 2))),), (a[1], b[1])),
        Stage((Pass((Piece(a[2], 0, 1), Piece(b[2], 0, 1))),)),
    ]


def test_a_lane_without_barriers_runs_in_the_first_stage() -> None:
    """Another lane's steps do not delay a request."""
    a, b = [step("a"), step("a"), one("a", 2)], one("b", 2)

    assert [pieces_of([stage]) for stage in plan([*a, b], 8)] == [[Piece(b, 0, 1)], [], [Piece(a[2], 0, 1)]]


def test_the_rest_of_a_pass_is_filled_by_the_next_request() -> None:
    """A small request and the first piece of a large one go through the model together."""
    small, large = one("a", 3), one("b", 5, 8, 8)

    assert plan([large, small], 8)[0].passes == (
        Pass((Piece(small, 0, 1), Piece(large, 0, 1, last=False))),
        Pass((Piece(large, 1, 2, last=False),)),
        Pass((Piece(large, 2, 3),)),
    )


def test_nothing_is_planned_for_nothing() -> None:
    """No requests, no stages."""
    assert plan([], 8) == []
