"""A text as words and what stands between them, so that words can change and the rest stays as it was written."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass, replace

from lib.data.alike.near import UNSPACED

_UNSPACED = "".join(f"{chr(start)}-{chr(end - 1)}" for start, end in UNSPACED)
# Vowel signs and tones of these scripts, which belong to the letter before them.
_MARKS = "".join(
    chr(c) for start, end in UNSPACED for c in range(start, end) if unicodedata.category(chr(c))[0] == "M"
)
# Placeholders and addresses stay whole; where there are no spaces between words, each character is one.
_UNIT = re.compile(
    rf"(?P<fixed><[A-Z]{{2,8}}_[0-9a-f]{{1,16}}>|\w+://\S+)"
    rf"|[{_UNSPACED}][{_MARKS}]*|[^\W{_UNSPACED}]+(?:['’-][^\W{_UNSPACED}]+)*"
)
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
# Nothing stands between these and the word before them.
_CLOSING = tuple(".,;:!?)]}…’”")


@dataclass(frozen=True)
class Words:
    """Words of a text, or of a sentence that comes in words."""

    words: tuple[str, ...]
    gaps: tuple[str, ...]
    """What stands before each word, and behind the last."""
    free: tuple[bool, ...]
    """Whether a word may be changed."""
    tags: tuple[int, ...] | None = None
    """Class of each word, IOB2: 0 outside, 2k + 1 and 2k + 2 the first and a further word of kind k."""

    @classmethod
    def of_text(cls, text: str, keep: Collection[str]) -> Words:
        """`keep` are words that may not be changed, without case."""
        words, gaps, free, end = [], [], [], 0
        for match in _UNIT.finditer(text):
            words.append(match.group())
            gaps.append(text[end : match.start()])
            free.append(match["fixed"] is None and match.group().casefold() not in keep)
            end = match.end()
        return cls(tuple(words), (*gaps, text[end:]), tuple(free))

    @classmethod
    def of_sentence(cls, words: list[str], tags: list[int], keep: Collection[str]) -> Words:
        gaps = ("", *(" " for _ in words[1:]), "")
        free = []
        for word in words:
            unit = _UNIT.fullmatch(word)
            free.append(unit is not None and unit["fixed"] is None and word.casefold() not in keep)
        return cls(tuple(words), gaps, tuple(free), tuple(tags))

    def __len__(self) -> int:
        return len(self.words)

    @property
    def text(self) -> str:
        parts = [part for pair in zip(self.gaps, self.words, strict=False) for part in pair]
        return "".join([*parts, self.gaps[-1]])

    @property
    def changeable(self) -> list[int]:
        """Places of the words that may be changed."""
        return [place for place, free in enumerate(self.free) if free]

    def together(self, place: int, count: int) -> bool:
        """Whether so many words from a place on are characters of one run, in a script without spaces."""
        places = range(place, place + count)
        return count == 1 or (
            place + count <= len(self)
            and all(self.free[i] and is_unspaced(self.words[i]) for i in places)
            and not any(self.gaps[i] for i in places[1:])
        )

    def with_words(self, changed: dict[int, str]) -> Words:
        """Other words at some places."""
        return replace(self, words=tuple(changed.get(i, word) for i, word in enumerate(self.words)))

    def without(self, places: Collection[int]) -> Words:
        """Words gone, with a blank beside each. What is left of an entity still begins with its first word."""
        words: list[str] = []
        gaps: list[str] = []
        free: list[bool] = []
        tags: list[int] = []
        gap, left = "", 0  # the class that goes on in `left`, whose first word is gone
        for i, word in enumerate(self.words):
            gap = _joined(gap, self.gaps[i])
            tag = self.tags[i] if self.tags else 0
            first = tag - 1 + tag % 2 if tag else 0
            if i in places:
                left = first if tag and (tag == first or left == first) else 0
                continue
            words.append(word)
            gaps.append(gap)
            free.append(self.free[i])
            tags.append(first if tag and left == first else tag)
            gap, left = "", 0
        tail = _joined(gap, self.gaps[-1])
        return Words(tuple(words), (*gaps, tail), tuple(free), tuple(tags) if self.tags is not None else None)

    def inserted(self, place: int, word: str) -> Words:
        """A word before the one at a place, or behind the last."""
        blank = "" if is_unspaced(word[-1]) else " "
        gaps, words, free = list(self.gaps), list(self.words), list(self.free)
        if place == len(words):
            gaps.insert(place, blank)
        else:
            gaps.insert(place + 1, blank)
        words.insert(place, word)
        free.insert(place, True)
        return replace(self, words=tuple(words), gaps=tuple(gaps), free=tuple(free))


def is_unspaced(word: str) -> bool:
    return _IS_UNSPACED.match(word) is not None


def _joined(before: str, behind: str) -> str:
    """What stands where a word stood: one blank of two, and none before a sign that closes."""
    if before.endswith(" ") and behind.startswith(" "):
        return before + behind[1:]
    return before.rstrip(" ") + behind if behind.startswith(_CLOSING) else before + behind
