"""CSV and tab-separated text, by Arrow's parser, with the rows that it cannot read set aside."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from lib.data.reading.rows import ROW_BYTES, TO_UTF8, BadRow, Rows, beginning
from lib.data.reading.sources import FORMAT_NAMES, SourceFile
from lib.errors import DataError

# Stands in the text for a byte that is not UTF-8, with its two digits behind it. Unicode has it for use inside a program:
# no text that is exchanged has it.
MARK = "\ufdd0"
_MARKED = re.compile(f"{MARK}([0-9a-f]{{2}})")


def column_names(file: SourceFile, stream: IO[bytes], bad_rows: bool) -> list[str]:
    """The header. Raises DataError for one that cannot be read, and without `bad_rows` for a row of the first block that
    has another number of columns."""
    with _opened(file, stream, pacsv.ConvertOptions()) as (reader, bad):
        names = list(reader.schema.names)
    if bad and not bad_rows:
        raise bad[0].error(file)
    for name in names:
        if MARK in name:
            raise DataError(f"{file.name}: the header is not valid UTF-8 ({_shown(name)!r}); {TO_UTF8}")
    return names


def read(file: SourceFile, stream: IO[bytes], columns: Sequence[str], bad_rows: bool) -> Iterator[Rows]:
    """The rows in blocks of bounded size. Raises DataError where the file is damaged, and without `bad_rows` for the first
    bad row."""
    wanted = list(dict.fromkeys(columns))
    options = pacsv.ConvertOptions(
        include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
    )
    following = 0
    with _opened(file, stream, options) as (reader, waiting):
        for batch in reader:
            numbers, following = _numbers(batch.num_rows, following, waiting)
            bad = [row for row in waiting if row.number < following]
            del waiting[: len(bad)]
            table = pa.table([batch.column(name) for name in columns], names=list(columns))
            yield _checked(file, table, numbers, bad, bad_rows)
        if waiting:
            yield _checked(file, table_of(columns), np.zeros(0, np.int64), list(waiting), bad_rows)


def table_of(columns: Sequence[str]) -> pa.Table:
    """No rows."""
    return pa.table([pa.array([], pa.string()) for _ in columns], names=list(columns))


def _numbers(count: int, following: int, bad: Sequence[BadRow]) -> tuple[np.ndarray, int]:
    """Numbers int64 of the next `count` rows that can be read, from `following` on, and the number behind them."""
    numbers = np.arange(following, following + count + len(bad), dtype=np.int64)
    if bad:
        numbers = numbers[~np.isin(numbers, [row.number for row in bad])]
    numbers = numbers[:count]
    return numbers, int(numbers[-1]) + 1 if count else following


def _checked(
    file: SourceFile, table: pa.Table, numbers: np.ndarray, bad: list[BadRow], bad_rows: bool
) -> Rows:
    """Rows without those that are not UTF-8."""
    wrong = np.zeros(len(numbers), bool)
    for column in table.columns:
        wrong |= np.asarray(pc.fill_null(pc.match_substring(column, MARK), False), bool)
    if wrong.any():
        for row in np.flatnonzero(wrong).tolist():
            bad.append(_not_utf8(table.slice(row, 1), int(numbers[row])))
        bad.sort(key=lambda row: row.number)
        table, numbers = table.filter(pa.array(~wrong)), numbers[~wrong]
    if bad and not bad_rows:
        raise bad[0].error(file)
    return Rows(table, numbers, bad)


def _not_utf8(row: pa.Table, number: int) -> BadRow:
    values = {name: row[name][0].as_py() or "" for name in row.column_names}
    name, text = next((name, text) for name, text in values.items() if MARK in text)
    place = text.index(MARK)
    byte = f" (0x{text[place + 1 : place + 3]})"
    why = f"character {place + 1} of {name!r}{byte} is not valid UTF-8"
    return BadRow(number, "not_utf8", f"row {number + 1},", why, beginning(_shown(text)), TO_UTF8)


def _shown(text: str) -> str:
    return _MARKED.sub("\ufffd", text)


@contextmanager
def _opened(
    file: SourceFile, stream: IO[bytes], convert: pacsv.ConvertOptions
) -> Iterator[tuple[pacsv.CSVStreamingReader, list[BadRow]]]:
    """A reader and the rows that it has left out so far, which may lie behind the block that it is at."""
    bad: list[BadRow] = []

    def leave_out(row: pacsv.InvalidRow) -> str:
        bad.append(_other_columns(row))
        return "skip"

    try:
        yield (
            pacsv.open_csv(
                io.BufferedReader(_Utf8(stream), 1 << 20),  # type: ignore[type-var]
                # With threads Arrow cannot say which row is wrong.
                read_options=pacsv.ReadOptions(use_threads=False, block_size=ROW_BYTES),
                parse_options=pacsv.ParseOptions(
                    delimiter="\t" if file.format == "tsv" else ",",
                    newlines_in_values=True,
                    invalid_row_handler=leave_out,
                ),
                convert_options=convert,
            ),
            bad,
        )
    except pa.ArrowException as error:
        raise _damage(file, error) from error


def _other_columns(row: pacsv.InvalidRow) -> BadRow:
    swallowed = row.text.count("\n")
    # Arrow counts from 1, and the header as a row.
    number = (row.number or 2) - 2
    return BadRow(
        number,
        "wrong_columns",
        f"row {number + 1}",
        f"has {row.actual_columns} columns where the header has {row.expected_columns}",
        beginning(_shown(row.text)),
        "look for a quote that is not closed" if swallowed else "quote fields that hold the separator",
        1 + swallowed,
        shown=60,
    )


def _damage(file: SourceFile, error: pa.ArrowException) -> DataError:
    text = str(error)
    if "straddling" in text:
        return DataError(
            f"{file.name} has a row of more than {ROW_BYTES >> 20} MiB; look for a quote that is not closed"
        )
    return DataError(f"{file.name} is not readable {FORMAT_NAMES[file.format]}: {text}")


class _Utf8(io.RawIOBase):
    """A stream that is valid UTF-8: for each byte that is none it has MARK and the byte's two digits. Arrow would end at
    the first, and could not even hand over a row with another number of columns that has one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._held, self._tail = stream, memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._held:
            read = self._stream.read(1 << 20)
            self._held = memoryview(self._valid(self._tail + read, final=not read))
            if not read:
                break
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size

    def _valid(self, read: bytes, final: bool) -> bytes:
        """All but the beginning of a character at the end, which waits for its rest."""
        whole = len(read) if final else len(read) - _begun(read)
        read, self._tail = read[:whole], read[whole:]
        return read if _is_utf8(read) else read.decode("utf-8", _HANDLER).encode()


def _begun(read: bytes) -> int:
    """Bytes at the end that begin a character which goes on behind them."""
    for size in range(1, min(4, len(read) + 1)):
        byte = read[-size]
        if byte >= 0xC0:  # the first of a character, of so many bytes
            return size if size < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        if byte < 0x80:
            return 0
    return 0


def _is_utf8(read: bytes) -> bool:
    """As Arrow tells it, many times as fast as a decoder that makes a text of it."""
    ends = pa.py_buffer(np.array([0, len(read)], np.int32))
    try:
        pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(read)]).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _marked(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    found = error.object[error.start : error.end]
    return "".join(f"{MARK}{byte:02x}" for byte in found), error.end


_HANDLER = "whorl-marked"
codecs.register_error(_HANDLER, _marked)
