"""Plain text: a row a line, a paragraph or a file. Its columns are `text`, and `file` and `folder`, the names of where it
lies: texts sorted into a folder for each label need no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import IO

from lib.data.reading.rows import ROW_BYTES, BadRow, decoded, lines
from lib.data.reading.sources import SourceFile
from lib.errors import DataError

COLUMNS = ("text", "file", "folder")


def read(file: SourceFile, stream: IO[bytes], columns: Sequence[str]) -> Iterator[list[str | None] | BadRow]:
    """The rows; blank lines are none. Raises DataError for a row that is too long."""
    path = PurePosixPath(file.uri.partition("::")[0])
    of_file = {"file": path.name, "folder": path.parent.name}
    texts = {"text": _lines, "paragraphs": _paragraphs, "documents": _document}[file.format](file, stream)
    for text in texts:
        yield text if isinstance(text, BadRow) else [of_file.get(name, text) for name in columns]


def _lines(file: SourceFile, stream: IO[bytes]) -> Iterator[str | BadRow]:
    row = 0
    for number, line in lines(file, stream):
        if line.strip():
            text = decoded(row, f"line {number}", line)
            yield text.rstrip("\r\n") if isinstance(text, str) else text
            row += 1


def _paragraphs(file: SourceFile, stream: IO[bytes]) -> Iterator[str | BadRow]:
    """Lines up to an empty one."""
    held: list[bytes] = []
    row = size = began = 0
    for number, line in lines(file, stream):
        if line.strip():
            began = began if held else number
            held.append(line)
            size += len(line)
            if size > ROW_BYTES:
                raise DataError(
                    f"{file.name} line {began} begins a paragraph of more than {ROW_BYTES >> 20} MiB"
                )
        elif held:
            yield _joined(row, began, held)
            held, size, row = [], 0, row + 1
    if held:
        yield _joined(row, began, held)


def _joined(row: int, began: int, held: list[bytes]) -> str | BadRow:
    text = decoded(row, f"line {began}", b"".join(held))
    return text.strip() if isinstance(text, str) else text


def _document(file: SourceFile, stream: IO[bytes]) -> Iterator[str | BadRow]:
    content = stream.read(ROW_BYTES + 1)
    if len(content) > ROW_BYTES:
        raise DataError(f"{file.name} is more than {ROW_BYTES >> 20} MiB long, and should be one row; cut it")
    text = decoded(0, "row 1", content.removeprefix(b"\xef\xbb\xbf"))
    yield text.strip() if isinstance(text, str) else text
