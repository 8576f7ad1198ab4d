"""From the columns of a file to those of a block: named as the task knows them, made of others by a template, with the labels
of one source said in the words of all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib.errors import ConfigError, nearest
from lib.labels import MISSING, Mapping
from lib.settings import DataSettings, SourceSettings

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


@dataclass(frozen=True)
class Shape:
    """What to read of a file."""

    columns: dict[str, str]
    """Name here → column of the file, or one that a template makes."""
    templates: dict[str, str] = field(default_factory=dict)
    """Column → what it is made of."""
    lists: frozenset[str] = frozenset()
    """Those of `columns` that may hold lists or objects."""
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name here → value in the file → the same in the words of `data.labels`; values that are not there are unknown."""

    @property
    def read(self) -> list[str]:
        """Columns of the file."""
        made = (
            columns_of(self.templates[name]) if name in self.templates else [name]
            for name in self.columns.values()
        )
        return list(dict.fromkeys(column for columns in made for column in columns))

    @property
    def read_lists(self) -> frozenset[str]:
        """Those of `read` that may hold lists or objects."""
        return frozenset(self.columns[name] for name in self.lists) - self.templates.keys()

    def apply(self, table: pa.Table) -> pa.Table:
        """Columns of the file, all strings → those of a block."""
        columns = {
            name: filled(self.templates[column], table) if column in self.templates else table[column]
            for name, column in self.columns.items()
        }
        for name, words in self.labels.items():
            columns[name] = _said(columns[name], words)
        return pa.table(columns)


def of_source(
    entry: SourceSettings, columns: dict[str, str], lists: frozenset[str], data: DataSettings
) -> Shape:
    """The shape of one source, where all have `columns` but for what is its own.

    Raises ConfigError where it has labels of its own and rows have no single one.
    """
    heads = {name: f"heads.{name}.column" for name in data.heads}
    own = {heads.get(name, name): column for name, column in entry.columns.items()}
    columns = {name: own.get(name, column) for name, column in columns.items()}
    if entry.labels is None:
        return Shape(columns, data.templates, lists)
    if "label" not in columns:
        raise ConfigError(
            f"the labels of {entry.uri}: only rows of one label can have others in a source; leave them out"
        )
    words: dict[str, str] = {}
    for value, label in data.label_map.items():
        words.setdefault(label, value)
    said = {value: words[label] for value, label in entry.labels.items()}
    return Shape(columns, data.templates, lists, {"label": said})


def identity(entry: SourceSettings) -> list[Any]:
    """What a source has of its own that makes other rows; nothing, where it has nothing."""
    own = entry.model_dump(include={"weight", "columns", "labels"}, exclude_defaults=True)
    return [own] if own else []


def pieces(template: str) -> list[tuple[str, bool]]:
    """Texts of a template and, with True, names of columns. Raises ConfigError for a brace that stands alone."""
    found: list[tuple[str, bool]] = []
    end = 0
    for match in _PIECE.finditer(template):
        found.append((template[end : match.start()], False))
        end = match.end()
        if match[1]:
            found.append((match[1], True))
        elif len(match[0]) == 2:
            found.append((match[0][0], False))
        else:
            raise ConfigError(
                f"data.templates: a {match[0]} in {template!r} stands alone; write {match[0] * 2} for the sign, and "
                f"{{title}} for the column 'title'"
            )
    return [(text, is_column) for text, is_column in [*found, (template[end:], False)] if text]


def columns_of(template: str) -> list[str]:
    """The columns that it is made of. Raises ConfigError for none."""
    names = [text for text, is_column in pieces(template) if is_column]
    if not names:
        raise ConfigError(
            f"data.templates: {template!r} names no column; write {{title}} for the column 'title'"
        )
    return list(dict.fromkeys(names))


def filled(template: str, table: pa.Table) -> pa.ChunkedArray:
    """A template with the values of each row, empty where one is missing; null where all are."""
    parts = pieces(template)
    values = [table[text] if is_column else pa.scalar(text) for text, is_column in parts]
    texts = pc.binary_join_element_wise(*values, "", null_handling="replace", null_replacement="")
    said = [
        pc.not_equal(pc.utf8_trim_whitespace(pc.fill_null(table[name], "")), "")
        for name in columns_of(template)
    ]
    some = said[0]
    for more in said[1:]:
        some = pc.or_(some, more)
    return pc.if_else(some, texts, pa.scalar(None, pa.string()))


def _said(values: pa.ChunkedArray, words: dict[str, str]) -> pa.ChunkedArray:
    """Labels in the words of all sources; what the source's own mapping does not have is told as unknown."""
    mapping = Mapping({value: number for number, value in enumerate(words)})
    encoded = values.combine_chunks().dictionary_encode()
    meant: list[str | None] = []
    for value in encoded.dictionary.to_pylist():
        number = mapping.index(value)
        if number >= 0:
            meant.append(list(words.values())[number])
        else:
            meant.append(value if number == MISSING else f"{value} (not among the labels of its source)")
    return pa.chunked_array([pa.array(meant, pa.string()).take(encoded.indices)])


def key_of(name: str, data: DataSettings) -> str:
    """The key, below `data`, that names the column of a source which is called `name` in a block."""
    if name == "worth":
        return "near.column"
    if name in data.slices:
        return f"slices.{name}"
    # A task may name a column by the whole of its key, such as `heads.topic.column`.
    return name if "." in name else f"columns.{name}"


def wanted(keys: dict[str, str], templates: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Key of the configuration and column of the file, for all that is read of it: in the place of a column that is made,
    those that it is made of."""
    for key, column in keys.items():
        if column in templates:
            yield from ((f"templates.{column}", name) for name in columns_of(templates[column]))
        else:
            yield key, column


def check_used(templates: Collection[str], columns: Collection[str]) -> None:
    """Raises ConfigError for a template that makes a column which nothing reads."""
    for name in templates:
        if name not in columns:
            raise ConfigError(
                f"data.templates.{name}: no column {name!r} is read{nearest(name, columns)} (read: {', '.join(columns)})"
            )
