"""The rows of one file, as Arrow tables of text columns, with the place of whatever cannot be read.

Values of every format arrive as strings (or null), so that all files of a source have one schema; lists and
objects, where a task has them, as JSON. Rows count from 1; in CSV the header is not counted.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from lib import storage
from lib.data import chatterbot, conll
from lib.data.sources import FORMAT_NAMES, SourceFile
from lib.errors import DataError

# One CSV row must fit into this; a longer one is nearly always an unclosed quote.
CSV_BLOCK_BYTES = 8 << 20
# JSON objects may leave keys out: a column counts as present when one of the first rows has it.
JSON_HEAD_ROWS = 100


def column_names(file: SourceFile) -> list[str]:
    """The columns of a file, from its header or its first rows. Raises DataError when it has none."""
    match file.format:
        case "parquet":
            with _opened(file) as stream, _parquet(file, stream) as parquet:
                return list(parquet.schema_arrow.names)
        case "jsonl":
            names: dict[str, None] = {}
            for number, (_, value) in enumerate(_json_objects(file), 1):
                names.update(dict.fromkeys(value))
                if number == JSON_HEAD_ROWS:
                    break
            if not names:
                raise DataError(f"{file.name} holds no rows")
            return list(names)
        case "conll":
            with _opened(file) as stream:
                return conll.column_names(file, stream)
        case "chatterbot":
            return list(chatterbot.COLUMNS)
        case _:
            with _opened(file) as stream, _csv(file, stream, pacsv.ConvertOptions()) as reader:
                return list(reader.schema.names)


def read_tables(
    file: SourceFile, columns: Sequence[str], batch_rows: int, lists: Set[str] = frozenset()
) -> Iterator[pa.Table]:
    """Tables of at most about `batch_rows` rows, in order, with `columns` as strings.

    `lists` are those of the columns that may hold lists or objects, which become JSON. Memory does not grow
    with the file. Raises DataError, naming the row, for what cannot be read.
    """
    match file.format:
        case "parquet":
            yield from _read_parquet(file, columns, batch_rows, lists)
        case "jsonl":
            yield from _read_json_lines(file, columns, batch_rows, lists)
        case "conll":
            with _opened(file) as stream:
                yield from conll.read_tables(file, stream, columns, batch_rows)
        case "chatterbot":
            with _opened(file) as stream:
                yield from chatterbot.read_tables(file, stream, columns, batch_rows)
        case _:
            yield from _read_csv(file, columns)


@contextmanager
def _opened(file: SourceFile) -> Iterator[Any]:
    """The file's bytes, decompressed; broken compression becomes a DataError."""
    with storage.open_file(file.uri) as stream:
        try:
            if file.gzip:
                with gzip.open(stream) as plain:
                    yield plain
            else:
                yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{file.name} is damaged: {error}; fetch it again") from error


@contextmanager
def _parquet(file: SourceFile, stream: Any) -> Iterator[pq.ParquetFile]:
    try:
        # Buffering a whole row group ahead would let memory grow with its size.
        with pq.ParquetFile(stream, pre_buffer=False) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.name} is not readable Parquet: {error}") from error


def _read_parquet(
    file: SourceFile, columns: Sequence[str], batch_rows: int, lists: Set[str]
) -> Iterator[pa.Table]:
    with _opened(file) as stream, _parquet(file, stream) as parquet:
        wanted = list(dict.fromkeys(columns))
        row = 1
        for batch in parquet.iter_batches(batch_rows, columns=wanted, use_threads=False):
            arrays = [_as_text(file, name, batch.column(name), row, name in lists) for name in columns]
            row += batch.num_rows
            yield pa.table(arrays, names=list(columns))


def _as_text(file: SourceFile, name: str, values: pa.Array, row: int, nested: bool) -> pa.Array:
    if nested and pa.types.is_nested(values.type):
        texts = [None if v is None else json.dumps(v, ensure_ascii=False) for v in values.to_pylist()]
        return pa.array(texts, pa.string())
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        # pandas writes a missing value of a numeric column as NaN.
        values = pc.if_else(pc.is_nan(values), None, values)
    if pa.types.is_nested(values.type) or pa.types.is_binary(values.type):
        raise DataError(f"{file.name}: column {name!r} holds {values.type}; give a column of text or numbers")
    values = values.cast(pa.string())
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        for i, value in enumerate(values.cast(pa.binary())):
            _decode(file, row + i, value.as_py() or b"")
        raise
    return values


def _read_csv(file: SourceFile, columns: Sequence[str]) -> Iterator[pa.Table]:
    wanted = list(dict.fromkeys(columns))
    options = pacsv.ConvertOptions(
        include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
    )
    with _opened(file) as stream, _csv(file, stream, options) as reader:
        for batch in reader:
            yield pa.table([batch.column(name) for name in columns], names=list(columns))


@contextmanager
def _csv(file: SourceFile, stream: Any, convert: pacsv.ConvertOptions) -> Iterator[pacsv.CSVStreamingReader]:
    invalid: list[pacsv.InvalidRow] = []

    def remember(row: pacsv.InvalidRow) -> str:
        invalid.append(row)  # Arrow swallows what is raised here
        return "error"

    try:
        yield pacsv.open_csv(
            stream,
            # With threads Arrow cannot say which row is wrong.
            read_options=pacsv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(
                delimiter="\t" if file.format == "tsv" else ",",
                newlines_in_values=True,
                invalid_row_handler=remember,
            ),
            convert_options=convert,
        )
    except pa.ArrowException as error:
        raise _csv_error(file, error, invalid) from error


def _csv_error(file: SourceFile, error: pa.ArrowException, invalid: list[pacsv.InvalidRow]) -> DataError:
    text = str(error)
    if "UTF8" in text or "UTF-8" in text:
        return _utf8_error(file)
    if "straddling" in text:
        return DataError(
            f"{file.name} has a row of more than {CSV_BLOCK_BYTES >> 20} MiB; look for a quote that is not closed"
        )
    if invalid:
        row = invalid[0]
        # Arrow counts the header as a row.
        place = f"row {row.number - 1}" if row.number else "a row"
        mend = (
            "look for a quote that is not closed"
            if "\n" in row.text
            else "quote fields that hold the separator"
        )
        return DataError(
            f"{file.name} {place} has {row.actual_columns} columns where the header has {row.expected_columns} "
            f"({row.text[:60]!r}); {mend}"
        )
    return DataError(f"{file.name} is not readable {FORMAT_NAMES[file.format]}: {text}")


def _utf8_error(file: SourceFile) -> DataError:
    """The first byte of a text file that is not UTF-8, found by reading it again."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _opened(file) as stream:
        number = 0
        for number, line in enumerate(stream, 1):
            try:
                decoder.decode(line)
            except UnicodeDecodeError as error:
                return _not_utf8(file, f"line {number}", error)
    return DataError(f"{file.name} line {number} is not valid UTF-8; convert the file to UTF-8")


def _not_utf8(file: SourceFile, place: str, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{file.name} {place}, byte {error.start + 1} (0x{byte:02x}) is not valid UTF-8; convert the file to UTF-8, "
        f"such as with iconv -f WINDOWS-1252 -t UTF-8"
    )


def _decode(file: SourceFile, row: int, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, f"row {row}", error) from error


def _read_json_lines(
    file: SourceFile, columns: Sequence[str], batch_rows: int, lists: Set[str]
) -> Iterator[pa.Table]:
    collected: dict[str, list[str | None]] = {name: [] for name in columns}
    rows = 0
    for row, value in _json_objects(file):
        for name, values in collected.items():
            values.append(_text(file, row, name, value.get(name), name in lists))
        rows += 1
        if rows == batch_rows:
            yield _string_table(collected)
            collected, rows = {name: [] for name in columns}, 0
    if rows:
        yield _string_table(collected)


def _string_table(columns: dict[str, list[str | None]]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _json_objects(file: SourceFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers and objects of a JSON Lines file; blank lines are no rows."""
    row = 0
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise _not_utf8(file, f"line {number}", error) from error
            if not text:
                continue
            row += 1
            yield row, _json_object(file, number, text)


def _json_object(file: SourceFile, number: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        if number == 1 and text.startswith(("[", "{")):
            raise DataError(
                f"{file.name} is JSON, but not JSON Lines; write one object a line, such as with jq -c '.[]'"
            ) from error
        raise DataError(f"{file.name} line {number} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file.name} line {number} holds {_kind(value)}; JSON Lines has one object a line")
    return value


def _text(file: SourceFile, row: int, name: str, value: Any, nested: bool) -> str | None:
    if nested and isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return None if value != value else str(value)
    raise DataError(f"{file.name} row {row}: {name!r} holds {_kind(value)}; text or a number is needed")


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
