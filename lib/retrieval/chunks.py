"""Documents → passages: text under one heading, cut at the ends of paragraphs and sentences to a budget of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from lib.retrieval.documents import Block, Document

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])")
PATH = " > "


@dataclass(frozen=True)
class Passage:
    """What is found and cited."""

    title: str
    headings: tuple[str, ...]
    place: str
    """Of its first block."""
    text: str
    tokens: int
    """Of `searched`, with the encoder's special tokens."""

    @property
    def searched(self) -> str:
        """What is embedded and searched: the text below its title and headings, which it may not name itself."""
        return f"{PATH.join((self.title, *self.headings))}\n{self.text}"


@dataclass(frozen=True)
class Sentence:
    text: str
    tokens: int
    paragraph: int
    """Number of its block in the section."""


class Chunker:
    """Cuts documents for one tokenizer, which must not truncate.

    A passage has at most `budget` tokens, title, headings and special tokens included. Where one section needs
    several passages, each begins with the last sentences of the one before, of at most `overlap` tokens.
    """

    def __init__(self, tokenizer: Tokenizer, budget: int, overlap: int) -> None:
        self._tokenizer = tokenizer
        self._budget = budget
        self._overlap = overlap
        self._special = tokenizer.num_special_tokens_to_add(False)

    def passages(self, document: Document) -> Iterator[Passage]:
        for headings, section in groupby(document.blocks, key=lambda block: block.headings):
            yield from self._section(document.title, headings, list(section))

    def _section(self, title: str, headings: tuple[str, ...], blocks: list[Block]) -> Iterator[Passage]:
        # However long a heading is, half of the budget is the text's.
        title, *headings_ = self._shortened([title, *headings], (self._budget - self._special) // 2)
        used = self._count(PATH.join((title, *headings_))) + self._special
        for group in self._packed(blocks, self._budget - used):
            body = "".join(
                sentence.text
                if i == 0
                else f"{' ' if sentence.paragraph == group[i - 1].paragraph else chr(10)}{sentence.text}"
                for i, sentence in enumerate(group)
            )
            tokens = used + sum(sentence.tokens for sentence in group)
            yield Passage(title, tuple(headings_), blocks[group[0].paragraph].place, body, tokens)

    def _packed(self, blocks: list[Block], room: int) -> Iterator[list[Sentence]]:
        group: list[Sentence] = []
        size = fresh = 0
        for number, block in enumerate(blocks):
            sentences = self._sentences(block.text, number, room)
            whole = sum(sentence.tokens for sentence in sentences)
            # A paragraph that would be cut begins a new passage, unless this one is still rather empty.
            if fresh and whole <= room < size + whole and size >= room // 2:
                yield group
                group, size, fresh = [], 0, 0
            for sentence in sentences:
                if fresh and size + sentence.tokens > room:
                    yield group
                    group = self._tail(group, room - sentence.tokens)
                    size, fresh = sum(kept.tokens for kept in group), 0
                group.append(sentence)
                size, fresh = size + sentence.tokens, fresh + 1
        if fresh:
            yield group

    def _tail(self, group: list[Sentence], room: int) -> list[Sentence]:
        """The last sentences of a passage, that the next one repeats."""
        kept: list[Sentence] = []
        left = min(self._overlap, room)
        for sentence in reversed(group):
            if sentence.tokens > left:
                break
            kept.insert(0, sentence)
            left -= sentence.tokens
        return kept

    def _sentences(self, text: str, paragraph: int, room: int) -> list[Sentence]:
        found = []
        for sentence in SENTENCE_END.split(text):
            pieces = [sentence] if self._count(sentence) <= room else self._cut(sentence, room)
            found += [Sentence(piece, self._count(piece), paragraph) for piece in pieces if piece]
        return found

    def _cut(self, text: str, most: int) -> list[str]:
        """A sentence longer than a passage, in parts of at most `most` tokens."""
        parts: list[str] = []
        while text:
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
            length = min(most, len(offsets))
            # The same characters may come to more tokens when they stand alone.
            while length > 1 and self._count(text[: offsets[length - 1][1]].strip()) > most:
                length -= 1
            end = offsets[length - 1][1] if length < len(offsets) else len(text)
            end = max(end, 1)
            parts.append(text[:end].strip())
            text = text[end:].lstrip()
        return parts

    def _shortened(self, path: list[str], most: int) -> list[str]:
        """Title and headings, without the inner headings that do not fit, and cut where the title alone does not."""
        while len(path) > 1 and self._count(PATH.join(path)) > most:
            path = [path[0], *path[2:]]
        return path if self._count(path[0]) <= most else [self._cut(path[0], most)[0], *path[1:]]

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
