"""The texts of a block of rows with placeholders: the same value of a row has the same one in all its columns.

A text stays a text, and a list of messages one of as many. Of a sentence that comes in words, each word that a value
has a part of becomes its placeholder: there are as many words as there are tags.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from lib.data.redact import Entity, Redaction, Rules, may_hold

# Texts that the model is given at a time: enough that batches of like lengths can be formed.
TEXTS_AT_ONCE = 512


def redact(rows: pa.Table, columns: Collection[str], rules: Rules) -> tuple[pa.Table, Counter[str]]:
    """`rows` with `columns` (string, or JSON as text) redacted; kind → values, each once a row, and `rows` that have
    any."""
    names = [name for name in rows.column_names if name in columns]
    counts: Counter[str] = Counter()
    chosen = _worth(rows.select(names), rules)
    if not len(chosen):
        return rows, counts
    parsed = {name: [_parsed(text) for text in rows[name].take(chosen).to_pylist()] for name in names}
    found = _entities([value for values in parsed.values() for value in values], rules)
    changed: dict[str, dict[int, str]] = {name: {} for name in names}
    for place, row in enumerate(chosen.tolist()):
        redaction = Redaction(rules)
        for name in names:
            value = parsed[name][place]
            said = _redacted(value, redaction, found)
            if said != value:
                changed[name][row] = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        counts.update(redaction.counts)
        counts["rows"] += bool(redaction.counts)
    for name, texts in changed.items():
        if texts:
            column = rows[name].to_pylist()
            for row, text in texts.items():
                column[row] = text
            rows = rows.set_column(rows.column_names.index(name), name, pa.array(column, pa.string()))
    return rows, counts


def _worth(rows: pa.Table, rules: Rules) -> np.ndarray:
    """Numbers of the rows that may hold something: all, where a model has to say."""
    if rules.names:
        return np.arange(rows.num_rows)
    worth = np.zeros(rows.num_rows, bool)
    for column in rows.columns:
        worth |= may_hold(column)
    return np.flatnonzero(worth)


def _parsed(text: str | None) -> Any:
    """A list or an object that came as JSON; else the text itself."""
    if text and text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _entities(values: list[Any], rules: Rules) -> dict[str, list[Entity]]:
    """Text → what the model finds in it."""
    if rules.names is None:
        return {}
    from lib.data.redact.names import find

    texts = list(dict.fromkeys(text for value in values for text in _texts(value)))
    found: dict[str, list[Entity]] = {}
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        found |= zip(some, find(some, rules.names), strict=True)
    return found


def _texts(value: Any) -> Iterator[str]:
    """Those that `_redacted` looks at."""
    if isinstance(value, str):
        yield value
    elif _is_sentence(value):
        yield " ".join(value)
    elif isinstance(value, list | dict):
        for inner in value if isinstance(value, list) else value.values():
            yield from _texts(inner)


def _redacted(value: Any, redaction: Redaction, entities: dict[str, list[Entity]]) -> Any:
    if isinstance(value, str):
        return redaction.text(value, entities.get(value, ()))
    if _is_sentence(value):
        return _words(value, redaction, entities.get(" ".join(value), ()))
    if isinstance(value, list):
        return [_redacted(inner, redaction, entities) for inner in value]
    if isinstance(value, dict):
        return {key: _redacted(inner, redaction, entities) for key, inner in value.items()}
    return value


def _is_sentence(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def _words(words: list[str], redaction: Redaction, entities: Collection[Entity]) -> list[str]:
    """As many words. What is found in the sentence may begin or end inside one."""
    ends = np.cumsum([0, *(len(word) + 1 for word in words)]).tolist()
    said = list(words)
    # From behind, so that places before hold.
    for start, end, kind, value in reversed(redaction.spans(" ".join(words), entities)):
        name = redaction.placeholder(kind, value)
        for place, (first, last) in enumerate(pairwise(ends)):
            if start < last - 1 and end > first:
                inside = max(start - first, 0), min(end, last - 1) - first
                said[place] = said[place][: inside[0]] + name + said[place][inside[1] :]
    return said
