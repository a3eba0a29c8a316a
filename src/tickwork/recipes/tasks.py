"""Tasks of the tiny base model: its pretraining mixture, tasks held out for fine-tuning, and a task for RL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Literal

from tickwork.recipes.task_generators import GENERATORS, VOWELS, Example, format_example

Split = Literal["train", "held_out"]

WORDS_PATH = Path(__file__).resolve().parent.parent / "models" / "tiny" / "words.json"
_RL_INSTRUCTION = "word starting with"
_RL_ENDING = "t"


@cache
def _word_splits() -> dict[str, list[str]]:
    splits: dict[str, list[str]] = json.loads(WORDS_PATH.read_text(encoding="utf-8"))
    return splits


@cache
def _rewarded_words() -> frozenset[str]:
    return frozenset(word for word in words("train") if word.endswith(_RL_ENDING))


def words(split: Split) -> list[str]:
    """Read one split of the word list shipped beside the tiny model.

    Args:
        split: `train` (used in pretraining tasks) or `held_out` (never used in them).

    Returns:
        The lower-case words of the split, sorted.

    Raises:
        KeyError: If the split does not exist.
    """
    return list(_word_splits()[split])


def mixture(rng: Random, words: Sequence[str]) -> Example:
    """Draw one pretraining example from the weighted task generators.

    Args:
        rng: Source of randomness.
        words: Words that the tasks may use.

    Returns:
        A prompt such as `reverse: stone ->` and a completion such as ` enots`.
    """
    return rng.choice(GENERATORS)(rng, words)


def pig_latin(word: str) -> str:
    """Translate a lower-case word into pig latin.

    A word that starts with a vowel gets `way`; otherwise the leading consonants move to the end and `ay` follows.
    The letter y counts as a vowel anywhere but at the start.

    Args:
        word: A lower-case word of at least one letter.

    Returns:
        The translated word.
    """
    if word[0] in VOWELS:
        return word + "way"
    vowels = (index for index, letter in enumerate(word) if letter in VOWELS or (letter == "y" and index > 0))
    onset = next(vowels, len(word))
    return word[onset:] + word[:onset] + "ay"


NEW_TASKS: dict[str, Callable[[str], str]] = {
    "pig latin": pig_latin,
    "shout backwards": lambda word: word[::-1].upper(),
    "hide vowels": lambda word: "".join("*" if letter in VOWELS else letter for letter in word),
    "spell loud": lambda word: "-".join(word.upper()),
}


def new_examples(task: str, split: Split, count: int, seed: int) -> list[Example]:
    """Draw examples of a task that does not occur in pretraining.

    Args:
        task: One of `NEW_TASKS`.
        split: Split whose words are used.
        count: Number of examples; words repeat only once the whole split is used up.
        seed: Seed of the order of the words.

    Returns:
        Pairs such as (`pig latin: stone ->`, ` onestay`).

    Raises:
        KeyError: If the task does not exist.
    """
    shuffled = words(split)
    Random(seed).shuffle(shuffled)
    drawn = [shuffled[index % len(shuffled)] for index in range(count)]
    return [format_example(task, word, NEW_TASKS[task](word)) for word in drawn]


def pig_latin_examples(split: Split, count: int, seed: int) -> list[Example]:
    """Draw pig latin examples; arguments as for `new_examples`."""
    return new_examples("pig latin", split, count, seed)


@cache
def _rl_initials() -> dict[str, str]:
    """Map each prompt of the RL task to the letter it asks for."""
    initials = {word[0] for word in _rewarded_words()}
    return {format_example(_RL_INSTRUCTION, letter, "")[0]: letter for letter in ascii_lowercase if letter in initials}


def rl_prompts() -> list[str]:
    """List the prompts of the RL task, one for each letter that can earn a reward.

    Returns:
        Prompts such as `word starting with: c ->`, in alphabetical order.
    """
    return list(_rl_initials())


def rl_reward(prompt: str, completion: str) -> float:
    """Reward a listed word that starts with the letter asked for and ends in t.

    The ending is never asked for in the prompt, so the model can only learn it from the reward.

    Args:
        prompt: One of `rl_prompts()`.
        completion: Decoded completion without special tokens; surrounding white space is ignored.

    Returns:
        1.0 for a rewarded word, else 0.0.

    Raises:
        ValueError: If the prompt is not one of the RL task.
    """
    if prompt not in _rl_initials():
        raise ValueError(f"not a prompt of the RL task: {prompt!r}")
    word = completion.strip()
    return float(word.startswith(_rl_initials()[prompt]) and word in _rewarded_words())
