"""What a labelled source will be, told before anything is read or started: files, columns, fingerprint. Imports no ray."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
from pydantic import SecretStr

from lib import heads, storage
from lib.artifacts import labelled
from lib.data import blocks
from lib.data.alike import dedup
from lib.data.labelling import models, rules, studio
from lib.data.plan import forget
from lib.data.reading import shapes, sources
from lib.data.reading.readers import column_names
from lib.data.redact import Rules
from lib.data.redact.columns import redact
from lib.data.splitting import split
from lib.endpoint import key_of
from lib.errors import ConfigError
from lib.heads import Head
from lib.labels import Mapping
from lib.retrieval.embedding import base_checksum
from lib.settings import LabelSettings, Settings
from lib.tasks import load_task
from lib.text import normalise

# Part of every fingerprint. Raise it when the same input would give other rows.
FORMAT = 1
# Who answers where, and how many ask, changes no label.
PLACES: dict[str, Any] = {
    "annotations": True,
    "embedding": {"workers", "cpus_per_worker", "gpus_per_worker"},
    "chat": {"url", "key_variable", "workers", "concurrency", "timeout_s"},
}
ROWS, REPORT = "rows", "report.json"


@dataclass(frozen=True)
class Planned:
    """A labelled source that is to be."""

    settings: Settings
    heads: list[Head]
    gold: dict[int, tuple[str, Mapping]]
    """Head, by its number → its column of a block and its labels in the source, where the source has such a column."""
    reading: blocks.Reading
    redaction: Rules | None
    annotations: tuple[str, ...]
    key: SecretStr
    """Of the chat model's endpoint."""
    fingerprint: str

    @property
    def label(self) -> LabelSettings:
        return self.settings.label

    @property
    def uri(self) -> str:
        return labelled(self.settings.name, self.fingerprint)

    @property
    def texts(self) -> frozenset[str]:
        """Columns that may hold personal data."""
        return frozenset({"text", *self.settings.data.slices})

    @property
    def carried(self) -> dict[str, str]:
        """Column of the labelled source, beside those of labels → column of a block: slices by their names, and what
        `data.split` and `data.near` go by as it is called there."""
        data = self.settings.data
        others = {**split.columns(data), **({"worth": data.near.column} if data.near.column else {})}
        return {name: name for name in data.slices} | {column: name for name, column in others.items()}

    def exists(self) -> bool:
        return storage.published(self.uri)

    def forget(self) -> None:
        """Remove the rows that a database gave, once they are read or nobody will read them."""
        forget(self.reading.files)

    def columns(self, place: int) -> tuple[str, str, str]:
        """A head's columns in the labelled source: label, confidence, and who said so."""
        name = self.heads[place].name
        return (
            (name, f"{name}_confidence", f"{name}_labelled_by")
            if name
            else ("label", "confidence", "labelled_by")
        )

    def read_annotations(self) -> studio.Annotations:
        """Raises DataError."""
        return studio.read(self.annotations, self.heads, partial(row_ids, redaction=self.redaction))


def row_ids(texts: Sequence[str], redaction: Rules | None) -> list[str]:
    """The ids of texts as people have seen them: what a dataset calls such a row."""
    rows = pa.table({"text": pa.array(texts, pa.string())})
    if redaction is not None:
        rows, _ = redact(rows, ["text"], redaction)
    high, _ = dedup.hash_texts(normalise(blocks.flat(rows["text"])))
    found: list[str] = dedup.row_ids(high).to_pylist()
    return found


def plan(settings: Settings) -> Planned:
    """Look at the source and name what will be made, without reading rows or starting Ray.

    Raises ConfigError, DataError, StorageError or ModelError, in one line.
    """
    data = settings.data
    if settings.task != "sentiment":
        raise ConfigError(f"jobs.label labels texts for the task sentiment, not for {settings.task}")
    load_task(settings.task).columns(data)
    rules.check(settings.label.rules)
    files: list[sources.SourceFile] = []
    try:
        for number, entry in enumerate(data.sources.get(None, [])):
            found = sources.find_files([entry.uri], entry.format or "auto", query=entry.query)
            files += [replace(file, source=number) for file in found]
        return _named(settings, files)
    except BaseException:
        forget(files)
        raise


def _named(settings: Settings, files: list[sources.SourceFile]) -> Planned:
    """What will be made of these files."""
    data, label = settings.data, settings.label
    with ThreadPoolExecutor(8) as pool:
        present = [list(names) for names in pool.map(_present, files)]
    entries = data.sources[None]
    wanted = load_task(settings.task).columns(data)
    first = shapes.of_source(entries[0], wanted, frozenset(), data)
    known = {*present[0], *data.templates}
    columns = {
        name: column for name, column in wanted.items() if name == "text" or first.columns[name] in known
    }
    of_data = heads.of_data(data)
    gold = {
        place: (name, Mapping.of(head))
        for place, ((key, head), own) in enumerate(zip(heads.settings_of(data).items(), of_data, strict=True))
        if (name := _source(own)) in columns
    }
    columns |= data.slices | split.columns(data)
    if data.near.column is not None:
        columns["worth"] = data.near.column
    shaped = tuple(shapes.of_source(entry, columns, frozenset(), data) for entry in entries)
    shapes.check_used(data.templates, [column for shape in shaped for column in shape.columns.values()])
    for file, names in zip(files, present, strict=True):
        of_file = {shapes.key_of(name, data): column for name, column in shaped[file.source].columns.items()}
        for key, column in shapes.wanted(of_file, data.templates):
            sources.check_columns(file, {key: column}, names)
    annotations = tuple(studio.files_of(label.annotations)) if label.annotations else ()
    with ThreadPoolExecutor(8) as pool:
        checksums = list(pool.map(lambda file: file.checksum or storage.checksum(file.uri), files))
        checksums += pool.map(storage.checksum, annotations)
    redaction = Rules.of(data.redact) if data.redact else None
    key_of_chat = key_of(label.chat, models.SECTION) if label.chat else SecretStr("")
    identity = {
        "format": FORMAT,
        "sources": [
            [file.format, file.name, checksum, *shapes.identity(entries[file.source])]
            for file, checksum in zip(files, checksums, strict=False)
        ],
        "annotations": checksums[len(files) :],
        "columns": columns,
        "templates": data.templates,
        "limit": data.limit,
        "heads": [[head.name, head.labels, list(gold[i][1].classes.items()) if i in gold else []]
                  for i, head in enumerate(of_data)],
        "redaction": redaction.identity() | {"rules": data.redact.model_dump(mode="json")}
        if redaction and data.redact
        else None,
        "label": label.model_dump(mode="json", exclude=PLACES),
        "encoder": base_checksum(label.embedding.model) if label.embedding else None,
    }  # fmt: skip
    reading = blocks.Reading(
        tuple(files), columns, frozenset(), label.rows_per_shard, data.limit, shapes=shaped
    )
    fingerprint = storage.fingerprint(identity)
    planned = Planned(settings, of_data, gold, reading, redaction, annotations, key_of_chat, fingerprint)
    _check_columns(planned)
    return planned


def _present(file: sources.SourceFile) -> Sequence[str]:
    return file.columns if file.columns is not None else column_names(file)


def _source(head: Head) -> str:
    """A head's column of the source, as the task names it in a block."""
    return f"heads.{head.name}.column" if head.name else "label"


def _check_columns(planned: Planned) -> None:
    """Raises ConfigError where two columns of the labelled source would have one name."""
    taken = {"text"}
    for place in range(len(planned.heads)):
        if both := taken.intersection(planned.columns(place)):
            raise ConfigError(
                f"data.heads: {both.pop()!r} would be the name of two columns; name the head differently"
            )
        taken.update(planned.columns(place))
    for column, name in planned.carried.items():
        if column in taken:
            raise ConfigError(
                f"data.{shapes.key_of(name, planned.settings.data)}: {column!r} is the name of a column of labelled rows; "
                f"choose another"
            )
        taken.add(column)
