"""Texts mended, and rows left out whose texts are not worth learning from, as `data.clean` says.

Mending is done to every text of a row, a message of a dialogue each by itself, in this order: unicode, html, controls,
whitespace. Then a row has to pass, in this order: length and languages, which look at all that it says;
repetition, at each of its texts; symbols, at all that it says. The first that it does not pass is why it is left out.
Nothing here knows Ray.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lib.data.alike.near import UNSPACED
from lib.errors import ConfigError, nearest
from lib.retrieval.markup import BLOCKS, SKIPPED
from lib.settings import CleanSettings, DataSettings, LengthSettings, RepetitionSettings
from lib.tasks import Task
from lib.text import without_controls

# Keys of a turn under which a text stands.
SAID = ("content", "value")
MENDING = ("unicode", "html", "controls", "whitespace")
EMPTIED = "emptied"
FILTERS = ("length", "languages", "repetition", "symbols")
REJECTING = (EMPTIED, *FILTERS)
# Of a row that is left out, so much is shown.
SHOWN_CHARACTERS = 120
# A language is told by the beginning of a text, and by no fewer letters than this; a character of an unspaced script
# counts as three.
TOLD_CHARACTERS, LEAST_LETTERS = 2000, 20
# Of one text, so much is searched for repetitions.
SEARCHED_CHARACTERS = 1 << 18
# Written languages that the detector tells apart and most people name as one (ISO 639-3: macrolanguage zho).
FAMILIES = {"yue": "zh", "wuu": "zh"}

_UNSPACED = "".join(f"{chr(start)}-{chr(end - 1)}" for start, end in UNSPACED)
# A run of letters and digits; where there are no spaces between words, each character.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_ENTITY = re.compile(r"&#?\w{1,24};")
_LINES = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_BLANKS = re.compile(r"[\t \xa0\u1680\u2000-\u200a\u202f\u205f\u3000]+")
_EMPTY_LINES = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Cleaned:
    """Columns of a source after `clean`."""

    columns: dict[str, pa.Array]
    changed: dict[str, int]
    """Step of mending → rows that it changed."""
    rejected: dict[int, tuple[str, str, str]]
    """Row → the filter that it does not pass, what that has measured, and how its text begins."""

    def without(self, rows: np.ndarray, names: Collection[str]) -> dict[str, pa.Array]:
        """Columns in which `rows` bool [rows] say nothing under `names`."""
        if not rows.any():
            return self.columns
        silent = pa.array(rows)
        return {
            name: _replaced(column, silent) if name in names else column
            for name, column in self.columns.items()
        }


def texts(task: Task) -> frozenset[str]:
    """Columns that are cleaned: words that have labels stay as they are."""
    return frozenset() if "tokens" in task.TEXTS else task.TEXTS


def check(data: DataSettings, names: Collection[str], task: str) -> None:
    """Raises ConfigError for a language that is not known, or where a task has no texts to clean."""
    if data.clean.does_nothing:
        return
    if not names:
        raise ConfigError(f"data.clean: the rows of {task} are no texts that could be cleaned; leave it out")
    if data.clean.languages:
        known = {FAMILIES.get(label, label) for label in _detector().labels}
        for language in data.clean.languages:
            if language not in known:
                raise ConfigError(
                    f"data.clean.languages: {language!r} is not known{nearest(language, sorted(known))} "
                    f"(known: {', '.join(sorted(known))})"
                )


def clean(
    columns: dict[str, pa.Array],
    names: Collection[str],
    lists: Collection[str],
    settings: CleanSettings,
    judge: bool = True,
) -> Cleaned:
    """Columns of a source, all strings, with the texts of `names` mended; `lists` may hold turns, as JSON.

    Without `judge` nothing is rejected: which rows were is known from an earlier pass.
    """
    if settings.does_nothing:
        return Cleaned(columns, {}, {})
    here = [name for name in columns if name in names]
    steps = [(name, _MENDERS[name]) for name in MENDING if getattr(settings, name)]
    filters = _filters(settings) if judge else []
    changed: Counter[str] = Counter()
    rejected: dict[int, tuple[str, str, str]] = {}
    mended: dict[str, list[str | None]] = {name: [] for name in here}
    for row, values in enumerate(zip(*(columns[name].to_pylist() for name in here), strict=True)):
        texts: list[str] = []
        mender = _Mender(steps, texts)
        for name, value in zip(here, values, strict=True):
            mended[name].append(mender.value(value, name in lists) if value else value)
        changed.update(mender.changed)
        if judge and texts and (found := _judged(texts, mender.emptied, filters)):
            whole = " ".join("\n".join(texts).split())
            rejected[row] = (*found, whole[:SHOWN_CHARACTERS])
    arrays = {name: pa.array(values, pa.string()) for name, values in mended.items()}
    return Cleaned({**columns, **arrays}, dict(changed), rejected)


class _Mender:
    """Goes through the texts of one row."""

    def __init__(self, steps: Sequence[tuple[str, Callable[[str], str]]], texts: list[str]) -> None:
        self.steps, self.texts = steps, texts
        self.changed: set[str] = set()
        self.emptied = False

    def value(self, value: str, may_list: bool) -> str:
        """A text, or a list of turns as JSON; what is neither stays as it is."""
        if may_list and value.lstrip()[:1] in ("[", "{"):
            try:
                turns = json.loads(value)
            except ValueError:
                return value
            before = len(self.changed)
            mended = self._turns(turns)
            return (
                value
                if len(self.changed) == before and not self.emptied
                else json.dumps(mended, ensure_ascii=False)
            )
        return self.text(value)

    def _turns(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._turns(one) for one in value]
        if isinstance(value, dict):
            return {
                key: self.text(one) if key in SAID and isinstance(one, str) else one
                for key, one in value.items()
            }
        return value

    def text(self, text: str) -> str:
        mended = text
        for name, step in self.steps:
            after = step(mended)
            if after != mended:
                self.changed.add(name)
                mended = after
        if text.strip() and not mended.strip():
            self.emptied = True
        self.texts.append(mended)
        return mended


def mend_unicode(text: str) -> str:
    """Mojibake and broken surrogates mended, ligatures spelled out, composed (NFC). Quotation marks and full-width
    punctuation, which Chinese is written with, stay."""
    return text if text.isascii() else _ftfy(text)


def mend_html(text: str) -> str:
    """Text without HTML's tags, comments, scripts and styles; blocks begin on a line of their own, and entities are what
    they stand for. A `<` that begins no tag of HTML stays."""
    if not _tag().search(text):
        if "&" in text and _ENTITY.search(text):
            import ftfy

            return ftfy.fixes.unescape_html(text)
        return text
    import lxml.etree
    import lxml.html

    # The parser would take `<EMAIL_1>` or `List<int>` for tags.
    marked = _no_tag().sub("&lt;", text)
    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        page = lxml.html.document_fromstring(marked.encode("utf-8", "replace"), parser=parser)
    except lxml.etree.LxmlError:  # of comments alone
        return ""
    for element in list(page.iter()):
        if element.tag in SKIPPED and element.getparent() is not None:
            element.drop_tree()
        elif element.tag == "br":
            element.tail = "\n" + (element.tail or "")
        elif element.tag in BLOCKS or element.tag in _HEADINGS:
            element.text = "\n" + (element.text or "")
            element.tail = "\n" + (element.tail or "")
    lines = (line.strip() for line in page.text_content().split("\n"))
    return "\n".join(line for line in lines if line)


_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


def mend_whitespace(text: str) -> str:
    """Line ends as \\n, no blanks at the end of a line and one between its words, no more than one empty line, nothing at
    the beginning and the end. A line keeps its indentation, which code and lists live by."""
    lines = []
    for line in _LINES.sub("\n", text).split("\n"):
        inside = line.lstrip("\t \xa0\u3000")
        lines.append(line[: len(line) - len(inside)] + _BLANKS.sub(" ", inside).rstrip() if inside else "")
    return _EMPTY_LINES.sub("\n\n", "\n".join(lines)).strip()


_MENDERS: dict[str, Callable[[str], str]] = {
    "unicode": mend_unicode,
    "html": mend_html,
    "controls": without_controls,
    "whitespace": mend_whitespace,
}


def _ftfy(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text, _mending())


@functools.cache
def _mending() -> Any:
    import ftfy

    return ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        remove_control_chars=False,
        fix_line_breaks=False,
        fix_character_width=False,
        uncurl_quotes=False,
    )


@functools.cache
def _tag() -> re.Pattern[str]:
    return re.compile(rf"<(?:/?(?:{_tags()})(?:[\s/][^<>]*)?>|!--|!doctype)", re.I)


@functools.cache
def _no_tag() -> re.Pattern[str]:
    return re.compile(rf"<(?!/?(?:{_tags()})(?:[\s/][^<>]*)?>|!--|!doctype)", re.I)


@functools.cache
def _tags() -> str:
    from lxml.html import defs

    return "|".join(sorted(defs.tags, key=len, reverse=True))


def words(text: str) -> list[str]:
    """Runs of letters and digits; of a script without spaces, each character."""
    found: list[str] = _WORD.findall(text)
    return found


_Filter = Callable[[list[str]], str | None]


def _judged(
    texts: list[str], emptied: bool, filters: Sequence[tuple[str, _Filter]]
) -> tuple[str, str] | None:
    """The first filter that texts do not pass, and what it measured."""
    if emptied:
        return EMPTIED, "nothing is left of a text"
    for name, judge in filters:
        if why := judge(texts):
            return name, why
    return None


def _filters(settings: CleanSettings) -> list[tuple[str, _Filter]]:
    made: dict[str, _Filter | None] = {
        "length": functools.partial(_length, settings.length) if settings.length else None,
        "languages": functools.partial(_language, frozenset(settings.languages), settings.least_language)
        if settings.languages
        else None,
        "repetition": functools.partial(_repeating, settings.repetition) if settings.repetition else None,
        "symbols": functools.partial(_symbols, settings.symbols) if settings.symbols is not None else None,
    }
    return [(name, judge) for name in FILTERS if (judge := made[name])]


def _length(bounds: LengthSettings, texts: list[str]) -> str | None:
    characters = sum(map(len, texts))
    if not bounds.characters.hold(characters):
        return f"{characters:,} characters"
    if bounds.words is not None:
        count = sum(len(words(text)) for text in texts)
        if not bounds.words.hold(count):
            return f"{count:,} words"
    return None


def _language(wanted: frozenset[str], least: float, texts: list[str]) -> str | None:
    text = " ".join("\n".join(texts)[:TOLD_CHARACTERS].split())
    if sum(3 if _is_unspaced(c) else 1 for c in text if c.isalpha()) < LEAST_LETTERS:
        return None
    detector = _detector()
    label, share = detector.classify(text)
    if FAMILIES.get(label, label) in wanted:
        return None
    probable = sum(p for name, p in detector.rank(text) if FAMILIES.get(name, name) in wanted)
    return None if probable >= least else f"{FAMILIES.get(label, label)} ({share:.2f})"


def _is_unspaced(character: str) -> bool:
    return any(start <= ord(character) < end for start, end in UNSPACED)


@functools.cache
def _detector() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _repeating(most: RepetitionSettings, texts: list[str]) -> str | None:
    return next((why for text in texts if (why := repeating(text[:SEARCHED_CHARACTERS], most))), None)


def repeating(text: str, most: RepetitionSettings) -> str | None:
    """What a text repeats more than `most` allows (Rae et al. 2021, "Scaling Language Models", table A1), or None.

    Shares are of lines, or of the characters of words. As there: of the n-gram that takes most of them, and of all
    n-grams that occur more than once, each character counted once.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 1:
        again = [line for line, times in Counter(lines).items() for _ in range(times - 1)]
        if len(again) / len(lines) > most.lines:
            return f"{len(again) / len(lines):.2f} of the lines are repeated"
        share = sum(map(len, again)) / sum(map(len, lines))
        if share > most.line_characters:
            return f"{share:.2f} of the characters are in repeated lines"
    found = words(text.casefold())
    if len(found) < most.least_words:
        return None
    lengths = np.array([len(word) for word in found])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for size, share in most.top.items():
        if (taken := _taken(found, ends, size, top=True)) > share:
            return f"one run of {size} words takes {taken:.2f} of the characters"
    for size, share in most.duplicate.items():
        if (taken := _taken(found, ends, size, top=False)) > share:
            return f"repeated runs of {size} words take {taken:.2f} of the characters"
    return None


def _taken(found: list[str], ends: np.ndarray, size: int, top: bool) -> float:
    """Share of the characters in the n-gram that takes the most, or in all that occur more than once."""
    grams = list(zip(*(found[place:] for place in range(size)), strict=False))
    counts = Counter(grams)
    repeated = {gram: times for gram, times in counts.items() if times > 1}
    if not repeated:
        return 0.0
    if top:
        return float(max(times * sum(map(len, gram)) for gram, times in repeated.items()) / ends[-1])
    covered = np.zeros(len(found) + 1, int)
    at = np.array([place for place, gram in enumerate(grams) if gram in repeated])
    np.add.at(covered, at, 1)
    np.add.at(covered, at + size, -1)
    return float(np.diff(ends)[np.cumsum(covered)[:-1] > 0].sum() / ends[-1])


def _symbols(most: float, texts: list[str]) -> str | None:
    characters = [c for text in texts for c in text if not c.isspace()]
    if not characters:
        return None
    share = sum(not (c.isalnum() or _is_mark(c)) for c in characters) / len(characters)
    return f"{share:.2f} of the characters are no letters or digits" if share > most else None


def _is_mark(character: str) -> bool:
    """Such as the vowel signs of Devanagari, which belong to a letter."""
    import unicodedata

    return not character.isascii() and unicodedata.category(character)[0] == "M"


def _replaced(column: pa.Array, rows: pa.Array) -> pa.Array:
    import pyarrow.compute as pc

    return pc.if_else(rows, pa.scalar(None, column.type), column)
