"""Reductions, weights, gradients, checkpoints."""

from __future__ import annotations

import numpy as np

from tickwork.conformance.probe import Verdict, differs, probe, refused, require, same
from tickwork.conformance.target import OTHER, TOKENS, Target


@probe
def losses_are_sums_over_tokens(target: Target) -> str:
    """A loss is the sum of its tokens' losses, not their mean."""
    loss, [logprobs] = target.look(target.client(), [target.datum()])
    same(loss, -logprobs.sum(), "loss:sum against the sum of logprobs")
    return f"loss:sum {loss:.4f} over {len(logprobs)} tokens"


@probe
def losses_are_sums_over_datums(target: Target) -> str:
    """A batch's loss is the sum of its datums' losses."""
    client = target.client()
    one, other = (target.look(client, [target.datum(tokens)])[0] for tokens in (TOKENS, OTHER))
    same(target.look(client, [target.datum(), target.datum(OTHER)])[0], one + other, "a batch against its datums")
    return "a batch's loss is that of its datums, added"


@probe
def gradients_add_up_over_calls(target: Target) -> str:
    """Two calls before a step are one call with both batches."""
    data = [target.datum()], [target.datum(OTHER)]
    same(target.effect((data[0],), (data[1],)), target.effect((data[0] + data[1],)), "two calls against one")
    return "two calls before a step equal one"


@probe
def gradients_do_not_depend_on_batch_size(target: Target) -> str:
    """A datum given twice has twice its gradient."""
    faint = target.datum(weights=[1e-3] * 10)  # small beside eps, so that a step is in proportion to its gradient
    once, twice = (target.effect(([faint] * count,), learning_rate=5e-3) for count in (1, 2))
    same(twice, 2 * once, "a datum twice against twice a datum", tolerance=0.1 * float(np.abs(once).max()))
    return "a datum given twice pulls twice as hard"


@probe
def negative_weights_push_away(target: Target) -> str:
    """Weights may be negative, as custom losses need."""
    away, towards = (target.effect(([target.datum(weights=[w] * 10)],)) for w in (-1.0, 1.0))
    differs(away, np.zeros_like(away), "negative weights have no effect")
    require(float(np.dot(away, towards)) < 0, "negative weights do not push away")
    return "they push away"


@probe
def fractional_weights_scale(target: Target) -> str:
    """Weights are factors."""
    client = target.client()
    whole = target.look(client, [target.datum()])[0]
    same(target.look(client, [target.datum(weights=[0.25] * 10)])[0], 0.25 * whole, "weights of 0.25")
    return "loss is linear in its weights"


@probe
def zero_weights_are_silent(target: Target) -> str:
    """A token of weight 0 has no gradient."""
    effect = target.effect(([target.datum(weights=[0.0] * 10)],))
    same(effect, np.zeros_like(effect), "a batch of weight 0")
    return "no gradient from weight 0"


@probe
def targets_of_several_tokens(target: Target) -> str:
    """Targets [N, K] give logprobs [N, K]."""
    client = target.client()
    [plain] = target.look(client, [target.datum()])[1]
    wide = np.stack([np.array(TOKENS[1:]), np.full(10, 5)], 1)
    weights = np.stack([np.full(10, 0.75), np.full(10, 0.25)], 1).astype(np.float32)
    loss, [found] = target.look(client, [target.datum(target_tokens=wide, weights=weights)])
    require(found.shape == (10, 2), f"logprobs have shape {found.shape}")
    same(found[:, 0], plain, "the first column against plain targets")
    same(loss, -(weights * found).sum(), "loss:sum")
    return "logprobs [N, K], loss over all cells"


@probe
def forward_leaves_no_gradient(target: Target) -> str:
    """``forward`` computes and forgets."""
    client = target.client()
    before = target.scores(client)
    target.look(client, [target.datum()])
    target.step(client, learning_rate=1.0)
    same(target.scores(client), before, "a step after forward alone")
    return "a step after it changes nothing"


@probe
def steps_clear_the_gradient(target: Target) -> str:
    """A second step does not apply the first one's gradient again."""
    data = [target.datum()]
    client = target.client()
    target.learn(client, data)
    target.step(client, beta1=0.0, beta2=0.0)
    after = target.scores(client)
    target.step(client, beta1=0.0, beta2=0.0)
    same(target.scores(client), after, "a second step without a gradient")
    return "without momentum a second step changes nothing"


@probe
def order_is_kept_when_pipelined(target: Target) -> str:
    """Requests submitted ahead run in the order of their calls."""
    ahead, waiting = target.client(), target.client()
    futures = []
    for _ in range(3):
        futures.append(ahead.forward_backward([target.datum()], "cross_entropy"))
        futures.append(ahead.optim_step(target.types.AdamParams(learning_rate=1e-3)))
        target.learn(waiting, [target.datum()])
        target.wait(waiting.optim_step(target.types.AdamParams(learning_rate=1e-3)))
    for future in futures:
        target.wait(future)
    same(target.scores(ahead), target.scores(waiting), "submitted ahead against one by one")
    return "submitted ahead equals one by one"


@probe
def checkpoints_resume(target: Target) -> str:
    """A checkpoint with its optimizer goes on exactly; without, it starts afresh."""
    client, adam = target.client(), {"learning_rate": 1e-3, "eps": 1e-8}
    for _ in range(2):
        target.learn(client, [target.datum()])
        target.step(client, **adam)
    path = target.wait(client.save_state("conformance", ttl_seconds=3600)).path
    resumed = target.wait(target.service.create_training_client_from_state_with_optimizer(path))
    fresh = target.wait(target.service.create_training_client_from_state(path))
    same(target.scores(resumed), target.scores(client), "weights read back")
    for each in (client, resumed, fresh):
        target.learn(each, [target.datum(OTHER)])
        target.step(each, **adam)
    same(target.scores(resumed), target.scores(client), "the next step", tolerance=1e-4)
    differs(target.scores(fresh), target.scores(client), "a fresh optimizer equals the saved one", Verdict.WRONG)
    return "the next step is the one it would have been"


@probe
def a_bad_datum_harms_nobody(target: Target) -> str:
    """A refused batch leaves no trace."""
    client, other = target.client(), target.client()
    target.learn(client, [target.datum()])
    with refused(target, "a target token past the vocabulary"):
        target.learn(client, [target.datum(OTHER), target.datum((1, 2, 10_000_000))])
    target.learn(other, [target.datum()])
    for each in (client, other):
        target.step(each)
    same(target.scores(client), target.scores(other), "a client that had a refused batch")
    return "refused, and the run goes on"


@probe
def lengths_that_do_not_fit_are_refused(target: Target) -> str:
    """Weights and targets must have the input's length."""
    client = target.client()
    for wrong in ({"weights": [1.0] * 3}, {"target_tokens": [1, 2], "weights": [1.0] * 2}):
        with refused(target, f"{next(iter(wrong))} of another length"):
            target.look(client, [target.datum(**wrong)])
    return "refused"
