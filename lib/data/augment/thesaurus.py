"""Words of like meaning: from a file, or the nearest in a model's own table of input embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lib import storage
from lib.data.augment.words import is_unspaced
from lib.errors import DataError, ModelError

# Words whose similarities to all others are computed at a time: 1,024 · 30,000 · 4 bytes.
AT_ONCE = 1024
LEAST_LETTERS = 3


@dataclass(frozen=True)
class Thesaurus:
    """Word, in small letters → words that may stand in its place."""

    entries: Mapping[str, list[str]] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest word in a script without spaces, at least 1: these are looked for in a text."""
        return max((len(word) for word in self.entries if is_unspaced(word)), default=1)

    def others(self, word: str) -> list[str]:
        return self.entries.get(word.casefold(), [])


def read(uri: str) -> Thesaurus:
    """JSON {word: [word, …]}, or lines `word: word, word`. Raises DataError, which names the line, and StorageError."""
    with storage.open_file(uri) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"data.augment.thesaurus: {uri} is not valid UTF-8: {error.reason}") from None
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except ValueError as error:
            raise DataError(f"data.augment.thesaurus: {uri} is not valid JSON: {error}") from None
        for word, others in given.items():
            if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
                raise DataError(
                    f"data.augment.thesaurus: {uri} has no list of words for {word!r}; give {{word: [word, …]}}"
                )
        pairs = list(given.items())
    else:
        pairs = [_line(uri, n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    entries: dict[str, list[str]] = {}
    for word, others in pairs:
        key = word.strip().casefold()
        said = entries.setdefault(key, [])
        said += [
            o for o in (other.strip() for other in others) if o and o.casefold() != key and o not in said
        ]
    if not any(entries.values()):
        raise DataError(f"data.augment.thesaurus: {uri} holds no synonyms; give lines `word: word, word`")
    return Thesaurus(entries)


def _line(uri: str, number: int, line: str) -> tuple[str, list[str]]:
    word, colon, others = line.replace("：", ":").partition(":")
    if not colon or not word.strip():
        raise DataError(
            f"data.augment.thesaurus: {uri} line {number} is no `word: word, word`: {line[:60]!r}"
        )
    return word, others.replace("，", ",").replace("、", ",").split(",")


def of_embeddings(base: Path, least: float, count: int) -> Thesaurus:
    """Of each whole word of a base model's vocabulary the `count` nearest, whose cosine is `least` or more.

    Vectors are taken with the mean of all taken off, which they have in common (Mu and Viswanath 2018). Words of a few
    letters and the most common ones of English say nothing that another could stand for. Raises ModelError.
    """
    words, rows = whole_words(base)
    vectors = input_embeddings(base)
    vectors = vectors[np.asarray(rows)] - vectors.mean(0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    entries: dict[str, list[str]] = {}
    for start in range(0, len(words), AT_ONCE):
        alike = vectors[start : start + AT_ONCE] @ vectors.T
        alike[np.arange(len(alike)), np.arange(start, start + len(alike))] = -1
        row, other = np.nonzero(alike >= least)
        order = np.lexsort((other, -alike[row, other], row))
        row, other = row[order], other[order]
        firsts = np.searchsorted(row, np.arange(len(alike) + 1))
        for i, (begin, end) in enumerate(pairwise(firsts.tolist())):
            if begin < end:
                entries[words[start + i]] = [words[j] for j in other[begin : min(end, begin + count)]]
    return Thesaurus(entries)


def whole_words(base: Path) -> tuple[list[str], list[int]]:
    """Words in small letters that are one token each inside a sentence, and these tokens' ids."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    from lib.encoders import UNCUT, load_tokenizer

    tokenizer = load_tokenizer(base, UNCUT)
    size = tokenizer.get_vocab_size()
    said = tokenizer.decode_batch([[i] for i in range(size)])
    # Where a blank is part of a token, what has none is the end of a word.
    spaced = sum(text.startswith(" ") for text in said) > size // 10
    found: dict[str, int] = {}
    for number, text in enumerate(said):
        word = text.strip()
        if (
            len(word) < LEAST_LETTERS
            or not word.isalpha()
            or word != word.lower()
            or word in ENGLISH_STOP_WORDS
        ):
            continue
        if text.startswith(" ") == spaced and word not in found:
            found[word] = number
    encoded = tokenizer.encode_batch(
        [f" {word}" if spaced else word for word in found], add_special_tokens=False
    )
    whole = [len(one.ids) == 1 and one.ids[0] == i for one, i in zip(encoded, found.values(), strict=True)]
    words = [word for word, fine in zip(found, whole, strict=True) if fine]
    return words, [found[word] for word in words]


def input_embeddings(base: Path) -> np.ndarray:
    """float32 [tokens, D], read from the safetensors alone: no model is loaded. Raises ModelError."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model: Any = AutoModel.from_config(AutoConfig.from_pretrained(base))
    table = model.get_input_embeddings().weight
    name = next(name for name, weights in model.named_parameters() if weights is table)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key == name or key.endswith(f".{name}"):
                    vectors: np.ndarray = file.get_tensor(key).float().numpy()
                    return vectors
    raise ModelError(f"{base} has no {name} among its weights; give data.augment.thesaurus")
