"""Rows of a file as they are read: those that can be, with their numbers, and those that cannot, with the reason.

A row keeps its number in the file whatever lies before it, so that both passes and every message mean the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import pyarrow as pa

from lib.data.reading.sources import SourceFile
from lib.errors import DataError

# One row of text must fit into this; a longer one is nearly always an unclosed quote, or no text.
ROW_BYTES = 8 << 20
# A row's position is its file's number and its number in the file, in one integer.
ROW_BITS = 40
# So much of a row that cannot be read is kept, to be shown once personal data has left it.
KEPT_CHARACTERS = 500
TO_UTF8 = "convert the file to UTF-8, such as with iconv -f WINDOWS-1252 -t UTF-8"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read."""

    number: int
    """In its file, from 0."""
    reason: str
    """One of `quarantine.REASONS`."""
    place: str
    """Where a person finds it in the file: `line 3`, `row 2`."""
    why: str
    """Without anything that the row says."""
    text: str = ""
    """How it begins."""
    mend: str = ""
    """What to do about it."""
    rows: int = 1
    """For how many it stands: an unclosed quote swallows those behind it."""
    shown: int = 0
    """Characters of it that `error` shows."""

    def error(self, file: SourceFile) -> DataError:
        """As the one line that ends a job."""
        begins = f" ({self.text[: self.shown]!r})" if self.shown else ""
        mend = f"; {self.mend}" if self.mend else ""
        return DataError(f"{file.name} {self.place} {self.why}{begins}{mend}")


@dataclass(frozen=True)
class Rows:
    """Some rows of a file, one after the other."""

    table: pa.Table
    """String columns, of the rows that can be read."""
    numbers: np.ndarray
    """int64: number of each of them in the file, from 0."""
    bad: list[BadRow] = field(default_factory=list)


def gathered(
    file: SourceFile,
    columns: Sequence[str],
    size: int,
    bad_rows: bool,
    read: Iterator[Sequence[str | None] | BadRow],
) -> Iterator[Rows]:
    """What is read one row after the other, its values in the order of `columns`, as `Rows` of at most `size` rows.

    Without `bad_rows` the first bad row ends it, as DataError; with it, what was read before a damage is not lost.
    """
    values: list[Sequence[str | None]] = []
    numbers: list[int] = []
    bad: list[BadRow] = []

    def held() -> Rows:
        rows = Rows(_table(columns, values), np.array(numbers, np.int64), list(bad))
        for taken in (values, numbers, bad):
            taken.clear()
        return rows

    try:
        for number, row in enumerate(read):
            if isinstance(row, BadRow):
                if not bad_rows:
                    raise row.error(file)
                bad.append(row)
            else:
                values.append(row)
                numbers.append(number)
            if len(values) + len(bad) >= size:
                yield held()
    except DataError:
        if bad_rows and (values or bad):
            yield held()
        raise
    if values or bad:
        yield held()


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> pa.Table:
    by_column = ([row[place] for row in rows] for place in range(len(columns)))
    return pa.table([_strings(values) for values in by_column], names=list(columns))


def _strings(values: list[str | None]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # JSON may spell halves of a character, which alone are none
        whole = [v and v.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for v in values]
        return pa.array(whole, pa.string())


def lines(file: SourceFile, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines of a text file and their numbers from 1, without a byte order mark. Raises DataError for one that does not end."""
    number, readline = 0, stream.readline
    while line := readline(ROW_BYTES + 1):
        number += 1
        if len(line) > ROW_BYTES:
            raise DataError(
                f"{file.name} line {number} is longer than {ROW_BYTES >> 20} MiB; is it a text with a row a line?"
            )
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def decoded(number: int, place: str, value: bytes) -> str | BadRow:
    """UTF-8 as text, or which byte is none; `number` is the row's in its file."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return not_utf8(number, place, value)


def not_utf8(number: int, place: str, value: bytes) -> BadRow:
    """A row of bytes that are not UTF-8."""
    try:
        value.decode("utf-8")
        start = 0
    except UnicodeDecodeError as error:
        start = error.start
    why = f"byte {start + 1} (0x{value[start]:02x}) is not valid UTF-8"
    return BadRow(number, "not_utf8", f"{place},", why, beginning(value), TO_UTF8)


def beginning(value: bytes | str) -> str:
    """So much of a row as is kept of a bad one."""
    if isinstance(value, bytes):
        value = value[: KEPT_CHARACTERS * 4].decode("utf-8", "replace")
    return value.strip()[:KEPT_CHARACTERS]
