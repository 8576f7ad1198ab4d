"""Rows of a database: what one SELECT gives, as a Parquet file that both passes read.

    SNAPSHOTS/KEY-CONTENT.parquet       all values as texts; it lies there while a job reads it
    SNAPSHOTS/KEY.json                  what it was: content, columns, rows; by it the jobs behind find the dataset

KEY stands for the database and the query, CONTENT for the rows. A database changes while a pipeline runs, so that it is
asked once, by jobs.preprocess; asked again, it would name a dataset that is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage, tracking
from lib.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from sqlalchemy import URL, Engine

DATABASES = ("sqlite", *tracking.POSTGRESQL)
# Of the configuration, what may name one.
KEYS = ("data.source", "data.validation_source", "data.test_source")
SNAPSHOTS = "snapshots"
# Rows that are held at a time, unless their texts are long.
BATCH_ROWS, BATCH_BYTES = 2000, 16 << 20

_VARIABLE = re.compile(r"\$\{(\w+)\}")
# Of a query, what may hold anything: texts, names in quotes, comments.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|(\$\w*\$).*?\1|--[^\n]*|/\*.*?\*/", re.S)


@dataclass(frozen=True)
class Snapshot:
    """What a query gave."""

    uri: str
    """Where its rows lie, while they do."""
    content: str
    columns: list[str]
    rows: int
    size: int
    """Bytes."""
    shown: str
    """The database, without a password."""


def is_database(source: str) -> bool:
    whole = _VARIABLE.fullmatch(source)
    url = os.environ.get(whole[1], "") if whole else source
    return "://" in url and url.partition("://")[0] in DATABASES


def check(key: str, query: str | None) -> str:
    """A query as it is sent. Raises ConfigError for none, and for what is not one SELECT."""
    if key not in KEYS:
        raise ConfigError(
            f"{key} is a database, and only {', '.join(KEYS)} take one; export what is needed to a file"
        )
    if query is None or not query.strip():
        raise ConfigError(f"{key} is a database; say what is read of it: {{uri: …, query: SELECT …}}")
    statement = query.strip().rstrip(";").strip()
    words = _QUOTED.sub(" ", statement).split(None, 1)
    if not words or words[0].lower().lstrip("(") not in ("select", "with"):
        raise ConfigError(
            f"{key}: the query must be one SELECT, and begins with {words[0] if words else ''!r}"
        )
    if ";" in _QUOTED.sub(" ", statement):
        raise ConfigError(f"{key}: the query must be one statement; leave out what stands behind the ;")
    return statement


def snapshot(source: str, query: str | None, key: str, fresh: bool) -> Snapshot:
    """The rows of a query, of which `key` tells in the configuration. `fresh` asks the database and leaves them where they can be read; without it the last snapshot
    of this query is told, and the database asked where there is none.

    Raises ConfigError, in one line and without a password, for a database or a query that cannot be used.
    """
    statement = check(key, query)
    url = _url(source, key)
    shown = url.set(query={}).render_as_string(hide_password=True)
    folder = storage.join(storage.root(), SNAPSHOTS)
    name = storage.fingerprint([shown, statement])
    pipeline = os.environ.get("WHORL_PIPELINE")
    # Two pipelines side by side do not take each other's.
    records = [f"{name}-{pipeline}.json"] * bool(pipeline) + [f"{name}.json"]
    if not fresh:
        for record in records:
            if storage.exists(storage.join(folder, record)):
                return Snapshot(**storage.read_json(storage.join(folder, record)), shown=shown)
    with tempfile.TemporaryDirectory(prefix="whorl-") as scratch:
        path = Path(scratch) / "rows.parquet"
        content, columns, rows = _export(url, statement, path, shown, key)
        uri = storage.join(folder, f"{name}-{content}.parquet")
        told: dict[str, Any] = {
            "uri": uri,
            "content": content,
            "columns": columns,
            "rows": rows,
            "size": path.stat().st_size,
        }
        if fresh:
            _forget(folder, name)
            with path.open("rb") as rows_file, storage.open_file(uri, "wb") as file:
                shutil.copyfileobj(rows_file, file)
    for record in records:
        storage.write_json(storage.join(folder, record), told)
    return Snapshot(**told, shown=shown)


def forget(uri: str) -> None:
    """Remove the rows of a snapshot; the record of what it was stays."""
    storage.remove(uri)


def _forget(folder: str, name: str) -> None:
    """What a job that was killed has left of the same query."""
    for file in storage.ls(folder):
        if file.startswith(f"{name}-") and file.endswith(".parquet"):
            storage.remove(storage.join(folder, file))


def _url(source: str, key: str) -> URL:
    """With its variables filled in. Raises ConfigError."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    for name in _VARIABLE.findall(source):
        if name not in os.environ:
            raise ConfigError(
                f"{key}: the environment variable {name} is not set; its value belongs to the database's URL"
            )
    whole = _VARIABLE.fullmatch(source)
    # As a part of the URL a password may hold any sign.
    url = os.environ[whole[1]] if whole else _VARIABLE.sub(lambda m: quote(os.environ[m[1]], safe=""), source)
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(f"{key} is no URL of a database, such as postgresql://user@host/name") from None


def _engine(url: URL, shown: str, key: str) -> Engine:
    """Connections that write nothing."""
    from sqlalchemy import NullPool, create_engine

    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "")
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.glob("*")])
            raise ConfigError(f"{key}: {shown} does not exist{near}")
        place = f"file:{quote(str(path.absolute()))}?mode=ro"
        return create_engine(
            "sqlite://", creator=lambda: sqlite3.connect(place, uri=True), poolclass=NullPool
        )
    patience = tracking.patience(url.render_as_string())
    return create_engine(url, poolclass=NullPool, connect_args=patience).execution_options(
        postgresql_readonly=True
    )


def _export(url: URL, statement: str, path: Path, shown: str, key: str) -> tuple[str, list[str], int]:
    """Write the rows; a hash of them, their columns and their number."""
    from sqlalchemy.exc import SQLAlchemyError

    digest, rows = hashlib.blake2b(digest_size=8), 0
    try:
        engine = _engine(url, shown, key)
        # As it is: to SQLAlchemy's text a colon would be a parameter.
        options = {"stream_results": True, "no_parameters": True}
        with (
            engine.connect().execution_options(**options) as connection,
            connection.exec_driver_sql(statement) as result,
        ):
            columns = list(result.keys())
            _check_columns(columns, shown, key)
            digest.update(json.dumps(columns).encode())
            schema = pa.schema([(name, pa.string()) for name in columns])
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                for batch in _batches(iter(result), columns, shown):
                    table = pa.table(
                        [pa.array(values, pa.string()) for values in zip(*batch, strict=True)], schema
                    )
                    for row in batch:
                        digest.update(json.dumps(row).encode())
                    writer.write_table(table)
                    rows += len(batch)
    except (SQLAlchemyError, UnicodeEncodeError) as error:
        told = str(getattr(error, "orig", None) or error)
        if url.password:
            told = told.replace(str(url.password), "***")
        raise ConfigError(f"{key}: {shown}: {told}") from None
    return digest.hexdigest(), columns, rows


def _check_columns(columns: list[str], shown: str, key: str) -> None:
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{key}: the query of {shown} gives two columns {twice!r}; name one of them with AS"
        )


def _batches(result: Iterator[Any], columns: list[str], shown: str) -> Iterator[list[list[str | None]]]:
    """Rows as texts, some at a time; whose rows they are does not depend on the size of the batches."""
    batch: list[list[str | None]] = []
    size = 0
    for number, row in enumerate(result, 1):
        for name, value in zip(columns, row, strict=True):
            if isinstance(value, bytes | memoryview):
                raise DataError(
                    f"{shown} row {number}: {name!r} holds bytes; select a text or a number instead"
                )
        texts = [_text(value) for value in row]
        batch.append(texts)
        size += sum(len(text) for text in texts if text)
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text(value: Any) -> str | None:
    """As the readers of files have values: numbers and times as text, lists and objects as JSON."""
    match value:
        case None | str():
            return value
        case bool():
            return str(value).lower()
        case float() if value != value:
            return None
        case list() | dict():
            return json.dumps(value, ensure_ascii=False, default=str)
        case datetime() | date() | time():
            return value.isoformat()
        case _:
            return str(value)
