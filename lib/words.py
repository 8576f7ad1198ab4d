"""Words, and the pieces that a tokeniser makes of them: cutting texts, alignment, windows over long sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lib.errors import ConfigError
from lib.text import normalise

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Words as a client's text is cut into them: initials (U.S.), words with inner hyphens and apostrophes, numbers
# with their separators, and every other character by itself.
WORD = re.compile(r"(?:[^\W\d_]\.){2,}|\d+(?:[.,:/]\d+)+|\w+(?:[-'’]\w+)*|[^\w\s]")
# Entries of BERT's vocabularies that stand for nothing: Capitalised, CAPITALS, miXed.
CASES = ("[unused1]", "[unused2]", "[unused3]")
Words = tuple[list[str], list[tuple[int, int]]]
"""Words, and first place and last + 1 of each in what a client sent."""

Pieces = tuple[list[int], list[int | None]]
"""Token ids, and the number of the word that each belongs to."""


def cut_words(text: str | list[str]) -> Words:
    """Normalised words of a text, and where each begins and ends in it (in words, where words were given)."""
    if isinstance(text, list):
        found, places = text, [(i, i + 1) for i in range(len(text))]
    else:
        matches = list(WORD.finditer(text))
        found, places = [m.group() for m in matches], [m.span() for m in matches]
    clean = normalise(pa.array(found, pa.string())).to_pylist()
    return [word or "\ufffd" for word in clean], places


def first_pieces(word_ids: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
    """Places of the words' first pieces, and the words' numbers, both int64."""
    places, words, seen = [], [], -1
    for place, word in enumerate(word_ids):
        if word is not None and word != seen:
            places.append(place)
            words.append(word)
            seen = word
    return np.array(places, np.int64), np.array(words, np.int64)


def case_markers(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that say how a word is capitalised. Raises ConfigError when the vocabulary has none."""
    ids = []
    for name in CASES:
        if (found := tokenizer.token_to_id(name)) is None:
            raise ConfigError(
                f"model.case_markers: the base's vocabulary has no {name}, which only BERT's have; "
                "a tokeniser that keeps capitals needs no markers"
            )
        ids.append(found)
    return ids


def case_of(word: str) -> int | None:
    """Which marker a word gets; None for one without capitals. A single capital is a capitalised word."""
    letters = [c for c in word if c.isalpha()]
    capitals = sum(c.isupper() for c in letters)
    if not capitals:
        return None
    if capitals == len(letters) > 1:
        return 1
    return 0 if letters[0].isupper() and capitals == 1 else 2


def pieces(tokenizer: Tokenizer, sentences: list[list[str]], cased: bool) -> list[Pieces]:
    """The pieces of each sentence, without special tokens.

    `cased` puts a marker behind a word with capitals, for tokenisers that make everything small: what
    "may" means depends on it. (As an input token: Berard et al. 2019, "inline casing".)
    """
    encodings = tokenizer.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False)
    if not cased:
        return [(encoding.ids, encoding.word_ids) for encoding in encodings]
    markers = case_markers(tokenizer)
    found = []
    for words, encoding in zip(sentences, encodings, strict=True):
        ids, numbers, of = encoding.ids, encoding.word_ids, [case_of(word) for word in words]
        marked: Pieces = ([], [])
        for place, number in enumerate(numbers):
            marked[0].append(ids[place])
            marked[1].append(number)
            case = None if number is None else of[number]
            if case is not None and (place + 1 == len(numbers) or numbers[place + 1] != number):
                marked[0].append(markers[case])
                marked[1].append(number)
        found.append(marked)
    return found


@dataclass(frozen=True)
class Reading:
    """Sentences as windows of tokens that the model can read, and where each word is looked up."""

    rows: list[np.ndarray]
    """Token ids of each window, special tokens included."""
    places: list[list[tuple[int, int, int]]]
    """For each window: sentence, word, and the piece that stands for the word."""
    words: list[int]
    """Words of each sentence."""


def tokenize_words(
    tokenizer: Tokenizer, max_length: int, sentences: list[list[str]], cased: bool = False
) -> Reading:
    """Tokenise words; a sentence above `max_length` tokens becomes windows that overlap by a quarter.

    `tokenizer` does not truncate.
    """
    before, after = special(tokenizer)
    room = max_length - len(before) - len(after)
    reading = Reading([], [], [len(words) for words in sentences])
    for sentence, (ids, numbers) in enumerate(pieces(tokenizer, sentences, cased)):
        places, words = first_pieces(numbers)
        ends = np.append(places[1:], len(ids))
        for first, last, counts_from in windows(places, ends, room):
            start = int(places[first])
            end = min(int(ends[last - 1]), start + room)
            reading.rows.append(np.array([*before, *ids[start:end], *after], np.int32))
            reading.places.append(
                [
                    (sentence, int(words[i]), int(places[i]) - start + len(before))
                    for i in range(counts_from, last)
                ]
            )
    return reading


def windows(starts: np.ndarray, ends: np.ndarray, room: int) -> list[tuple[int, int, int]]:
    """Windows over words whose pieces are `starts` to `ends`: first word, last + 1, and the first that counts.

    Each holds at most `room` pieces (a single longer word is cut). A quarter of a window repeats the one
    before, so that a word that counts has context to its left.
    """
    cut: list[tuple[int, int, int]] = []
    first = counts_from = 0
    while counts_from < len(starts):
        if ends[counts_from] - starts[first] > room:  # the context leaves no room for the next word
            first = counts_from
        fitting = int(np.searchsorted(ends, starts[first] + room, side="right"))
        cut.append((first, max(fitting, counts_from + 1), counts_from))
        counts_from = cut[-1][1]
        if counts_from < len(starts):
            first = int(np.searchsorted(starts, starts[counts_from] - room // 4))
    return cut


def special(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Special tokens before and behind a sequence."""
    marked = tokenizer.encode("a")
    bare = [i for i, special in enumerate(marked.special_tokens_mask) if not special]
    if not bare:
        return marked.ids, []
    return marked.ids[: bare[0]], marked.ids[bare[-1] + 1 :]
