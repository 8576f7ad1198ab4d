"""CoNLL columns: one word a line, its columns divided by blanks, an empty line after each sentence.

A sentence is a row. Its columns are named by their places, `1`, `2` and so on, and `last`; a column holds
the sentence's values as a JSON list. `-DOCSTART-` lines, which only divide documents, are no words, and so
are lines that begin with `#` before a sentence's first word (CoNLL-U's comments).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import pyarrow as pa

from lib.data.sources import SourceFile
from lib.errors import DataError

LAST = "last"
DOCUMENT = "-DOCSTART-"


def column_names(file: SourceFile, stream: IO[bytes]) -> list[str]:
    """`1` to the number of columns of the first word, and `last`. Raises DataError when there is no word."""
    for _, words in sentences(file, stream):
        return [*(str(i + 1) for i in range(len(words[0]))), LAST]
    raise DataError(f"{file.name} holds no words")


def read_tables(
    file: SourceFile, stream: IO[bytes], columns: Sequence[str], batch_rows: int
) -> Iterator[pa.Table]:
    """Tables of at most `batch_rows` sentences, each of `columns` a string column of JSON lists."""
    places = [-1 if name == LAST else int(name) - 1 for name in columns]
    rows: list[list[str]] = []
    for _, words in sentences(file, stream):
        rows.append([json.dumps([w[place] for w in words], ensure_ascii=False) for place in places])
        if len(rows) == batch_rows:
            yield _table(rows, columns)
            rows = []
    if rows:
        yield _table(rows, columns)


def _table(rows: list[list[str]], columns: Sequence[str]) -> pa.Table:
    arrays = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
    return pa.table(arrays, names=list(columns))


def sentences(file: SourceFile, lines: Iterable[bytes]) -> Iterator[tuple[int, list[list[str]]]]:
    """Line number of the first word, and the columns of each word, sentence by sentence.

    Raises DataError, naming the line, for a word with another number of columns than the first one of the
    file, and for bytes that are not UTF-8.
    """
    words: list[list[str]] = []
    began = width = 0
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.name} line {number}, byte {error.start + 1} (0x{error.object[error.start]:02x}) is not valid "
                f"UTF-8; convert the file to UTF-8, such as with iconv -f WINDOWS-1252 -t UTF-8"
            ) from error
        if not line:
            if words:
                yield began, words
            words = []
            continue
        if not words and line.startswith("#") and (width == 0 or len(line.split()) != width):
            continue
        values = line.split("\t") if "\t" in line else line.split()
        if values[0] == DOCUMENT:
            continue
        width = width or len(values)
        if len(values) != width:
            raise DataError(
                f"{file.name} line {number} has {len(values)} columns where the first word has {width} "
                f"({line[:60]!r}); give every word a line of {width} columns"
            )
        if not words:
            began = number
        words.append(values)
    if words:
        yield began, words
