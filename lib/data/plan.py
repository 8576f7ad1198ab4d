"""What a dataset will be, told before anything is read or started: its files, columns and fingerprint.

Imports no ray, so that a wrong column name, or a dataset that is there already, answers at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lib import storage
from lib.artifacts import DatasetRef, IndexRef
from lib.base_models import tokenizer_checksum
from lib.chat_templates import template_text
from lib.data import augment, blocks, clean, grounding
from lib.data.reading import queries, shapes, sources
from lib.data.reading.readers import column_names
from lib.data.redact import Rules
from lib.data.splitting import split
from lib.errors import ConfigError, DataError
from lib.retrieval.embedding import base_checksum
from lib.retrieval.index import current
from lib.settings import DataSettings, Settings, SourceSettings, TableSettings
from lib.tasks import load_task

# Part of every fingerprint. Raise it when the same input would give other rows or other files.
FORMAT = 1
# What the configuration says of places: their content counts, and it has checksums.
SOURCES: dict[str, Any] = {
    **dict.fromkeys(("source", "validation_source", "test_source"), True),
    "query": True,
    "items": {"source"},
    "users": {"source"},
    "augment": {
        "thesaurus": True,
        "writer": dict.fromkeys(("workers", "cpus_per_worker", "gpus_per_worker"), True),
    },
}
# How many work, and where, changes no row.
WORKERS = {"workers", "cpus_per_worker", "gpus_per_worker"}
# Rows of a table of items or users that one task looks at, at a time.
TABLE_ROWS = 20_000


@dataclass(frozen=True)
class Plan:
    """A dataset that is to be: what it is read from and where it will lie."""

    settings: Settings
    reading: blocks.Reading
    checksums: tuple[str, ...]
    """Of the files, in order."""
    tokenizer: str
    """Checksum of the tokeniser's files."""
    ref: DatasetRef
    parts: dict[str, Plan] = field(default_factory=dict)
    """multitask: the datasets that this one is mixed of (`lib.data.mix`); it has no files of its own then."""
    knowledge: IndexRef | None = None
    """chat: the version of an index whose passages the dialogues get."""
    tables: dict[str, blocks.Reading] = field(default_factory=dict)
    """recommend: `items` and, where they are known, `users`."""
    rules: Rules | None = None
    """By which personal data is taken out; None: it stays."""

    @property
    def texts(self) -> frozenset[str]:
        """Of the columns that are read: those that may hold personal data."""
        known = load_task(self.settings.task).TEXTS | set(self.settings.data.slices)
        return frozenset(known.intersection(self.reading.columns))

    @property
    def all_files(self) -> list[sources.SourceFile]:
        """Of the source and the tables; `checksums` are theirs."""
        return [file for reading in (self.reading, *self.tables.values()) for file in reading.files]

    def forget(self) -> None:
        """Remove the rows that a database gave, once they are read or nobody will read them."""
        for part in self.parts.values():
            part.forget()
        forget(self.all_files)

    def manifest_head(self) -> dict[str, Any]:
        """What the manifest of every dataset begins with."""
        return {
            "format": FORMAT,
            "name": self.ref.name,
            "fingerprint": self.ref.fingerprint,
            "task": self.settings.task,
            "base": self.settings.model.base,
            "tokenizer": self.tokenizer,
            "max_length": self.settings.model.max_length,
            "labels": load_task(self.settings.task).classes(self.settings.data),
        }


def plan(settings: Settings, fresh: bool = True) -> Plan:
    """Look at the source and name the dataset, without reading rows or starting Ray.

    A database is asked anew if `fresh`, for whoever is to read its rows; else what it gave last names the dataset.

    Raises ConfigError, DataError, StorageError, ModelError or RegistryError, in one line, for a source, a base model
    or an index that cannot be used.
    """
    data = settings.data
    if data.parts:
        return _mixed(settings, fresh)
    task = load_task(settings.task)
    task.columns(data)  # a configuration that does not suit the task ends here, before any file is looked at
    split.check(data, task, settings.task)
    augment.check(data, task, settings.task)
    files: list[sources.SourceFile] = []
    try:
        for number, (given, entry) in enumerate(_entries(data)):
            files += _files(number, given, entry, fresh)
        return _named(settings, files)
    except BaseException:
        forget(files)
        raise


def _entries(data: DataSettings) -> list[tuple[str | None, SourceSettings]]:
    """All sources, each with the split that it is given for."""
    return [(given, entry) for given, entries in data.sources.items() for entry in entries]


def _files(number: int, given: str | None, entry: SourceSettings, fresh: bool) -> list[sources.SourceFile]:
    key = f"data.{given}_source" if given else "data.source"
    found = sources.find_files([entry.uri], entry.format or "auto", given, key, entry.query, fresh)
    return [replace(file, source=number) for file in found]


def _named(settings: Settings, files: list[sources.SourceFile]) -> Plan:
    """The dataset of these files."""
    data, task = settings.data, load_task(settings.task)
    clean.check(data, clean.texts(task), settings.task)
    _check(settings)
    bad_rows = data.quarantine.share > 0
    with ThreadPoolExecutor(8) as pool:
        present = list(pool.map(partial(_present, bad_rows=bad_rows), files))
    entries = _entries(data)
    known = [*_known(files, present, entries, data), *data.templates]
    columns = {**task.columns(data, known), **data.slices, **split.columns(data)}
    if data.near.column is not None:
        columns["worth"] = data.near.column
    tables = {
        name: _table(name, table) for name, table in (("items", data.items), ("users", data.users)) if table
    }
    lists = task.LISTS.intersection(columns)
    shaped = tuple(shapes.of_source(entry, columns, lists, data) for _, entry in entries)
    shapes.check_used(data.templates, [column for shape in shaped for column in shape.columns.values()])
    for file, names in zip(files, present, strict=True):
        if not isinstance(names, DataError):
            of_file = {
                shapes.key_of(name, data): column for name, column in shaped[file.source].columns.items()
            }
            for key, column in shapes.wanted(of_file, data.templates):
                sources.check_columns(file, {key: column}, names)
    with ThreadPoolExecutor(8) as pool:
        read = [*files, *(file for reading in tables.values() for file in reading.files)]
        checksums = tuple(pool.map(lambda file: file.checksum or storage.checksum(file.uri), read))
    tokenizer = tokenizer_checksum(settings.model.base)
    knowledge = None
    if data.grounded and settings.serving.knowledge is not None:
        # The tasks that read it may have another storage in their environment.
        knowledge = replace(current(settings.serving.knowledge.index), root=storage.root())
    rules = Rules.of(data.redact) if data.redact else None
    own = [shapes.identity(entry) for _, entry in entries]
    identity = _identity(settings, rules, knowledge) | {
        "tokenizer": tokenizer,
        "sources": [
            [file.format, checksum, file.split, *(own[file.source] if place < len(files) else ())]
            for place, (file, checksum) in enumerate(zip(read, checksums, strict=True))
        ],
    }
    reading = blocks.Reading(
        tuple(files),
        columns,
        lists,
        data.rows_per_shard,
        data.limit,
        bad_rows,
        shaped,
        tuple(entry.weight for _, entry in entries),
    )
    ref = DatasetRef(settings.name, storage.fingerprint(identity))
    return Plan(settings, reading, checksums, tokenizer, ref, knowledge=knowledge, tables=tables, rules=rules)


def _check(settings: Settings) -> None:
    """Raises ConfigError for keys of `data` that do not suit the task."""
    data, task = settings.data, settings.task
    if data.label_noise.report and task != "sentiment":
        raise ConfigError(
            f"data.label_noise: {task} has no one label for a text, as sentiment has; leave it out"
        )
    if data.quarantine.share and task == "recommend":
        raise ConfigError("data.quarantine: recommend needs every row of its source; leave it out")
    if task == "recommend" and any(entry.weight != 1 for _, entry in _entries(data)):
        raise ConfigError("data.source: a weight repeats rows, and recommend counts them; leave it out")


def _identity(settings: Settings, rules: Rules | None, knowledge: IndexRef | None) -> dict[str, Any]:
    """What the fingerprint says beside the content of the sources: all of the configuration that decides about rows."""
    data, template = settings.data, settings.model.chat_template
    # What the loss does with a head changes no row.
    heads = {name: {"column": head.column, "labels": head.labels} for name, head in data.heads.items()}
    return {
        "format": FORMAT,
        "task": settings.task,
        "max_length": settings.model.max_length,
        "case_markers": settings.model.case_markers,
        "chat_template": template and template_text(template),
        "data": data.model_dump(
            mode="json",
            exclude=SOURCES
            | dict.fromkeys(("heads", "parts", "temperature", "grounded"), True)
            | {"near": {"semantic": WORKERS}},
        )
        | ({"heads": heads} if heads else {})
        | ({"redaction": rules.identity()} if rules else {})
        | ({"augmentation": augment.identity(settings)} if data.augment else {})
        | ({"semantic": base_checksum(data.near.semantic.model)} if data.near.semantic else {})
        | ({"grounded": grounding.identity(settings, knowledge)} if knowledge else {}),
        "classes": load_task(settings.task).classes(data),  # their order counts, and JSON objects have none
    }


def forget(files: Iterable[sources.SourceFile]) -> None:
    """Remove the rows that databases among them gave."""
    for file in files:
        if file.columns is not None:
            queries.forget(file.uri)


def _present(file: sources.SourceFile, bad_rows: bool) -> list[str] | DataError:
    """The columns of a file; or, where it may be bad, why it has none."""
    if file.columns is not None:
        return list(file.columns)
    try:
        return column_names(file, bad_rows)
    except DataError as error:
        if not bad_rows:
            raise
        return error


def _known(
    files: list[sources.SourceFile],
    present: list[list[str] | DataError],
    entries: list[tuple[str | None, SourceSettings]],
    data: DataSettings,
) -> list[str]:
    """The columns of the first file that has any, by the names that `data.columns` has for them."""
    for file, names in zip(files, present, strict=True):
        if not isinstance(names, DataError):
            own = entries[file.source][1].columns
            return names + [getattr(data.columns, name, name) for name in own if own[name] in names]
    raise present[0]  # type: ignore[misc]


def _table(name: str, table: TableSettings) -> blocks.Reading:
    """What is read of `data.items` or `data.users`."""
    section = f"data.{name}"
    uris = [table.source] if isinstance(table.source, str) else table.source
    files = sources.find_files(uris, table.format, key=f"{section}.source")
    columns = table.columns
    for file in files:
        present = column_names(file)
        for here, column in columns.items():
            sources.check_columns(file, {here.partition(".")[0]: column}, present, section)
    return blocks.Reading(tuple(files), columns, frozenset(), TABLE_ROWS, None)


def _mixed(settings: Settings, fresh: bool) -> Plan:
    parts = {name: plan(settings.part(name), fresh) for name in settings.data.parts}
    identity = {
        "format": FORMAT,
        "parts": {name: part.ref.fingerprint for name, part in parts.items()},
        "temperature": settings.data.temperature,
        "seed": settings.data.split.seed,
        "rows_per_shard": settings.data.rows_per_shard,
    }
    reading = blocks.Reading((), {}, frozenset(), settings.data.rows_per_shard, None)
    tokenizer = next(iter(parts.values())).tokenizer
    return Plan(
        settings, reading, (), tokenizer, DatasetRef(settings.name, storage.fingerprint(identity)), parts
    )
