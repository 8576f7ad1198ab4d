"""CoNLL columns: one word a line, its columns divided by blanks, an empty line after each sentence.

A sentence is a row. Its columns are named by their places, `1`, `2` and so on, and `last`; a column holds
the sentence's values as a JSON list. `-DOCSTART-` lines, which only divide documents, are no words, and so
are lines that begin with `#` before a sentence's first word (CoNLL-U's comments).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from lib.data.reading.rows import TO_UTF8, BadRow, beginning
from lib.data.reading.sources import SourceFile
from lib.errors import DataError

LAST = "last"
DOCUMENT = "-DOCSTART-"


def column_names(file: SourceFile, stream: IO[bytes], bad_rows: bool) -> list[str]:
    """`1` to the number of columns of the first word, and `last`. Raises DataError when there is no word, and without
    `bad_rows` for a bad first sentence."""
    for words in sentences(stream):
        if isinstance(words, BadRow):
            if not bad_rows:
                raise words.error(file)
            continue
        return [*(str(i + 1) for i in range(len(words[0]))), LAST]
    raise DataError(f"{file.name} holds no words")


def read(file: SourceFile, stream: IO[bytes], columns: Sequence[str]) -> Iterator[list[str | None] | BadRow]:
    """The sentences, each of `columns` as a JSON list."""
    places = [-1 if name == LAST else int(name) - 1 for name in columns]
    for words in sentences(stream):
        if isinstance(words, BadRow):
            yield words
        else:
            yield [json.dumps([w[place] for w in words], ensure_ascii=False) for place in places]


def sentences(lines: Iterable[bytes]) -> Iterator[list[list[str]] | BadRow]:
    """The columns of each word, sentence by sentence.

    Bad is a sentence with a word of another number of columns than the first one of the file, or with bytes that are not
    UTF-8.
    """
    words: list[list[str]] = []
    bad: BadRow | None = None
    row = width = 0
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            why = f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not valid UTF-8"
            bad = bad or BadRow(row, "not_utf8", f"line {number},", why, beginning(raw), TO_UTF8)
            continue
        if not line:
            if bad or words:
                yield bad or words
                row += 1
            words, bad = [], None
            continue
        if not words and line.startswith("#") and (width == 0 or len(line.split()) != width):
            continue
        values = line.split("\t") if "\t" in line else line.split()
        if values[0] == DOCUMENT:
            continue
        width = width or len(values)
        words.append(values)
        if len(values) != width and not bad:
            why = f"has {len(values)} columns where the first word has {width}"
            mend = f"give every word a line of {width} columns"
            bad = BadRow(row, "wrong_columns", f"line {number}", why, beginning(line), mend, shown=60)
    if bad or words:
        yield bad or words
