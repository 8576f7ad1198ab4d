"""A text as a reader sees it: full-width and other scripts' digits, odd dashes, dots and blanks are plain ones,
characters without width and HTML's codes for characters are gone. Places of it lead back to the text itself."""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass

_DOTS = "·•‧∙⋅・｡．﹒"
_BARS = "¦∣❘｜│"
# Without width, wherever they stand: soft hyphens, joiners, marks of direction, selectors of a variant.
_UNSEEN = "[\xad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]"
_HIDDEN = re.compile(rf"{_UNSEEN}+|&(?:amp;){{0,3}}(?:#\d{{1,7}}|#[xX][0-9A-Fa-f]{{1,6}}|[A-Za-z]{{2,8}});")


class _Table(dict[int, str]):
    """For `str.translate`: one character for one, so that places hold."""

    def __missing__(self, point: int) -> str:
        self[point] = found = _plain(chr(point))
        return found


def _plain(character: str) -> str:
    if character in _DOTS:
        return "."
    if character in _BARS:
        return "|"
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    kind = unicodedata.category(character)
    if kind == "Pd" or character in "−⁃":
        return "-"
    if kind == "Zs":
        return " "
    if unicodedata.decomposition(character).startswith(("<super>", "<sub>", "<fraction>")):
        return character
    same = unicodedata.normalize("NFKC", character)
    return same if len(same) == 1 else character


_TABLE = _Table()


@dataclass(frozen=True)
class Plain:
    """`text`, plain; `starts` and `ends` of its characters in the text that it is of, where they are other places."""

    text: str
    starts: list[int] | None = None
    ends: list[int] | None = None

    def place(self, start: int, end: int) -> tuple[int, int]:
        """A span of it as one of the text itself."""
        if self.starts is None or self.ends is None:
            return start, end
        return self.starts[start], self.ends[end - 1]


def plain(text: str) -> Plain:
    seen = text if text.isascii() else text.translate(_TABLE)
    if (seen.isascii() and "&" not in seen) or not _HIDDEN.search(seen):
        return Plain(seen)
    parts: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    place = 0
    for match in _HIDDEN.finditer(seen):
        said = _meant(match.group())
        if said is None:
            continue
        parts += [seen[place : match.start()], said]
        starts += [*range(place, match.start()), *[match.start()] * len(said)]
        ends += [*range(place + 1, match.start() + 1), *[match.end()] * len(said)]
        place = match.end()
    rest = range(place, len(seen))
    return Plain("".join([*parts, seen[place:]]), [*starts, *rest], [*ends, *(i + 1 for i in rest)])


def _meant(hidden: str) -> str | None:
    """What a match of _HIDDEN says; None for what only looks like a code."""
    if not hidden.startswith("&"):
        return ""
    while (said := html.unescape(hidden)) != hidden and len(said) > 1:
        hidden = said
    return said.translate(_TABLE) if len(said) == 1 and said not in "<>&\n" else None
