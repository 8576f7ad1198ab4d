"""What a labelled source will be, told before anything is read or started: files, columns, fingerprint. Imports no ray."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from pydantic import SecretStr

from lib import heads, storage
from lib.artifacts import labelled
from lib.data import blocks, dedup, sources
from lib.data.labelling import models, rules, studio
from lib.data.readers import column_names
from lib.data.redact import Rules
from lib.data.redact.columns import redact
from lib.endpoint import key_of
from lib.errors import ConfigError
from lib.heads import Head
from lib.labels import Mapping
from lib.retrieval.embedding import base_checksum
from lib.settings import LabelSettings, Settings, SourceSettings
from lib.tasks import load_task
from lib.text import normalise

# Part of every fingerprint. Raise it when the same input would give other rows.
FORMAT = 1
# Before the names of the columns of labels that the source has, where others have names of their own.
GOLD = "gold:"
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
    gold: dict[int, Mapping]
    """Head, by its number → its labels in the source, where the source has such a column."""
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

    def exists(self) -> bool:
        return storage.published(self.uri)

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


def _files(entry: SourceSettings) -> list[sources.SourceFile]:
    if entry.columns or entry.labels:
        raise ConfigError(
            f"data.source {entry.uri}: jobs.label reads all sources by data.columns and data.labels; leave its own out"
        )
    return sources.find_files([entry.uri], entry.format or "auto", query=entry.query)


def plan(settings: Settings) -> Planned:
    """Look at the source and name what will be made, without reading rows or starting Ray.

    Raises ConfigError, DataError, StorageError or ModelError, in one line.
    """
    data, label = settings.data, settings.label
    if settings.task != "sentiment":
        raise ConfigError(f"jobs.label labels texts for the task sentiment, not for {settings.task}")
    load_task(settings.task).columns(data)
    rules.check(label.rules)
    files = [file for entry in data.sources.get(None, []) for file in _files(entry)]
    present = column_names(files[0])
    named = heads.settings_of(data)
    of_data = heads.of_data(data)
    gold = {
        place: (head.column, Mapping.of(head))
        for place, head in enumerate(named.values())
        if head.column in present
    }
    columns = {
        "text": data.columns.text,
        **{f"{GOLD}{place}": column for place, (column, _) in gold.items()},
        **data.slices,
    }
    keys = {
        **{"columns.text": data.columns.text},
        **{f"slices.{name}": column for name, column in data.slices.items()},
        **{_key(of_data[place]): column for place, (column, _) in gold.items()},
    }
    annotations = tuple(studio.files_of(label.annotations)) if label.annotations else ()
    with ThreadPoolExecutor(8) as pool:
        for file, found in zip(files, pool.map(column_names, files), strict=True):
            sources.check_columns(file, keys, found)
        checksums = list(pool.map(storage.checksum, [*(file.uri for file in files), *annotations]))
    redaction = Rules.of(data.redact) if data.redact else None
    key = key_of(label.chat, models.SECTION) if label.chat else SecretStr("")
    identity = {
        "format": FORMAT,
        "sources": [
            [file.format, file.name, checksum] for file, checksum in zip(files, checksums, strict=False)
        ],
        "annotations": checksums[len(files) :],
        "columns": columns,
        "limit": data.limit,
        "heads": [[head.name, head.labels, sorted(gold[place][1].classes.items())] if place in gold
                  else [head.name, head.labels] for place, head in enumerate(of_data)],
        "redaction": redaction.identity() | {"rules": data.redact.model_dump(mode="json")}
        if redaction and data.redact
        else None,
        "label": label.model_dump(mode="json", exclude=PLACES),
        "encoder": base_checksum(label.embedding.model) if label.embedding else None,
    }  # fmt: skip
    reading = blocks.Reading(tuple(files), columns, frozenset(), label.rows_per_shard, data.limit)
    planned = Planned(
        settings,
        of_data,
        {place: mapping for place, (_, mapping) in gold.items()},
        reading,
        redaction,
        annotations,
        key,
        storage.fingerprint(identity),
    )
    _check_columns(planned)
    return planned


def _key(head: Head) -> str:
    return f"heads.{head.name}.column" if head.name else "columns.label"


def _check_columns(planned: Planned) -> None:
    """Raises ConfigError where two columns of the labelled source would have one name."""
    taken = {"text"}
    for place in range(len(planned.heads)):
        if both := taken.intersection(planned.columns(place)):
            raise ConfigError(
                f"data.heads: {both.pop()!r} would be the name of two columns; name the head differently"
            )
        taken.update(planned.columns(place))
    if both := taken.intersection(planned.settings.data.slices):
        raise ConfigError(
            f"data.slices: {both.pop()!r} is the name of a column of labelled rows; choose another"
        )
