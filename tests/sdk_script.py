"""One training-and-sampling script for every package that speaks Tinker; prints all its numbers as JSON.

``python sdk_script.py`` runs it with the installed ``tinker``, against ``TINKER_BASE_URL``.
"""

from __future__ import annotations

import json
from typing import Any

TEXTS = [[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7], [1, 2, 3, 4, 5], [40, 30, 20, 10, 20, 30]]


def settled(value: Any) -> Any:
    """Wait for a future; older packages return some clients at once."""
    return value.result() if hasattr(value, "result") else value


def data(types: Any, **more: Any) -> list[Any]:
    """Make a datum of each text, with inputs that follow from its length."""
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(text[:-1]),
            loss_fn_inputs={"target_tokens": text[1:], **{key: make(len(text) - 1) for key, make in more.items()}},
        )
        for text in TEXTS
    ]


def run(tinker: Any, service: Any, *, custom: bool = False) -> list[float]:
    """Train and sample; return losses, logprobs, norms, tokens."""
    types, numbers = tinker.types, []
    adam = types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0, weight_decay=0.01)
    client = settled(service.create_lora_training_client(base_model="tickwork/tiny", rank=8, seed=11))

    def told(out: Any) -> None:
        numbers.append(out.metrics["loss:sum"])
        numbers.extend(x for item in out.loss_fn_outputs for x in item["logprobs"].data)

    sft = data(types, weights=lambda count: [1.0] * count)
    for _ in range(4):
        passed, stepped = client.forward_backward(sft, "cross_entropy"), client.optim_step(adam)
        told(passed.result())
        numbers.append(stepped.result().metrics["optim/grad_norm"])
    told(client.forward(sft, "cross_entropy").result())
    rl = data(
        types,
        logprobs=lambda count: [-2.0 - 0.1 * i for i in range(count)],
        advantages=lambda count: [(-1.0) ** i for i in range(count)],
    )
    for loss, config in (("importance_sampling", None), ("ppo", {"clip_low_threshold": 0.8}), ("cispo", None)):
        told(client.forward_backward(rl, loss, loss_fn_config=config).result())
        client.optim_step(adam).result()
    if custom:
        square = client.forward_backward_custom(sft, lambda _, lps: (sum((lp**2).sum() for lp in lps), {"mine:sum": 1}))
        told(square.result())
        client.optim_step(adam).result()
    saved = client.save_state("equal", ttl_seconds=3600).result().path
    told(client.forward(sft, "cross_entropy").result())
    again = settled(service.create_training_client_from_state_with_optimizer(saved))
    told(again.forward_backward(sft, "cross_entropy").result())
    again.optim_step(adam).result()
    named = again.save_weights_for_sampler("named").result().path
    prompt = types.ModelInput.from_ints(TEXTS[0])
    for sampler in (again.save_weights_and_get_sampling_client(), service.create_sampling_client(model_path=named)):
        numbers.extend(sampled(types, settled(sampler), prompt))
    return numbers


def sampled(types: Any, sampler: Any, prompt: Any) -> list[float]:
    """Draw greedily and by seed, score the prompt; return tokens and logprobs."""
    numbers = [x for x in sampler.compute_logprobs(prompt).result() if x is not None]
    for params in (types.SamplingParams(max_tokens=8, temperature=0.0), types.SamplingParams(max_tokens=8, seed=5)):
        drawn = sampler.sample(
            prompt=prompt,
            num_samples=2,
            sampling_params=params,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=2,
        ).result()
        for sequence in drawn.sequences:
            numbers.extend([*sequence.tokens, *sequence.logprobs])
        numbers.extend(x for row in drawn.topk_prompt_logprobs if row for pair in row for x in pair)
    return numbers


if __name__ == "__main__":
    import tinker

    print(json.dumps({"version": tinker.__version__, "numbers": run(tinker, tinker.ServiceClient())}))  # noqa: T201
