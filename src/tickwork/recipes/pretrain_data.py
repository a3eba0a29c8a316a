"""Data of the tiny base model's pretraining: standard library docstrings, word splits, tokenizer and batches."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tickwork.recipes.tasks import Split, mixture

BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
MAX_POSITIONS = 512
CONTEXT = 256
TEXT_ROWS, TASK_ROWS = 4, 12
_PROMPT_WEIGHT = 0.2
_HELD_OUT_WORD_SHARE = 0.15
_HELD_OUT_DOCSTRING_SHARE = 0.0125
# Enough text to cut rows of CONTEXT tokens from, even where the corpus is a single package.
_MIN_HELD_OUT_DOCSTRINGS = 8
_MIN_MODULES_PER_WORD = 2
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test"}
# Neighbouring punctuation marks identifiers, paths and quoted values rather than plain words.
_WORD_PATTERN = re.compile(r"(?<![\w.'\"`*\-/\\%<@:])[a-z]{3,10}(?![\w('\"`*=\-/\\@:\[])")


@dataclass(frozen=True)
class Corpus:
    """Everything the model is trained and evaluated on: docstrings and the splits of the word list."""

    train_docstrings: list[str]
    held_out_docstrings: list[str]
    words: dict[Split, list[str]]


@dataclass(frozen=True)
class Rows:
    """A batch of TEXT_ROWS rows of text, then TASK_ROWS rows of tasks.

    Attributes:
        ids: Token ids, int64 [rows, CONTEXT + 1].
        weights: Loss weight of each token as a target, float32 of the same shape.
    """

    ids: Tensor
    weights: Tensor


def _module_docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [docstring for docstring in found if docstring]


def stdlib_root() -> Path:
    """Return the folder of the standard library of the running Python."""
    return Path(sysconfig.get_paths()["stdlib"])


def collect_docstrings(root: Path) -> list[list[str]]:
    """Collect the docstrings of all modules under a folder, except tests and installed packages.

    Args:
        root: Folder of the modules.

    Returns:
        The docstrings of each module, modules sorted by path; each docstring occurs once in all.
    """
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    seen: set[str] = set()
    modules = []
    for path in sorted(path for path in paths if not _SKIPPED_FOLDERS & set(path.parts)):
        fresh = [docstring for docstring in dict.fromkeys(_module_docstrings(root / path)) if docstring not in seen]
        seen.update(fresh)
        modules.append(fresh)
    return modules


def choose_words(modules: list[list[str]]) -> list[str]:
    """List the plain words of 3 to 10 letters that occur in the docstrings of at least two modules.

    Args:
        modules: The docstrings of each module.

    Returns:
        The lower-case words, sorted.
    """
    counts: dict[str, int] = {}
    for docstrings in modules:
        for word in set(_WORD_PATTERN.findall("\n".join(docstrings))):
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, count in counts.items() if count >= _MIN_MODULES_PER_WORD)


def build_corpus(seed: int, root: Path) -> Corpus:
    """Collect the docstrings and split docstrings and words into train and held out.

    Args:
        seed: Seed of both splits.
        root: Folder of the modules whose docstrings are used.

    Returns:
        The corpus.
    """
    rng = Random(seed)
    modules = collect_docstrings(root)
    words = choose_words(modules)
    rng.shuffle(words)
    held_out = round(len(words) * _HELD_OUT_WORD_SHARE)
    docstrings = [docstring for module in modules for docstring in module]
    rng.shuffle(docstrings)
    boundary = max(_MIN_HELD_OUT_DOCSTRINGS, round(len(docstrings) * _HELD_OUT_DOCSTRING_SHARE))
    splits: dict[Split, list[str]] = {"train": sorted(words[held_out:]), "held_out": sorted(words[:held_out])}
    return Corpus(docstrings[boundary:], docstrings[:boundary], splits)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the byte-level tokenizer: ids 0-255 are the raw bytes, 256-258 are BOS, EOS and PAD.

    Returns:
        A tokenizer whose `encode` prepends BOS unless `add_special_tokens=False`.
    """
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, clean_up_tokenization_spaces=False, **special
    )


def _byte_symbols() -> list[str]:
    """List the printable characters that byte-level BPE uses for the bytes 0 to 255, as GPT-2 defined them."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    moved = {byte: 256 + offset for offset, byte in enumerate(unprintable)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


def _task_row(rng: Random, words: list[str]) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) <= CONTEXT:
        prompt, completion = (list(part.encode()) for part in mixture(rng, words))
        ids += [BOS_ID, *prompt, *completion, EOS_ID]
        # A row may start or continue at any BOS, so predicting BOS itself teaches nothing.
        weights += [0.0] + [_PROMPT_WEIGHT] * len(prompt) + [1.0] * (len(completion) + 1)
    return ids[: CONTEXT + 1], weights[: CONTEXT + 1]


def text_stream(docstrings: list[str]) -> list[int]:
    """Encode docstrings into one stream in which each is framed by BOS and EOS.

    Args:
        docstrings: The texts.

    Returns:
        Token ids.
    """
    return [token for text in docstrings for token in (BOS_ID, *text.encode(), EOS_ID)]


def batches(stream: list[int], words: list[str], seed: int) -> Iterator[Rows]:
    """Draw batches of text rows followed by task rows, without end.

    Args:
        stream: Token ids of the text, longer than a row.
        words: Words that the tasks may use.
        seed: Seed of all draws.

    Yields:
        Rows of CONTEXT + 1 tokens.
    """
    rng = Random(seed)
    while True:
        starts = [rng.randrange(len(stream) - CONTEXT) for _ in range(TEXT_ROWS)]
        text = [stream[start : start + CONTEXT + 1] for start in starts]
        tasks = [_task_row(rng, words) for _ in range(TASK_ROWS)]
        weights = [[1.0] * (CONTEXT + 1)] * TEXT_ROWS + [row[1] for row in tasks]
        yield Rows(torch.tensor(text + [row[0] for row in tasks]), torch.tensor(weights))
