"""Tests of the planner, for any requests of any lanes that arrive at any time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, islice, pairwise

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from planning import lazily, plan, stages_of
from tickwork.engine.plan import Pass, Piece, Planner, Stage
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
# A script: requests as they arrive, and None where the next stage is taken.
scripts = st.lists(passes | passes | steps | samples | st.none(), max_size=24)
budgets = st.integers(1, 20)
four_shares = st.fixed_dictionaries(dict.fromkeys("zabc", st.sampled_from([1.0, 2.0, 0.5, 3.0])))


def one(lane: str, *rows: int, whole: bool = False) -> Request:
    return Request("pass", lane, None, rows, whole=whole, tokens=sum(rows))


def step(lane: str) -> Request:
    return Request("step", lane, None)


def arrivals(script: Sequence[Request | None]) -> list[Request]:
    return [request for request in script if request is not None]


@attrs.frozen
class Taken:
    """A stage, and what had arrived when it was taken."""

    stage: Stage
    arrived: list[Request]


def play(script: Sequence[Request | None], max_tokens: int, *, merge: bool = True) -> list[Taken]:
    """Run a script, then take what is left."""
    planner, arrived, taken = Planner(merge=merge), [], []
    for request in script:
        if request is None:
            stage = planner.next(max_tokens)
            taken += [] if stage is None else [Taken(stage, list(arrived))]
        else:
            planner.add(request)
            arrived.append(request)
    taken += [Taken(stage, arrived) for stage in stages_of(planner, max_tokens)]
    assert len(planner) == 0
    return taken


def pieces_of(taken: Sequence[Taken]) -> list[Piece]:
    return [piece for each in taken for item in each.stage.passes for piece in item.pieces]


def by_lane(requests: Sequence[Request]) -> dict[str, list[Request]]:
    """Each lane's requests, in order; lanes with none are not there."""
    found: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        found[request.lane].append(request)
    return dict(found)


def places(taken: Sequence[Taken]) -> tuple[dict[Request, int], dict[Request, int]]:
    """The stages in which each request begins and ends."""
    begun: dict[Request, int] = {}
    ended: dict[Request, int] = {}
    for index, each in enumerate(taken):
        for request in [piece.request for piece in pieces_of([each])] + [*each.stage.steps, *each.stage.samples]:
            begun.setdefault(request, index)
            ended[request] = index
    return begun, ended


@given(scripts, budgets)
def test_each_request_is_planned_exactly_once(script: list[Request | None], max_tokens: int) -> None:
    """Steps and samples appear once; a pass's datums are run once each, in order, or probed and applied once each."""
    requests, taken = arrivals(script), play(script, max_tokens)

    others = [request for each in taken for request in (*each.stage.steps, *each.stage.samples)]
    assert sorted(map(id, others)) == sorted(id(request) for request in requests if request.kind != "pass")
    seen: dict[Request, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for piece in pieces_of(taken):
        seen[piece.request][piece.phase] += range(piece.start, piece.stop)
    assert set(seen) == {request for request in requests if request.kind == "pass"}
    for request, phases in seen.items():
        every = list(range(len(request.rows)))
        assert dict(phases) in ({"run": every}, {"probe": every, "apply": every})


@given(scripts, budgets)
def test_a_lane_keeps_its_order(script: list[Request | None], max_tokens: int) -> None:
    """Passes and steps of one lane run in the order in which they arrived, and never two at once."""
    begun, ended = places(play(script, max_tokens))

    for mine in by_lane([request for request in arrivals(script) if request.kind != "sample"]).values():
        for before, after in pairwise(mine):
            # Only a step may run in the stage that ends the pass before it.
            assert ended[before] + (after.kind == "pass" or before.kind == "step") <= begun[after]


@given(scripts, budgets)
def test_a_sample_waits_for_the_steps_before_it_and_for_nothing_else(
    script: list[Request | None], max_tokens: int
) -> None:
    """A sample is admitted by the first stage after the last step before it, or by the first after its arrival."""
    taken = play(script, max_tokens)
    begun, _ = places(taken)

    requests = arrivals(script)
    for at, sample in enumerate(requests):
        if sample.kind == "sample":
            there = next(index for index, each in enumerate(taken) if sample in each.arrived)
            before = [begun[r] + 1 for r in requests[:at] if r.lane == sample.lane and r.kind == "step"]
            assert begun[sample] == max([there, *before])


@given(scripts, budgets)
def test_a_stage_is_one_pass_at_most_and_one_request_of_a_lane(script: list[Request | None], max_tokens: int) -> None:
    """Whether two requests of a client fall into one cycle is chance, so they must not share a pass."""
    for each in play(script, max_tokens):
        assert len(each.stage.passes) <= 1
        assert len({request.lane for request in each.stage.steps}) == len(each.stage.steps)
        for item in each.stage.passes:
            assert len({piece.request.lane for piece in item.pieces}) == len(item.pieces) > 0


@given(scripts, budgets)
def test_no_pass_is_over_budget(script: list[Request | None], max_tokens: int) -> None:
    """A pass holds more than ``max_tokens`` only when it is a single datum."""
    for each in play(script, max_tokens):
        for item in each.stage.passes:
            alone = len(item.pieces) == 1 and item.pieces[0].stop - item.pieces[0].start == 1
            assert item.tokens <= max_tokens or alone
            assert item.tokens == sum(sum(p.request.rows[p.start : p.stop]) for p in item.pieces)


@given(scripts, budgets)
def test_a_custom_loss_is_run_whole_or_sees_all_logprobs_first(script: list[Request | None], max_tokens: int) -> None:
    """A ``whole`` request that fits into a pass is one piece; of a larger one all ``probe`` pieces come first."""
    phases: dict[Request, list[str]] = defaultdict(list)
    for piece in pieces_of(play(script, max_tokens)):
        phases[piece.request].append(piece.phase)
    for request, mine in phases.items():
        fits = request.tokens <= max_tokens or len(request.rows) == 1
        if not request.whole:
            assert set(mine) == {"run"}
        elif fits:
            assert mine == ["run"]
        else:
            assert mine == sorted(mine, reverse=True)
            assert set(mine) == {"probe", "apply"}


@given(scripts, budgets)
def test_the_last_piece_of_a_request_says_so(script: list[Request | None], max_tokens: int) -> None:
    """An executor learns from its pieces when a request is through."""
    marks: dict[Request, list[bool]] = defaultdict(list)
    for piece in pieces_of(play(script, max_tokens)):
        marks[piece.request].append(piece.last)
    for mine in marks.values():
        assert mine == [False] * (len(mine) - 1) + [True]


def nexts(taken: Sequence[Taken], max_tokens: int) -> Iterator[tuple[Pass, dict[str, int]]]:
    """Each pass, and by lane the tokens of the next datum that could have been in it and was not."""
    done: dict[Request, int] = defaultdict(int)  # datums handed out; those of the second phase count on
    through: set[Request] = set()
    for each in taken:
        waiting = {}
        mine = by_lane([request for request in each.arrived if request.kind != "sample"])
        heads = [next((r for r in requests if r not in through), None) for requests in mine.values()]
        for item in each.stage.passes:
            for piece in item.pieces:
                done[piece.request] += piece.stop - piece.start
                through |= {piece.request} if piece.last else set()
            began = {piece.request: piece for piece in item.pieces}
            for head in heads:
                if head is None or head.kind == "step" or head in through or not head.rows:
                    continue
                size = len(head.rows)
                if head in began and done[head] % size == 0:
                    continue  # the next datum belongs to the other phase
                at_once = head.whole and (head.tokens <= max_tokens or size == 1)
                waiting[head.lane] = head.tokens if at_once else head.rows[done[head] % size]
            yield item, waiting
        through |= set(each.stage.steps)


@given(scripts, budgets)
def test_no_room_is_left_that_a_datum_would_have_filled(script: list[Request | None], max_tokens: int) -> None:
    """After each pass the next datum of every lane is larger than what is free in it."""
    for item, waiting in nexts(play(script, max_tokens), max_tokens):
        assert all(tokens > max_tokens - item.tokens for tokens in waiting.values())


def bounds(rows: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Cut a request so that each part holds as much as goes into a pass."""
    found: list[tuple[int, int]] = []
    start = filled = 0
    for index, tokens in enumerate(rows):
        if index > start and filled + tokens > max_tokens:
            found.append((start, index))
            start, filled = index, 0
        filled += tokens
    return [*found, (start, len(rows))]


def cuts_alone(request: Request, max_tokens: int) -> list[tuple[int, int]]:
    """How a request is cut that has the device to itself; a custom loss has its parts twice, unless there is one."""
    found = bounds(request.rows, max_tokens)
    return found * 2 if request.whole and len(found) > 1 else found


def cuts(taken: Sequence[Taken]) -> dict[Request, list[tuple[int, int]]]:
    found: dict[Request, list[tuple[int, int]]] = defaultdict(list)
    for piece in pieces_of(taken):
        found[piece.request].append((piece.start, piece.stop))
    return found


@given(scripts, budgets)
def test_a_client_alone_gets_the_same_passes_under_any_timing(script: list[Request | None], max_tokens: int) -> None:
    """With one lane each request is cut into as few parts as it needs, whatever arrives when."""
    mine = [request for request in script if request is None or request.lane == "a"]

    for request, found in cuts(play(mine, max_tokens)).items():
        assert found == cuts_alone(request, max_tokens)


@given(scripts, budgets)
def test_without_merging_others_change_nothing(script: list[Request | None], max_tokens: int) -> None:
    """A pass holds one lane, and each request is cut as if it were alone."""
    taken = play(script, max_tokens, merge=False)

    assert all(len(item.pieces) == 1 for each in taken for item in each.stage.passes)
    for request, found in cuts(taken).items():
        assert found == cuts_alone(request, max_tokens)


# Fairness.


def first_pass(planner: Planner, max_tokens: int) -> Pass:
    """Take stages up to the first with a pass."""
    return next(item for stage in lazily(planner, max_tokens) for item in stage.passes)


def shared(given_shares: dict[str, float]) -> Planner:
    planner = Planner()
    for lane, share in given_shares.items():
        planner.set_share(lane, share)
    return planner


@settings(max_examples=60)
@given(scripts, st.integers(1, 60), four_shares, st.data())
def test_a_small_request_is_in_the_very_next_pass(
    script: list[Request | None], max_tokens: int, given_shares: dict[str, float], data: st.DataObject
) -> None:
    """Whatever a planner holds, a new lane's request of at most its quantum is run whole by the next pass."""
    planner = shared(given_shares)
    for request in script:
        if request is None:
            planner.next(max_tokens)
        else:
            planner.add(request)
    quantum = int(max_tokens * given_shares["z"] / sum(given_shares.values()))
    small = one("z", *data.draw(st.lists(st.integers(0, 4), min_size=1).filter(lambda rows: sum(rows) <= quantum)))
    planner.add(small)

    assert Piece(small, 0, len(small.rows)) in first_pass(planner, max_tokens).pieces


@st.composite
def backlogs(draw: st.DrawFn, longest: int) -> list[Request]:
    """Requests of three lanes, of sizes that keep to a pattern, for about as many passes as are looked at."""
    patterns = st.lists(st.lists(st.integers(1, longest), min_size=1, max_size=5), min_size=1, max_size=3)
    return [one(lane, *rows) for lane in "abc" for rows in draw(patterns) * 40]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), backlogs(12), st.integers(12, 40), four_shares)
def test_whoever_is_beside_it_a_large_request_gets_its_share(
    pattern: list[int], others: list[Request], max_tokens: int, given_shares: dict[str, float]
) -> None:
    """A lane gets its share of what passes hold without the longest datum, whatever sizes the others' requests are."""
    planner = shared(given_shares)
    mine = one("z", *pattern * 100)
    for request in [mine, *others]:
        planner.add(request)
    part, got = given_shares["z"] / sum(given_shares.values()), 0

    for number, stage in enumerate(islice(lazily(planner, max_tokens), 30), 1):
        pieces = stage.passes[0].pieces
        got += sum(piece.tokens for piece in pieces if piece.request is mine)
        if any(piece.request is mine and piece.last for piece in pieces):
            return
        assert got >= part * number * (max_tokens - 12) - (max_tokens + 12)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=4, max_size=4), st.integers(52, 80), four_shares)  # fmt: skip  # noqa: E501
def test_backlogs_are_served_by_their_shares(
    patterns: list[list[int]], max_tokens: int, given_shares: dict[str, float]
) -> None:
    """While all last, what lanes were served differs, over their shares, by a pass and a datum at most."""
    planner, served = shared(given_shares), dict.fromkeys("zabc", 0.0)
    for lane, pattern in zip("zabc", patterns, strict=True):
        planner.add(one(lane, *pattern * 100))

    for stage in lazily(planner, max_tokens):
        pieces = stage.passes[0].pieces
        if any(piece.last for piece in pieces):
            return
        for piece in pieces:
            served[piece.request.lane] += piece.tokens / given_shares[piece.request.lane]
        assert max(served.values()) - min(served.values()) <= (max_tokens + 4) / min(given_shares.values())
    raise AssertionError("no backlog ever ended")


def names(item: Pass) -> list[tuple[str, int]]:
    """By piece its lane and its tokens."""
    return [(piece.request.lane, piece.tokens) for piece in item.pieces]


def test_a_custom_loss_that_needs_the_whole_pass_gets_it() -> None:
    """It waits while a smaller neighbour goes first, and then has an empty pass although others still wait."""
    whole, small = one("a", 5, 5, whole=True), [one("b", 4) for _ in range(4)]

    stages = plan([whole, *small], 10)

    assert [names(item) for stage in stages for item in stage.passes] == [
        [("b", 4)],
        [("a", 10)],
        [("b", 4)],
        [("b", 4)],
        [("b", 4)],
    ]


def test_a_lane_that_is_ahead_lets_others_catch_up() -> None:
    """Many small requests beside datums that fill a pass badly take turns with them: neither gains in the long run."""
    planner = Planner()
    for request in [one("a", *[3] * 100), *(one("b", 5) for _ in range(100))]:
        planner.add(request)
    served = {"a": 0, "b": 0}
    for stage in islice(lazily(planner, 10), 60):
        for piece in stage.passes[0].pieces:
            served[piece.request.lane] += piece.tokens

    assert sum(served.values()) >= 60 * 8
    assert abs(served["a"] - served["b"]) <= 10 + 5


def test_who_comes_back_does_not_claim_what_it_left() -> None:
    """A lane that was away for ten passes shares the next one evenly, instead of having it to itself."""
    planner = Planner()
    planner.add(one("a", 1))
    planner.add(one("b", *[1] * 200))
    for _ in range(10):
        planner.next(10)
    planner.add(one("a", *[1] * 50))

    assert sorted(names(first_pass(planner, 10))) == [("a", 5), ("b", 5)]


def test_steps_do_not_hold_up_rows_for_more_than_one_stage() -> None:
    """A chain of steps runs beside the passes of others, not before them."""
    chain, rows = [step("a") for _ in range(4)], one("b", 8, 8, 8)

    stages = plan([*chain, rows], 8)

    assert [(len(stage.passes), len(stage.steps)) for stage in stages] == [(0, 1), (1, 1), (0, 1), (1, 1), (1, 0)]


def test_lanes_share_passes_and_stages() -> None:
    """Two clients who each ask for forward-backward, step, forward-backward need two passes in all."""
    a, b = ([one(lane, 3, 2), step(lane), one(lane, 4)] for lane in "ab")

    assert plan([*a, *b], 16) == [
        Stage((Pass((Piece(a[0], 0, 2), Piece(b[0], 0, 2))),), (a[1], b[1])),
        Stage((Pass((Piece(a[2], 0, 1), Piece(b[2], 0, 1))),)),
    ]


def test_a_step_that_waits_for_nothing_lets_its_rows_join() -> None:
    """A lane whose step comes first is not left behind by the pass of another."""
    a, b = [step("a"), one("a", 2)], one("b", 2)

    assert plan([*a, b], 8) == [Stage(steps=(a[0],)), Stage((Pass((Piece(a[1], 0, 1), Piece(b, 0, 1))),))]


def test_the_rest_of_a_pass_is_filled_by_a_large_request() -> None:
    """A small request and the first piece of a large one go through the model together."""
    small, large = one("a", 3), one("b", 5, 8, 8)

    assert [stage.passes for stage in plan([large, small], 8)] == [
        (Pass((Piece(small, 0, 1), Piece(large, 0, 1, last=False))),),
        (Pass((Piece(large, 1, 2, last=False),)),),
        (Pass((Piece(large, 2, 3),)),),
    ]


def test_shares_divide_a_pass() -> None:
    """Two large requests get the tokens of each pass in proportion to their lanes' shares."""
    planner = Planner()
    planner.set_share("a", 3)
    for lane in "ab":
        planner.add(one(lane, *[1] * 100))

    assert [sorted(names(first_pass(planner, 8))) for _ in range(3)] == [[("a", 6), ("b", 2)]] * 3


def test_the_budget_may_shrink_between_two_passes() -> None:
    """What has begun goes on in smaller pieces; a custom loss that has not yet begun is split."""
    planner, large, custom = Planner(), one("a", *[2] * 8), one("a", 4, 4, whole=True)
    planner.add(large)
    planner.add(custom)

    sizes = [(8, 8), (4, 4), (4, 4), (4, 4), (4, 4), (4, 4), (4, 4)]
    assert [first_pass(planner, budget).tokens for budget, _ in sizes] == [tokens for _, tokens in sizes]
    assert planner.next(4) is None


def test_a_planner_forgets_lanes_that_are_through() -> None:
    """A thousand lanes that came and went, beside one that stays, are not kept."""
    planner, numbers = Planner(), count()
    planner.add(one("stays", *[1] * 5000))
    for number in range(1000):
        planner.set_share(f"{number}", 2.0)
        planner.add(one(f"{number}", next(numbers) % 3))
        planner.next(8)
        planner.forget(f"{number}")

    assert len(vars(planner)["_lanes"]) <= 8
    assert vars(planner)["_shares"] == {}


def test_nothing_is_planned_for_nothing() -> None:
    """No requests, no stages."""
    assert Planner().next(8) is None


def test_a_small_request_goes_before_one_that_is_too_large_for_its_quantum() -> None:
    """Of two lanes that are equally served, the one whose request fits into its quantum is run whole."""
    planner = shared({"z": 3.0, "a": 1.0})
    planner.add(one("a", 5))
    planner.add(one("z", 6))

    assert names(first_pass(planner, 8)) == [("z", 6)]


def test_small_requests_save_up_no_more_than_a_pass() -> None:
    """A lane that could not use its part for thirty passes makes up for one of them, and a third lane for none."""
    planner = Planner()
    for request in [*(one("a", 1) for _ in range(30)), one("a", *[1] * 100), one("b", *[1] * 400)]:
        planner.add(request)
    for _ in range(30):
        planner.next(10)
    planner.add(one("c", *[1] * 100))
    served = {"a": 0, "b": 0, "c": 0}
    for stage in islice(lazily(planner, 10), 9):
        for piece in stage.passes[0].pieces:
            served[piece.request.lane] += piece.tokens

    assert sum(served.values()) == 90
    assert max(served.values()) - min(served.values()) <= 10 + 1
