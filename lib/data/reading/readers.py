"""The rows of one file, as Arrow tables of text columns, with the place of whatever cannot be read.

Values of every format arrive as strings (or null), so that all files of a source have one schema; lists and
objects, where a task has them, as JSON. Rows count from 1 in messages; in CSV the header is not counted.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from lib import storage
from lib.data.reading import arrow_files, chatterbot, conll, csv_files, json_files, plain_text
from lib.data.reading.rows import Rows, gathered
from lib.data.reading.sources import BINARY, SourceFile
from lib.errors import DataError, StorageError

# Of what has no buffer of its own. Those of the decompressors are small, and so is what a damage takes from before it.
BUFFER_BYTES = 1 << 20


def column_names(file: SourceFile, bad_rows: bool = False) -> list[str]:
    """The columns of a file, from its header or its first rows. Raises DataError when it has none, and without `bad_rows`
    for a bad row that is met on the way."""
    with opened(file) as stream:
        match file.format:
            case "parquet":
                return arrow_files.parquet_columns(file, stream)
            case "arrow":
                return arrow_files.arrow_columns(file, stream)
            case "json" | "jsonl":
                return json_files.column_names(file, stream, bad_rows)
            case "conll":
                return conll.column_names(file, stream, bad_rows)
            case "chatterbot":
                return list(chatterbot.COLUMNS)
            case "text" | "paragraphs" | "documents":
                return list(plain_text.COLUMNS)
            case _:
                return csv_files.column_names(file, stream, bad_rows)


def read_rows(
    file: SourceFile,
    columns: Sequence[str],
    batch_rows: int,
    lists: Set[str] = frozenset(),
    bad_rows: bool = False,
) -> Iterator[Rows]:
    """At most about `batch_rows` rows at a time, in order, with `columns` as strings; numbered as in the file.

    `lists` are those of the columns that may hold lists or objects, which become JSON. Memory does not grow
    with the file. Raises DataError where the file is damaged and, unless `bad_rows` are to be told beside the others, for
    the first row that cannot be read; StorageError where the file cannot be reached.
    """
    with opened(file) as stream:
        match file.format:
            case "parquet" | "arrow":
                yield from arrow_files.read(file, stream, columns, batch_rows, lists, bad_rows)
            case "csv" | "tsv":
                yield from csv_files.read(file, stream, columns, bad_rows)
            case "json" | "jsonl":
                read = json_files.read(file, stream, columns, lists)
                yield from gathered(file, columns, batch_rows, bad_rows, read)
            case "conll":
                yield from gathered(file, columns, batch_rows, bad_rows, conll.read(file, stream, columns))
            case "chatterbot":
                read = chatterbot.read(file, stream, columns)
                yield from gathered(file, columns, batch_rows, bad_rows, read)
            case _:
                read = plain_text.read(file, stream, columns)
                yield from gathered(file, columns, batch_rows, bad_rows, read)


def read_tables(
    file: SourceFile, columns: Sequence[str], batch_rows: int, lists: Set[str] = frozenset()
) -> Iterator[pa.Table]:
    """The same, where every row has to be readable."""
    for rows in read_rows(file, columns, batch_rows, lists):
        yield rows.table


@contextmanager
def opened(file: SourceFile) -> Iterator[Any]:
    """The file's bytes, decompressed. Raises DataError where its compression is broken, StorageError where it cannot be
    reached."""
    with storage.open_file(file.uri, forward=file.format not in BINARY) as stream:
        try:
            if file.format in BINARY:
                yield stream
            else:
                yield _decompressed(stream, file.compression)
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{file.name} is damaged: {error}; fetch it again") from error
        except OSError as error:
            if file.compression in ("bz2", "zstd") and error.errno is None:
                raise DataError(f"{file.name} is damaged: {error}; fetch it again") from error
            raise StorageError(f"cannot read {file.name}: {error.strerror or error}") from error


def _decompressed(stream: Any, compression: str | None) -> Any:
    match compression:
        case "gzip":
            return gzip.GzipFile(fileobj=stream)
        case "bz2":
            return bz2.BZ2File(stream)
        case "xz":
            return lzma.LZMAFile(stream)
        case "zstd":
            return io.BufferedReader(pa.CompressedInputStream(stream, "zstd"), BUFFER_BYTES)
        case _:
            return io.BufferedReader(stream, BUFFER_BYTES)
