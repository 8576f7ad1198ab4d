"""What a dataset will be, told before anything is read or started: its files, columns and fingerprint.

Imports no ray, so that a wrong column name, or a dataset that is there already, answers at once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lib import storage
from lib.artifacts import DatasetRef
from lib.base_models import tokenizer_checksum
from lib.chat_templates import template_text
from lib.data import blocks, sources
from lib.data.readers import column_names
from lib.settings import Settings
from lib.tasks import load_task

# Part of every fingerprint. Raise it when the same input would give other rows or other files.
FORMAT = 1
# What the configuration says of places: their content counts, and it has checksums.
SOURCES = {"source", "validation_source", "test_source"}


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


def plan(settings: Settings) -> Plan:
    """Look at the source and name the dataset, without reading rows or starting Ray.

    Raises ConfigError, DataError, StorageError or ModelError, in one line, for a source or a base model
    that cannot be used.
    """
    data = settings.data
    task = load_task(settings.task)
    task.columns(data)  # a configuration that does not suit the task ends here, before any file is looked at
    files = [
        file
        for split, uris in data.sources.items()
        for file in sources.find_files(uris, data.format, split, f"{split}_source" if split else "source")
    ]
    columns = {**task.columns(data, column_names(files[0])), **data.slices}
    keys = {f"slices.{name}" if name in data.slices else f"columns.{name}": c for name, c in columns.items()}
    with ThreadPoolExecutor(8) as pool:
        for file, present in zip(files, pool.map(column_names, files), strict=True):
            sources.check_columns(file, keys, present)
        checksums = tuple(pool.map(storage.checksum, [f.uri for f in files]))
    tokenizer, template = tokenizer_checksum(settings.model.base), settings.model.chat_template
    identity = {
        "format": FORMAT,
        "task": settings.task,
        "tokenizer": tokenizer,
        "max_length": settings.model.max_length,
        "case_markers": settings.model.case_markers,
        "sources": [
            [file.format, checksum, file.split] for file, checksum in zip(files, checksums, strict=True)
        ],
        "data": data.model_dump(mode="json", exclude=SOURCES),
        "chat_template": template and template_text(template),
        "classes": task.classes(data),  # their order counts, and JSON objects have none
    }
    lists = task.LISTS.intersection(columns)
    reading = blocks.Reading(tuple(files), columns, lists, data.rows_per_shard, data.limit)
    return Plan(
        settings, reading, checksums, tokenizer, DatasetRef(settings.name, storage.fingerprint(identity))
    )
