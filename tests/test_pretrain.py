"""Tests of the tiny model's tasks, of its pretraining script and of the folder that the script writes."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tickwork.recipes import pretrain_tiny, tasks
from tickwork.recipes.pretrain_data import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    batches,
    build_tokenizer,
    choose_words,
    stdlib_root,
    text_stream,
)
from tickwork.recipes.task_generators import PHRASE_TASKS, WORD_TASKS

STEPS = 12
SHIPPED = Path(tasks.__file__).parent.parent / "models" / "tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    out = tmp_path_factory.mktemp("tiny")
    history = pretrain_tiny.pretrain(out, STEPS, seed=0, root=stdlib_root() / "email")
    return out, [losses.task for losses in history]


def test_loss_falls_in_a_short_run(trained: tuple[Path, list[float]]) -> None:
    losses = trained[1]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(pretrain_tiny.VOCAB_SIZE), abs=0.3)
    assert losses[-1] < losses[0] - 1.0


def test_same_seed_gives_same_first_losses(trained: tuple[Path, list[float]]) -> None:
    corpus_words = json.loads((trained[0] / "words.json").read_text())["train"]
    stream = text_stream(["a text that is long enough to cut rows from it. " * 20])
    torch.manual_seed(0)
    first = pretrain_tiny.train(pretrain_tiny.build_model(), batches(stream, corpus_words, 3), 2)
    torch.manual_seed(0)
    second = pretrain_tiny.train(pretrain_tiny.build_model(), batches(stream, corpus_words, 3), 2)
    assert first == second


def test_folder_loads_in_transformers(trained: tuple[Path, list[float]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    model = AutoModelForCausalLM.from_pretrained(trained[0])
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert next(model.parameters()).dtype == torch.bfloat16
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (256, 257, 258)
    assert not torch.equal(model.state_dict()["lm_head.weight"], model.state_dict()["model.embed_tokens.weight"])
    prompt = tokenizer("copy: stone ->", return_tensors="pt")
    logits = model(**prompt).logits
    assert logits.shape == (1, len("copy: stone ->") + 1, pretrain_tiny.VOCAB_SIZE)
    assert torch.isfinite(logits).all()


def test_folder_holds_splits_and_card(trained: tuple[Path, list[float]]) -> None:
    splits = json.loads((trained[0] / "words.json").read_text())
    assert set(splits) == {"train", "held_out"}
    assert not set(splits["train"]) & set(splits["held_out"])
    assert f"--steps {STEPS} --seed 0" in (trained[0] / "MODEL_CARD.md").read_text()


@pytest.fixture(scope="module", params=["built", "shipped"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "built":
        return build_tokenizer()
    shipped = AutoTokenizer.from_pretrained(SHIPPED)
    assert isinstance(shipped, PreTrainedTokenizerFast)
    return shipped


@settings(max_examples=200, deadline=None)
@given(text=st.text().filter(lambda text: "<|" not in text))
def test_ids_are_the_bytes_and_decode_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    expected = list(text.encode())
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) == [BOS_ID, *expected]
    assert tokenizer.decode(expected) == text


def test_special_tokens_have_the_ids_after_the_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
    assert tokenizer.decode([BOS_ID, 97, EOS_ID, PAD_ID], skip_special_tokens=True) == "a"


def test_batches_weight_completions_fully_prompts_little_and_bos_never() -> None:
    rows = next(batches(text_stream(["x" * 400]), ["stone", "house"], seed=0))
    assert rows.ids.shape == rows.weights.shape == (16, 257)
    task_ids, task_weights = rows.ids[4:], rows.weights[4:]
    assert torch.all(rows.weights[:4] == 1)
    assert torch.all(task_weights[task_ids == BOS_ID] == 0)
    assert torch.all(task_weights[task_ids == EOS_ID] == 1)
    assert torch.all(task_ids[:, 0] == BOS_ID)
    first_row = bytes(task_ids[0][(task_ids[0] < BOS_ID)].tolist())
    prompt_length = first_row.index(b"->") + len("->")
    assert torch.allclose(task_weights[0, 1 : prompt_length + 1], torch.tensor(0.2))
    assert task_weights[0, prompt_length + 1] == 1


def test_learning_rate_warms_up_stays_and_decays() -> None:
    factors = [pretrain_tiny.lr_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(0.02)
    assert factors[49] == factors[599] == 1.0
    assert factors[800] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01


def test_chosen_words_occur_in_two_modules_and_are_no_identifiers() -> None:
    modules = [["A stone or self.stone wall, 'quoted'."], ["a stone wall_name call() wall", "quoted quoted"], ["wall"]]
    assert choose_words(modules) == ["stone", "wall"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stone", "onestay"),
        ("apple", "appleway"),
        ("cat", "atcay"),
        ("string", "ingstray"),
        ("rhythm", "ythmrhay"),
        ("yellow", "ellowyay"),
        ("hmm", "hmmay"),
    ],
)
def test_pig_latin(word: str, expected: str) -> None:
    assert tasks.pig_latin(word) == expected


def test_pig_latin_examples_are_seeded_and_keep_to_their_split() -> None:
    count = len(tasks.words("held_out"))
    examples = tasks.pig_latin_examples("held_out", count, seed=1)
    drawn = [prompt.removeprefix("pig latin: ").removesuffix(" ->") for prompt, _ in examples]
    assert sorted(drawn) == tasks.words("held_out")
    assert [completion for _, completion in examples] == [f" {tasks.pig_latin(word)}" for word in drawn]
    assert examples == tasks.pig_latin_examples("held_out", count, seed=1)
    assert examples != tasks.pig_latin_examples("held_out", count, seed=2)
    assert len(tasks.pig_latin_examples("held_out", count + 5, seed=1)) == count + 5


def test_word_splits_are_disjoint_and_large_enough() -> None:
    train, held_out = tasks.words("train"), tasks.words("held_out")
    assert not set(train) & set(held_out)
    assert len(train) > 2000
    assert len(held_out) > 300


def test_mixture_has_no_pig_latin_and_follows_its_rules() -> None:
    rng, words = Random(0), tasks.words("train")
    transforms = {**WORD_TASKS, "lower": str.lower}
    seen = set()
    for prompt, completion in (tasks.mixture(rng, words) for _ in range(5000)):
        instruction, source = prompt.removesuffix(" ->").split(": ", 1)
        seen.add(instruction.split()[0])
        if instruction in transforms:
            assert completion == " " + transforms[instruction](source)
        if instruction in PHRASE_TASKS:
            assert completion == " " + PHRASE_TASKS[instruction](source.split())
        if instruction == "add":
            assert int(completion) == sum(map(int, source.split("+")))
        assert "pig" not in instruction
    assert {"reverse", "add", "sub", "word", "any", "camel", "next", "replace", "join"} <= seen


def test_every_rl_prompt_can_earn_the_reward() -> None:
    prompts = tasks.rl_prompts()
    assert len(prompts) >= 16
    for prompt in prompts:
        assert any(tasks.rl_reward(prompt, f" {word}") for word in tasks.words("train"))


@pytest.mark.parametrize("ending", ["t", "other"])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("initial", ["asked", "wrong"])
def test_reward_is_one_only_for_listed_word_with_initial_and_ending(ending: str, listed: bool, initial: str) -> None:
    endings = [word for word in tasks.words("train") if word.startswith("c") and word.endswith("t") == (ending == "t")]
    word = endings[0] if listed else ("cqxjzt" if ending == "t" else "cqxjz")
    prompt = f"word starting with: {'c' if initial == 'asked' else 'd'} ->"
    rewarded = ending == "t" and listed and initial == "asked"
    assert tasks.rl_reward(prompt, f" {word}") == (1.0 if rewarded else 0.0)


def test_reward_needs_one_whole_word() -> None:
    word = next(word for word in tasks.words("train") if word.startswith("c") and word.endswith("t"))
    prompt = "word starting with: c ->"
    assert tasks.rl_reward(prompt, "") == 0.0
    assert tasks.rl_reward(prompt, f" {word} {word}") == 0.0
    assert tasks.rl_reward(prompt, word[:-1]) == 0.0


def test_reward_refuses_other_prompts() -> None:
    with pytest.raises(ValueError, match="RL task"):
        tasks.rl_reward("reverse: stone ->", " enots")


def test_batches_depend_on_the_seed() -> None:
    stream = text_stream([f"text number {number} " for number in range(100)])
    drawn = [[rows.ids for rows in islice(batches(stream, ["stone", "house"], seed), 2)] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])
