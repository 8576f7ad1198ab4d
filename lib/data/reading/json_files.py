"""JSON Lines, an object a line, and JSON: one array of objects, of which one is held at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence, Set
from typing import IO, Any

import ijson

from lib.data.reading.rows import BadRow, beginning, lines, not_utf8
from lib.data.reading.sources import SourceFile
from lib.errors import DataError

# Objects may leave keys out: a column counts as present when one of the first rows has it.
HEAD_ROWS = 100
# How a value is said as text.
_TEXTS: dict[type, Callable[[Any], str | None]] = {
    bool: lambda value: str(value).lower(),
    int: str,
    float: lambda value: None if value != value else str(value),
}
_NESTED = (list, dict)


def column_names(file: SourceFile, stream: IO[bytes], bad_rows: bool) -> list[str]:
    """The keys of the first objects. Raises DataError when there are none, and without `bad_rows` for a bad row among them."""
    names: dict[str, None] = {}
    for value in itertools.islice(_values(file, stream), HEAD_ROWS):
        if isinstance(value, dict):
            names.update(dict.fromkeys(value))
        elif not bad_rows:
            raise value.error(file)
    if not names:
        raise DataError(f"{file.name} holds no rows")
    return list(names)


def read(
    file: SourceFile, stream: IO[bytes], columns: Sequence[str], lists: Set[str]
) -> Iterator[list[str | None] | BadRow]:
    """The rows, each of `columns` as text; `lists` may hold lists and objects, which become JSON.

    Raises DataError where the file is damaged.
    """
    for number, value in enumerate(_values(file, stream)):
        if isinstance(value, BadRow):
            yield value
            continue
        texts = [value.get(name) for name in columns]
        for place, found in enumerate(texts):
            kind = type(found)
            if found is None or kind is str:
                continue
            if kind not in _TEXTS and not (kind in _NESTED and columns[place] in lists):
                why = f"{columns[place]!r} holds {_kind(found)}; text or a number is needed"
                text = beginning(json.dumps(value, ensure_ascii=False))
                yield BadRow(number, "wrong_value", f"row {number + 1}:", why, text)
                break
            texts[place] = _TEXTS[kind](found) if kind in _TEXTS else json.dumps(found, ensure_ascii=False)
        else:
            yield texts


def _values(file: SourceFile, stream: IO[bytes]) -> Iterator[dict[str, Any] | BadRow]:
    if file.format == "json":
        peeked = _Peeked(stream)
        return _of_array(file, peeked) if peeked.first == b"[" else _of_lines(file, peeked)
    return _of_lines(file, stream)


class _Peeked:
    """A stream whose first byte that is no blank is known."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._held = stream, b""
        while not self._held:
            read = stream.read(1 << 12)
            self._held = read.removeprefix(b"\xef\xbb\xbf").lstrip()
            if not read:
                break
        self.first = self._held[:1]

    def read(self, size: int = -1) -> bytes:
        if not self._held:
            return self._stream.read(size)
        size = len(self._held) if size < 0 else size
        held, self._held = self._held[:size], self._held[size:]
        return held

    def readline(self, size: int = -1) -> bytes:
        line, newline, rest = self._held.partition(b"\n")
        if newline:
            self._held = rest
            return line + newline
        self._held = b""
        return line + self._stream.readline(size)


def _of_array(file: SourceFile, stream: Any) -> Iterator[dict[str, Any] | BadRow]:
    number = 0
    try:
        for number, value in enumerate(ijson.items(stream, "item", use_float=True), 1):
            if isinstance(value, dict):
                yield value
            else:
                why = f"holds {_kind(value)}; give an array of objects"
                yield BadRow(number - 1, "not_json", f"row {number}", why, beginning(str(value)))
    except ijson.JSONError as error:
        message = str(error.args[0] if error.args else error)
        what = message.splitlines()[0].removeprefix("b'").partition("\\n")[0].rstrip(".")
        raise DataError(
            f"{file.name} is damaged after row {number}: {what}; mend it or write one object a line (.jsonl), "
            f"of which a bad one is told alone"
        ) from error


def _of_lines(file: SourceFile, stream: Any) -> Iterator[dict[str, Any] | BadRow]:
    """Blank lines are no rows."""
    row = 0
    for number, line in lines(file, stream):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            yield not_utf8(row, f"line {number}", line)
        else:
            if not text:
                continue
            yield _object(row, number, text)
        row += 1


def _object(row: int, line: int, text: str) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(text)
    except ValueError as error:
        why, mend = f"is not valid JSON: {error}", ""
        if line == 1 and text.startswith(("[", "{")):
            why = "begins JSON that goes on for lines"
            mend = "write one object a line, such as with jq -c '.[]', or one array of objects in a .json"
        return BadRow(row, "not_json", f"line {line}", why, beginning(text), mend)
    if not isinstance(value, dict):
        why, mend = f"holds {_kind(value)}", "JSON Lines has one object a line"
        return BadRow(row, "not_json", f"line {line}", why, beginning(text), mend)
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
