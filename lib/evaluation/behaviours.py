"""Behavioural tests: what an answer must and must not depend on (CheckList; Ribeiro et al. 2020).

`invariance` changes texts of the test split in a way that means nothing: the prediction must stay. `directional`
adds a phrase: the score of a label must change within bounds. `minimum` fills templates: the label is known.
Which rows and which changes are drawn depends on the behaviour's name alone.

For tasks on words only `invariance` has a meaning, with changes that keep the words apart: the tags of the
words must stay.
"""

from __future__ import annotations

import itertools
import re
import textwrap
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lib import heads
from lib.artifacts import DatasetRef, TaskFile
from lib.errors import ConfigError, nearest
from lib.evaluation.scoring import answer_rows, read_rows, softmax
from lib.heads import Head
from lib.settings import Behaviour

if TYPE_CHECKING:
    from ray.util import ActorPool

EXAMPLES = 10
EXAMPLE_CHARS = 400
Change = Callable[[list[str], np.random.Generator], list[str] | None]
"""Words → changed words, or None where there is nothing to change."""

CONTRACTIONS = {
    "is not": "isn't",
    "are not": "aren't",
    "was not": "wasn't",
    "were not": "weren't",
    "do not": "don't",
    "does not": "doesn't",
    "did not": "didn't",
    "have not": "haven't",
    "has not": "hasn't",
    "had not": "hadn't",
    "can not": "can't",
    "cannot": "can't",
    "could not": "couldn't",
    "would not": "wouldn't",
    "will not": "won't",
    "should not": "shouldn't",
    "i am": "i'm",
    "i have": "i've",
    "i will": "i'll",
    "it is": "it's",
    "that is": "that's",
    "they are": "they're",
    "we are": "we're",
    "you are": "you're",
}
_EXPANSIONS = {short: long for long, short in CONTRACTIONS.items() if long != "cannot"}
_CONTRACTABLE = re.compile(rf"\b({'|'.join({**CONTRACTIONS, **_EXPANSIONS})})\b", re.IGNORECASE)
_DIGITS = re.compile(r"\d")


@dataclass(frozen=True)
class Cases:
    """What a behaviour asks the model about."""

    behaviour: Behaviour
    asked: pa.Table
    """`text`, or `tokens`."""
    before: pa.Table | None
    """The rows that `asked` was made of; None for templates."""


def prepare(wanted: Sequence[Behaviour], dataset: DatasetRef, info: TaskFile) -> list[Cases]:
    """The cases of each behaviour, from the test split.

    Raises ConfigError for a behaviour that the task, its labels or its heads do not allow.
    """
    shards = dataset.shards("test")
    if not wanted or not shards:  # without rows, scoring says so
        return []
    rows = read_rows(shards)
    column = "tokens" if "tokens" in rows.column_names else "text"
    for behaviour in wanted:
        _check(behaviour, heads.of_model(info), column)
    return [_cases(behaviour, rows.select([column]), column) for behaviour in wanted]


def measure(cases: Sequence[Cases], pool: ActorPool, info: TaskFile) -> list[dict[str, Any]]:
    """Each behaviour as a report shows it (`EvalReport.behaviours`)."""
    tables = [table for one in cases for table in (one.asked, one.before) if table is not None]
    answers = iter(answer_rows(pool, tables))
    found = []
    for one in cases:
        after = next(answers)
        before = next(answers) if one.before is not None else None
        if "tokens" in one.asked.column_names:
            failed, said = _judge_words(one, after, before, info.labels)
        else:
            head = _head(one.behaviour, heads.of_model(info))
            failed, said = _judge(one, head, _scores(after, head), _scores(before, head))
        found.append(_report(one, failed, said))
    return found


def _check(behaviour: Behaviour, own: list[Head], column: str) -> None:
    key = f"evaluation.behaviours: {behaviour.name!r}"
    if column == "tokens":
        if behaviour.kind != "invariance" or behaviour.change == "contractions":
            raise ConfigError(f"{key}: words are tested for invariance alone, and not to contractions")
        return
    if behaviour.head and behaviour.head not in [head.name for head in own]:
        raise ConfigError(
            f"{key}: no head {behaviour.head!r}{nearest(behaviour.head, [head.name for head in own])}"
        )
    labels = _head(behaviour, own).labels
    if behaviour.label is not None and behaviour.label not in labels:
        raise ConfigError(f"{key}: no label {behaviour.label!r}{nearest(behaviour.label, labels)}")


def _head(behaviour: Behaviour, own: list[Head]) -> Head:
    return next((head for head in own if head.name == behaviour.head), own[0])


def _cases(behaviour: Behaviour, rows: pa.Table, column: str) -> Cases:
    random = np.random.default_rng(zlib.crc32(behaviour.name.encode()))
    if behaviour.kind == "minimum":
        texts = filled(behaviour.templates, behaviour.slots)
        if len(texts) > behaviour.rows:
            texts = [texts[i] for i in np.sort(random.choice(len(texts), behaviour.rows, replace=False))]
        return Cases(behaviour, pa.table({column: pa.array(texts, pa.string())}), None)
    change = changes(behaviour)
    asked: list[Any] = []
    kept: list[int] = []
    for place in random.permutation(len(rows)).tolist():
        given = rows[column][place].as_py()
        changed = change(given if column == "tokens" else given.split(" "), random)
        if changed is None:
            continue
        asked.append(changed if column == "tokens" else " ".join(changed))
        kept.append(place)
        if len(asked) == behaviour.rows:
            break
    kind = rows.schema.field(column).type
    return Cases(behaviour, pa.table({column: pa.array(asked, kind)}), rows.take(pa.array(kept, pa.int64())))


def filled(templates: Sequence[str], slots: dict[str, list[str]]) -> list[str]:
    """Every template with every combination of what its slots `{name}` may hold."""
    texts = []
    for template in templates:
        names = list(dict.fromkeys(re.findall(r"{(\w+)}", template)))
        for values in itertools.product(*(slots[name] for name in names)):
            text = template
            for name, value in zip(names, values, strict=True):
                text = text.replace(f"{{{name}}}", value)
            texts.append(text)
    return list(dict.fromkeys(texts))


def changes(behaviour: Behaviour) -> Change:
    """What a behaviour does to the words of a text."""
    if behaviour.kind == "directional" or behaviour.change == "add":
        before, after = behaviour.prepend.split(), behaviour.append.split()
        return lambda words, random: [*before, *words, *after]
    if behaviour.change == "replace":
        return _replacing(behaviour.replace)
    return {
        "typos": _misspelt,
        "lower_case": lambda words, random: _different(words, [word.lower() for word in words]),
        "upper_case": lambda words, random: _different(words, [word.upper() for word in words]),
        "swapped_case": lambda words, random: _different(words, [word.swapcase() for word in words]),
        "contractions": _contracted,
        "numbers": _renumbered,
    }[behaviour.change or "typos"]


def _different(words: list[str], changed: list[str]) -> list[str] | None:
    return changed if changed != words else None


def _misspelt(words: list[str], random: np.random.Generator) -> list[str] | None:
    """Two neighbouring letters of one longer word change places."""
    long = [
        (place, at)
        for place, word in enumerate(words)
        for at in range(1, len(word) - 2)
        if word.isalpha() and word[at] != word[at + 1]
    ]
    if not long:
        return None
    place, at = long[random.integers(len(long))]
    word = words[place]
    return [*words[:place], word[:at] + word[at + 1] + word[at] + word[at + 2 :], *words[place + 1 :]]


def _contracted(words: list[str], random: np.random.Generator) -> list[str] | None:
    """Every contraction written out, and everything contracted that can be."""

    def other(match: re.Match[str]) -> str:
        said = match[0].lower()
        changed = CONTRACTIONS.get(said) or _EXPANSIONS[said]
        return changed[0].upper() + changed[1:] if match[0][0].isupper() else changed

    text = " ".join(words)
    changed = _CONTRACTABLE.sub(other, text)
    return changed.split(" ") if changed != text else None


def _renumbered(words: list[str], random: np.random.Generator) -> list[str] | None:
    """Every digit another one, in numbers that stay as long."""
    other = [_DIGITS.sub(lambda digit: str((int(digit[0]) + random.integers(1, 10)) % 10), w) for w in words]
    return _different(words, other)


def _replacing(lists: list[list[str]]) -> Change:
    """Each of the listed words for another of its list."""
    peers = {word.lower(): [w for w in some if w != word] for some in lists for word in some}
    inside = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)

    def change(words: list[str], random: np.random.Generator) -> list[str] | None:
        changed = []
        for word in words:
            match = inside.match(word)
            others = peers.get(match[2].lower()) if match else None
            changed.append(f"{match[1]}{random.choice(others)}{match[3]}" if match and others else word)
        return _different(words, changed)

    return change


def _scores(logits: Any, head: Head) -> Any:
    return None if logits is None else softmax(logits[:, head.outputs].astype(np.float64) / head.temperature)


def _judge(cases: Cases, head: Head, after: Any, before: Any) -> tuple[list[int], Callable[[int], str]]:
    """Which cases failed, and what was answered to one. `after` and `before` hold probabilities [N, C]."""
    behaviour, labels = cases.behaviour, head.labels
    said = after.argmax(-1)
    if behaviour.kind == "directional":
        label = labels.index(behaviour.label or "")
        rise = after[:, label] - before[:, label]
        low, high = behaviour.change_of_score
        failed = np.flatnonzero((rise < low) | (rise > high)).tolist()
        return failed, lambda i: f"{labels[label]} {before[i, label]:.2f} → {after[i, label]:.2f}"
    if behaviour.kind == "minimum":
        wrong = np.flatnonzero(said != labels.index(behaviour.label or "")).tolist()
        return wrong, lambda i: f"{labels[said[i]]} {after[i, said[i]]:.2f}, not {behaviour.label}"
    first = before.argmax(-1)
    return np.flatnonzero(said != first).tolist(), lambda i: f"{labels[first[i]]} → {labels[said[i]]}"


def _judge_words(
    cases: Cases, after: Any, before: Any, labels: list[str]
) -> tuple[list[int], Callable[[int], str]]:
    """`_judge` for logits [W, C] of all words: the tags of the words that were there before."""
    assert cases.before is not None
    skipped = len(cases.behaviour.prepend.split())
    failed: list[int] = []
    changed: dict[int, str] = {}
    start = end = 0
    for i, (words, asked) in enumerate(
        zip(cases.before["tokens"].to_pylist(), cases.asked["tokens"].to_pylist(), strict=True)
    ):
        was = before[start : start + len(words)].argmax(-1)
        is_now = after[end + skipped : end + skipped + len(words)].argmax(-1)
        other = np.flatnonzero(was != is_now)
        if len(other):
            failed.append(i)
            at = int(other[0])
            changed[i] = f"{asked[skipped + at]}: {labels[was[at]]} → {labels[is_now[at]]}"
        start, end = start + len(words), end + len(asked)
    return failed, changed.__getitem__


def _report(cases: Cases, failed: list[int], said: Callable[[int], str]) -> dict[str, Any]:
    count = cases.asked.num_rows
    return {
        "name": cases.behaviour.name,
        "kind": cases.behaviour.kind,
        "what": cases.behaviour.what,
        "cases": count,
        "failures": len(failed),
        "failure_rate": len(failed) / count if count else 0.0,
        "examples": [
            {
                "text": _shown(cases.asked, i),
                "before": _shown(cases.before, i) if cases.before is not None else "",
                "answer": said(i),
            }
            for i in failed[:EXAMPLES]
        ],
    }


def _shown(rows: pa.Table, place: int) -> str:
    value = rows[0][place].as_py()
    text = value if isinstance(value, str) else " ".join(value)
    return textwrap.shorten(text, EXAMPLE_CHARS, placeholder=" …")
