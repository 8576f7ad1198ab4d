"""Parquet and Arrow IPC: files, streams, Feather, and what Hugging Face's `datasets` saves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.data.reading.rows import BadRow, Rows, decoded
from lib.data.reading.sources import FORMAT_NAMES, SourceFile
from lib.errors import DataError

ARROW_FILE = b"ARROW1"


def parquet_columns(file: SourceFile, stream: IO[bytes]) -> list[str]:
    with _parquet(file, stream) as parquet:
        return list(parquet.schema_arrow.names)


def read(
    file: SourceFile,
    stream: IO[bytes],
    columns: Sequence[str],
    batch_rows: int,
    lists: Set[str],
    bad_rows: bool,
) -> Iterator[Rows]:
    if file.format == "parquet":
        with _parquet(file, stream) as parquet:
            wanted = list(dict.fromkeys(columns))
            batches = parquet.iter_batches(batch_rows, columns=wanted, use_threads=False)
            yield from _as_texts(file, batches, columns, lists, bad_rows)
        return
    with _readable(file):
        _, whole = _arrow(stream)
        slices = (
            batch.slice(start, batch_rows)
            for batch in whole
            for start in range(0, batch.num_rows, batch_rows)
        )
        yield from _as_texts(file, slices, columns, lists, bad_rows)


@contextmanager
def _parquet(file: SourceFile, stream: IO[bytes]) -> Iterator[pq.ParquetFile]:
    # Buffering a whole row group ahead would let memory grow with its size.
    with _readable(file), pq.ParquetFile(stream, pre_buffer=False) as parquet:
        yield parquet


def arrow_columns(file: SourceFile, stream: IO[bytes]) -> list[str]:
    with _readable(file):
        names, _ = _arrow(stream)
        return names


def _arrow(stream: IO[bytes]) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    """Columns and record batches of a file or a stream, which its first bytes tell apart."""
    start = stream.read(len(ARROW_FILE))
    stream.seek(0)
    if start == ARROW_FILE:
        reader = pa.ipc.open_file(stream)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return list(reader.schema.names), batches
    reader = pa.ipc.open_stream(stream)
    return list(reader.schema.names), iter(reader)


@contextmanager
def _readable(file: SourceFile) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.name} is not readable {FORMAT_NAMES[file.format]}: {error}") from error


def _as_texts(
    file: SourceFile,
    batches: Iterator[pa.RecordBatch],
    columns: Sequence[str],
    lists: Set[str],
    bad_rows: bool,
) -> Iterator[Rows]:
    following = 0
    for batch in batches:
        bad: dict[int, BadRow] = {}
        texts = {
            name: _as_text(file, name, batch.column(name), following, name in lists, bad)
            for name in dict.fromkeys(columns)
        }
        numbers = np.arange(following, following + batch.num_rows, dtype=np.int64)
        table = pa.table([texts[name] for name in columns], names=list(columns))
        if bad:
            told = [bad[row] for row in sorted(bad)]
            if not bad_rows:
                raise told[0].error(file)
            readable = ~np.isin(numbers, list(bad))
            table, numbers = table.filter(pa.array(readable)), numbers[readable]
            yield Rows(table, numbers, told)
        else:
            yield Rows(table, numbers)
        following += batch.num_rows


def _as_text(
    file: SourceFile, name: str, values: pa.Array, first: int, nested: bool, bad: dict[int, BadRow]
) -> pa.Array:
    """A column as strings; rows that are not UTF-8 go to `bad`, by their number in the file, and are null."""
    if nested and pa.types.is_nested(values.type):
        texts = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values.to_pylist()]
        return pa.array(texts, pa.string())
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        # pandas writes a missing value of a numeric column as NaN.
        values = pc.if_else(pc.is_nan(values), None, values)
    if pa.types.is_nested(values.type) or _is_binary(values.type):
        raise DataError(f"{file.name}: column {name!r} holds {values.type}; give a column of text or numbers")
    values = values.cast(pa.string())
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        known: list[str | None] = []
        for row, value in enumerate(values.cast(pa.binary()).to_pylist(), first):
            text = value if value is None else decoded(row, f"row {row + 1}", value)
            known.append(None if isinstance(text, BadRow) else text)
            if isinstance(text, BadRow):
                bad.setdefault(row, text)
        return pa.array(known, pa.string())
    return values


def _is_binary(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))
