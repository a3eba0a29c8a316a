"""Generators of the made string and arithmetic tasks that the tiny base model is pretrained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from string import ascii_lowercase

Example = tuple[str, str]
Generator = Callable[[Random, Sequence[str]], Example]

VOWELS = frozenset("aeiou")
_CONSONANTS = "bcdfghjklmnprstvwz"
_SYLLABLE_VOWELS = "aeiou"
_TRAIN_WORD_SHARE = 0.6
_PSEUDO_WORD_SHARE = 0.2
_ADD_WEIGHT = 6
_REVERSE_WEIGHT = 2


def format_example(instruction: str, source: str, target: str) -> Example:
    """Join a task into the one format used everywhere: `instruction: source ->` and ` target`.

    Args:
        instruction: Name of the task.
        source: Input of the task.
        target: Expected output.

    Returns:
        The prompt and the completion; the completion starts with a space.
    """
    return f"{instruction}: {source} ->", f" {target}"


def _pseudo_word(rng: Random) -> str:
    syllables = [rng.choice(_CONSONANTS) + rng.choice(_SYLLABLE_VOWELS) for _ in range(rng.randint(1, 4))]
    return "".join(syllables) + rng.choice(("", rng.choice(_CONSONANTS)))


def _source_word(rng: Random, words: Sequence[str]) -> str:
    """Draw a real word, a pronounceable pseudo-word or random letters, so that skills do not depend on the list."""
    draw = rng.random()
    if draw < _TRAIN_WORD_SHARE:
        return rng.choice(words)
    if draw < _TRAIN_WORD_SHARE + _PSEUDO_WORD_SHARE:
        return _pseudo_word(rng)
    return "".join(rng.choice(ascii_lowercase) for _ in range(rng.randint(2, 10)))


def _source_phrase(rng: Random, words: Sequence[str]) -> list[str]:
    return [_source_word(rng, words) for _ in range(rng.randint(2, 4))]


def _without_vowels(word: str) -> str:
    return "".join(letter for letter in word if letter not in VOWELS)


def _only_vowels(word: str) -> str:
    return "".join(letter for letter in word if letter in VOWELS)


def _swap_ends(word: str) -> str:
    return word if len(word) == 1 else word[-1] + word[1:-1] + word[0]


WORD_TASKS: dict[str, Callable[[str], str]] = {
    "copy": str,
    "upper": str.upper,
    "capitalize": str.capitalize,
    "reverse": lambda word: word[::-1],
    "spell": " ".join,
    "dashes": "-".join,
    "first letter": lambda word: word[0],
    "last letter": lambda word: word[-1],
    "drop first": lambda word: word[1:],
    "drop last": lambda word: word[:-1],
    "split first": lambda word: f"{word[0]} {word[1:]}",
    "rotate left": lambda word: word[1:] + word[0],
    "rotate right": lambda word: word[-1] + word[:-1],
    "swap ends": _swap_ends,
    "length": lambda word: str(len(word)),
    "remove vowels": _without_vowels,
    "vowels": _only_vowels,
    "first is vowel": lambda word: "yes" if word[0] in VOWELS else "no",
    "double letters": lambda word: "".join(letter * 2 for letter in word),
    "twice": lambda word: word * 2,
    "quote": lambda word: f'"{word}"',
}

PHRASE_TASKS: dict[str, Callable[[list[str]], str]] = {
    "reverse words": lambda phrase: " ".join(phrase[::-1]),
    "first word": lambda phrase: phrase[0],
    "last word": lambda phrase: phrase[-1],
    "initials": lambda phrase: "".join(word[0] for word in phrase),
    "snake case": "_".join,
    "camel case": lambda phrase: phrase[0] + "".join(word.capitalize() for word in phrase[1:]),
}


def _word_generator(instruction: str, transform: Callable[[str], str]) -> Generator:
    def generate(rng: Random, words: Sequence[str]) -> Example:
        word = _source_word(rng, words)
        return format_example(instruction, word, transform(word))

    return generate


def _phrase_generator(instruction: str, transform: Callable[[list[str]], str]) -> Generator:
    def generate(rng: Random, words: Sequence[str]) -> Example:
        phrase = _source_phrase(rng, words)
        return format_example(instruction, " ".join(phrase), transform(phrase))

    return generate


def _lower(rng: Random, words: Sequence[str]) -> Example:
    word = _source_word(rng, words)
    return format_example("lower", word.upper(), word)


def _join(rng: Random, words: Sequence[str]) -> Example:
    word = _source_word(rng, words)
    return format_example("join", rng.choice((" ", "-")).join(word), word)


def _affix(rng: Random) -> str:
    return "".join(rng.choice(ascii_lowercase) for _ in range(rng.randint(1, 3)))


def _add_ending(rng: Random, words: Sequence[str]) -> Example:
    word, affix = _source_word(rng, words), _affix(rng)
    return format_example(f"add ending {affix}", word, word + affix)


def _add_start(rng: Random, words: Sequence[str]) -> Example:
    word, affix = _source_word(rng, words), _affix(rng)
    return format_example(f"add start {affix}", word, affix + word)


def _replace(rng: Random, words: Sequence[str]) -> Example:
    word = _source_word(rng, words)
    old, new = rng.choice(word), rng.choice(ascii_lowercase)
    return format_example(f"replace {old} with {new}", word, word.replace(old, new))


def _next_letter(rng: Random, _words: Sequence[str]) -> Example:
    index = rng.randrange(len(ascii_lowercase) - 1)
    return format_example("next letter", ascii_lowercase[index], ascii_lowercase[index + 1])


def _number_pair(rng: Random) -> tuple[int, int]:
    limit = rng.choice((10, 100))
    return rng.randrange(limit), rng.randrange(limit)


def _add(rng: Random, _words: Sequence[str]) -> Example:
    left, right = _number_pair(rng)
    return format_example("add", f"{left}+{right}", str(left + right))


def _sub(rng: Random, _words: Sequence[str]) -> Example:
    right, left = sorted(_number_pair(rng))
    return format_example("sub", f"{left}-{right}", str(left - right))


def _larger(rng: Random, _words: Sequence[str]) -> Example:
    left, right = _number_pair(rng)
    return format_example("larger", f"{left} {right}", str(max(left, right)))


def _word_starting_with(rng: Random, words: Sequence[str]) -> Example:
    word = rng.choice(words)
    return format_example("word starting with", word[0], word)


def _any_word(rng: Random, words: Sequence[str]) -> Example:
    return format_example("any word", "go", rng.choice(words))


def _weighted_generators() -> list[Generator]:
    word_tasks = {name: _word_generator(name, transform) for name, transform in WORD_TASKS.items()}
    phrase_tasks = [_phrase_generator(name, transform) for name, transform in PHRASE_TASKS.items()]
    made = [_lower, _join, _add_ending, _add_start, _replace, _next_letter, _sub, _larger]
    listed = [_word_starting_with, _any_word]
    extra_reverse = [word_tasks["reverse"]] * (_REVERSE_WEIGHT - 1)
    return [*word_tasks.values(), *extra_reverse, *phrase_tasks, *made, *listed, *[_add] * _ADD_WEIGHT]


GENERATORS: list[Generator] = _weighted_generators()
