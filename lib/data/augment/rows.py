"""New rows of those of a block that train: which methods have their turn with a row, and what comes of it.

Everything is drawn by the seed, a row's id, the method and the number of the new row, so that it depends neither on the
order of rows nor on blocks or machines. Nothing here knows Ray.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from lib import dialogues
from lib.data.alike.dedup import hash_texts
from lib.data.augment import methods
from lib.data.augment.thesaurus import Thesaurus
from lib.data.augment.words import Words
from lib.settings import AugmentSettings
from lib.settings.augmentation import WRITTEN
from lib.text import normalise

FROM, BY = "augmented_from", "augmented_by"
COPY = "copy"
# Draws of a method until something new comes of a row.
TRIES = 8

Value = dict[str, Any]
"""Columns of a row that change."""
Slot = tuple[str, int]
"""A method, and which of its new rows of a row it is."""


class Form(Protocol):
    """Where a task's rows have their texts."""

    columns: tuple[str, ...]

    def cut(self, value: Value, keep: Collection[str]) -> list[Words]:
        """Texts of a row that may change, as words."""

    def put(self, value: Value, said: Sequence[Words]) -> Value:
        """The same row with other words."""

    def texts(self, value: Value) -> list[str]:
        """The same texts as they are; none where a row has no texts that a model could write."""

    def write(self, value: Value, said: Sequence[str]) -> Value:
        """The same row with other texts."""

    def key(self, value: Value) -> str:
        """What decides the split of a row, as its task's `prepare` says."""


class Text:
    """A text a row: `sentiment`."""

    columns: tuple[str, ...] = ("text",)

    def cut(self, value: Value, keep: Collection[str]) -> list[Words]:
        return [Words.of_text(value["text"], keep)]

    def put(self, value: Value, said: Sequence[Words]) -> Value:
        return {"text": " ".join(said[0].text.split())}

    def texts(self, value: Value) -> list[str]:
        return [value["text"]]

    def write(self, value: Value, said: Sequence[str]) -> Value:
        return {"text": normalise(pa.array([said[0]], pa.string()))[0].as_py()}

    def key(self, value: Value) -> str:
        return str(value["text"])


class Dialogue:
    """Turns of which the user's change, and the assistant's never: `chat`."""

    columns: tuple[str, ...] = ("messages",)

    def _turns(self, value: Value) -> list[int]:
        return [i for i, turn in enumerate(value["messages"]) if turn["role"] == "user"]

    def cut(self, value: Value, keep: Collection[str]) -> list[Words]:
        return [Words.of_text(value["messages"][i]["content"], keep) for i in self._turns(value)]

    def put(self, value: Value, said: Sequence[Words]) -> Value:
        return self.write(value, [words.text for words in said])

    def texts(self, value: Value) -> list[str]:
        return [value["messages"][i]["content"] for i in self._turns(value)]

    def write(self, value: Value, said: Sequence[str]) -> Value:
        turns = [dict(turn) for turn in value["messages"]]
        for i, text in zip(self._turns(value), said, strict=True):
            turns[i]["content"] = dialogues.clean(text) or turns[i]["content"]
        return {"messages": turns}

    def key(self, value: Value) -> str:
        opening = normalise(pa.array([dialogues.opening(value["messages"])], pa.string()))
        return str(opening[0].as_py()).casefold()


class Sentence:
    """Words with a tag each: `tagging`."""

    columns: tuple[str, ...] = ("tokens", "tags")

    def cut(self, value: Value, keep: Collection[str]) -> list[Words]:
        return [Words.of_sentence(value["tokens"], value["tags"], keep)]

    def put(self, value: Value, said: Sequence[Words]) -> Value:
        return {"tokens": list(said[0].words), "tags": list(said[0].tags or ())}

    def texts(self, value: Value) -> list[str]:
        return []

    def write(self, value: Value, said: Sequence[str]) -> Value:
        return value

    def key(self, value: Value) -> str:
        return " ".join(value["tokens"])


FORMS: tuple[Form, ...] = (Text(), Dialogue(), Sentence())


def form_of(columns: Collection[str]) -> Form:
    return next(form for form in FORMS if set(form.columns) <= set(columns))


@dataclass(frozen=True)
class Augmentation:
    """All that new rows are made by."""

    settings: AugmentSettings
    seed: int
    thesaurus: Thesaurus = field(default_factory=Thesaurus)
    wanted: tuple[float, ...] | None = None
    """Class → new rows that each of its rows is to have, on average; None: each method makes its n_aug of every row."""

    def slots(self, name: str, label: int) -> list[Slot]:
        """Methods that have their turn with the row of this id."""
        turns = [method for method, count in self.settings.methods.items() for _ in range(count)]
        if self.wanted is None:
            return [(method, turns[:i].count(method)) for i, method in enumerate(turns)]
        rng = self.drawn(name, "balance")
        count = int(self.wanted[label]) + (rng.random() < self.wanted[label] % 1)
        turns, first = turns or [COPY], rng.randrange(max(len(turns), 1))
        taken: Counter[str] = Counter()
        slots = []
        for i in range(count):
            method = turns[(first + i) % len(turns)]
            slots.append((method, taken[method]))
            taken[method] += 1
        return slots

    def drawn(self, *said: Any) -> random.Random:
        """Chance of its own for whatever is named."""
        joined = "\0".join(map(str, (self.seed, *said)))
        return random.Random(hashlib.blake2b(joined.encode(), digest_size=16).digest())


@dataclass
class New:
    """Rows that were made of those of a block."""

    rows: pa.Table
    """With `augmented_from` and `augmented_by`."""
    sources: np.ndarray
    """int64 [rows]: which row each was made of."""
    counts: Counter[str] = field(default_factory=Counter)
    """Method → rows; `unchanged`: nothing new came of a row; `known`: the source says it already."""


def augment(
    rows: pa.Table,
    labels: np.ndarray,
    by: Augmentation,
    known: Callable[[np.ndarray], np.ndarray],
    written: Sequence[dict[str, list[str]]] | None = None,
) -> New:
    """New rows of `rows` (`id`, the task's columns, slices), whose classes are `labels` int32 [rows].

    `known` tells of hashes int64 [n] of what decides a split whether a row of the source has them, in whichever split: such
    a row could lie in validation or test, and is none that is new. `written` are the texts of a model for each row, by
    `METHOD:NUMBER`.
    """
    form = form_of(rows.column_names)
    keep = frozenset(word.casefold() for word in by.settings.keep)
    names, values = rows["id"].to_pylist(), rows.select(form.columns).to_pylist()
    made: list[tuple[int, str, Value]] = []
    ids: list[str] = []
    counts: Counter[str] = Counter()
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        seen = {_said(value)}
        for slot in by.slots(name, int(labels[i])):
            method, new = _made(form, name, value, slot, by, keep, seen, written[i] if written else {})
            if new is None:
                counts["unchanged"] += 1
                continue
            seen.add(_said(new))
            made.append((i, method, new))
            ids.append(f"{name}~{slot[0]}{slot[1]}")
    sources = np.array([i for i, _, _ in made], np.int64)
    fresh = _fresh(form, values, made, sources, known)
    counts["known"] = int((~fresh).sum())
    chosen = np.flatnonzero(fresh).tolist()
    counts.update(made[i][1] for i in chosen)
    table = rows.take(pa.array(sources[fresh]))
    columns: dict[str, Sequence[Any]] = {"id": [ids[i] for i in chosen]}
    columns |= {column: [made[i][2][column] for i in chosen] for column in form.columns}
    for column, said in columns.items():
        place = table.column_names.index(column)
        table = table.set_column(place, column, pa.array(said, table.schema.field(column).type))
    table = table.append_column(FROM, rows["id"].take(pa.array(sources[fresh])))
    table = table.append_column(BY, pa.array([made[i][1] for i in chosen], pa.string()))
    return New(table, sources[fresh], counts)


def _made(
    form: Form,
    name: str,
    value: Value,
    slot: Slot,
    by: Augmentation,
    keep: Collection[str],
    seen: Collection[str],
    written: dict[str, list[str]],
) -> tuple[str, Value | None]:
    """A new row by the method whose turn it is; with `balance` by another one where it makes none, or a copy."""
    method, number = slot
    if method == COPY:
        return COPY, value
    if method in WRITTEN and (texts := written.get(f"{method}:{number}")):
        new = form.write(value, texts)
        if _said(new) not in seen:
            return method, new
    edits = [] if method in WRITTEN else [method]
    if by.wanted is not None:
        edits += [other for other in by.settings.methods if other not in (*WRITTEN, method)]
    words = form.cut(value, keep) if edits else []
    for edit in edits:
        for attempt in range(TRIES):
            said = edited(words, edit, by, by.drawn(name, method, number, edit, attempt))
            if said is None:
                break
            new = form.put(value, said)
            if _said(new) not in seen:
                return edit, new
    if by.settings.balance is not None and by.settings.balance.copies:
        return COPY, value
    return method, None


def edited(words: Sequence[Words], method: str, by: Augmentation, rng: random.Random) -> list[Words] | None:
    """Each text with some words changed; None where no text has any that could be."""
    alpha = getattr(by.settings, method).alpha
    said = [methods.BY_NAME[method](one, alpha, rng, by.thesaurus) for one in words]
    if all(new is None for new in said):
        return None
    return [old if new is None else new for old, new in zip(words, said, strict=True)]


def _said(value: Value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _fresh(
    form: Form,
    values: Sequence[Value],
    made: Sequence[tuple[int, str, Value]],
    sources: np.ndarray,
    known: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Bool [made]: which of what was made no other row of the source says."""
    if not made:
        return np.zeros(0, bool)
    own = hash_texts(pa.array([form.key(value) for value in values], pa.string()))[1]
    hashes = hash_texts(pa.array([form.key(new) for _, _, new in made], pa.string()))[1]
    fresh: np.ndarray = (hashes == own[sources]) | ~known(hashes)
    return fresh
