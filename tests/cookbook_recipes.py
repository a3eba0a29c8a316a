"""Recipes of the official cookbook, unmodified, on a small scale; run by ``cookbook.py`` in the cookbook's environment.

``python cookbook_recipes.py RECIPE MODEL FOLDER``, against ``TINKER_BASE_URL``; the last line is its result as JSON.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import sys
from pathlib import Path
from typing import Any

RENDERER = "role_colon"


def common(model: str, batch_size: int) -> Any:
    """How conversations become tokens."""
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, renderer_name=RENDERER, max_length=256, batch_size=batch_size
    )


def supervised(model: str, folder: Path) -> Any:
    """Supervised training from the conversations that come with the cookbook, with evaluation and checkpoints."""
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.data import FromConversationFileBuilder

    file = importlib.resources.files("tinker_cookbook") / "example_data" / "conversations.jsonl"
    dataset = FromConversationFileBuilder(file_path=str(file), test_size=2, common_config=common(model, 4))
    config = train.Config(
        log_path=str(folder),
        model_name=model,
        recipe_name="test",
        renderer_name=RENDERER,
        dataset_builder=dataset,
        learning_rate=5e-3,
        lr_schedule="constant",
        num_epochs=8,
        lora_rank=8,
        save_every=8,
        eval_every=4,
    )
    asyncio.run(train.main(config))
    return logged(folder)


def dpo(model: str, folder: Path) -> Any:
    """Direct preference optimisation from a file of comparisons."""
    from tinker_cookbook.preference import train_dpo
    from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
    from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl

    rows = [comparison(word) for word in ("stone", "river", "cloud", "green", "piano", "table", "horse", "light")]
    file = folder / "comparisons.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    dataset = DPODatasetBuilderFromComparisons(
        comparison_builder=ComparisonBuilderFromJsonl(train_path=str(file)), common_config=common(model, 4)
    )
    config = train_dpo.Config(
        log_path=str(folder / "log"),
        model_name=model,
        recipe_name="test",
        renderer_name=RENDERER,
        dataset_builder=dataset,
        learning_rate=2e-3,
        lr_schedule="constant",
        num_epochs=4,
        lora_rank=8,
        save_every=0,
        eval_every=0,
        infrequent_eval_every=0,
        dpo_beta=0.5,
    )
    train_dpo.main(config)
    return logged(folder / "log")


def comparison(word: str) -> dict[str, Any]:
    """A question with a preferred and another answer."""
    return {
        "comparison": {
            "prompt_conversation": [{"role": "user", "content": f"Say {word}."}],
            "completion_A": [{"role": "assistant", "content": word}],
            "completion_B": [{"role": "assistant", "content": word[::-1]}],
        },
        "label": "A",
    }


def arithmetic(model: str, folder: Path, **more: Any) -> Any:
    """Reinforcement learning of additions."""
    from tinker_cookbook.recipes.math_rl import train

    config = train.CLIConfig(
        model_name=model,
        renderer_name=RENDERER,
        env="arithmetic",
        loss_fn="importance_sampling",
        group_size=4,
        groups_per_batch=4,
        max_tokens=5,
        max_steps=3,
        learning_rate=1e-3,
        lora_rank=8,
        eval_every=0,
        save_every=2,
        log_path=str(folder),
        behavior_if_log_dir_exists="delete",
        **more,
    )
    asyncio.run(train.cli_main(config))
    return logged(folder)


def arithmetic_async(model: str, folder: Path) -> Any:
    """The same, sampling ahead of training."""
    return arithmetic(model, folder, max_steps_off_policy=1)


def download(model: str, folder: Path) -> Any:
    """The weights of a checkpoint, by way of an encrypted export."""
    import tinker
    from tinker_cookbook import weights

    client = tinker.ServiceClient().create_lora_training_client(model, rank=4).result()
    path = client.save_state("for-download").result().path
    weights.download(tinker_path=path, output_dir=str(folder / "adapter"))
    return sorted(file.name for file in (folder / "adapter").iterdir())


def compare(model: str, folder: Path) -> Any:
    """The greatest difference between a sampler's logprobs of its own tokens and the trainer's."""
    import tinker
    from tinker import types

    client = tinker.ServiceClient().create_lora_training_client(model, rank=8, seed=1).result()
    prompt = [5, 6, 7, 8]
    for _ in range(3):
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(prompt[:-1]),
            loss_fn_inputs={"target_tokens": prompt[1:], "weights": [1.0] * 3},
        )
        client.forward_backward([datum], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=64, stop=[], seed=3)
    drawn = sampler.sample(types.ModelInput.from_ints(prompt), 4, params).result()
    worst = 0.0
    for sequence in drawn.sequences:
        whole = [*prompt, *sequence.tokens]
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(whole[:-1]),
            loss_fn_inputs={"target_tokens": whole[1:], "weights": [1.0] * (len(whole) - 1)},
        )
        out = client.forward([datum], "cross_entropy").result()
        trained = out.loss_fn_outputs[0]["logprobs"].data[len(prompt) - 1 :]
        worst = max(worst, *(abs(a - b) for a, b in zip(trained, sequence.logprobs, strict=True)))
    return worst


def logged(folder: Path) -> Any:
    """The metrics that a recipe logged, and its checkpoints."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoints = folder / "checkpoints.jsonl"
    saved = checkpoints.read_text().splitlines() if checkpoints.exists() else []
    return {"metrics": metrics, "checkpoints": [json.loads(line) for line in saved]}


RECIPES = {act.__name__: act for act in (supervised, dpo, arithmetic, arithmetic_async, download, compare)}

if __name__ == "__main__":
    _, recipe, model, folder = sys.argv
    print(json.dumps(RECIPES[recipe](model, Path(folder))))  # noqa: T201
