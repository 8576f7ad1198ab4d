"""ChatterBot's corpus format: YAML with `conversations`, each a list of what is said in turn, the user first.

A conversation is a row: `messages`, as JSON, and `category`, the file's categories. Such files are written by
hand and small: one is held whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import yaml

from lib.data.reading.rows import BadRow, beginning
from lib.data.reading.sources import SourceFile
from lib.errors import DataError

COLUMNS = ("messages", "category")
SPEAKERS = ("user", "assistant")


def read(file: SourceFile, stream: IO[bytes], columns: Sequence[str]) -> Iterator[list[str | None] | BadRow]:
    """The conversations. Raises DataError for a file of another form."""
    values = _load(file, stream)
    category = ", ".join(map(str, values.get("categories") or [])) or None
    for number, said in enumerate(values["conversations"]):
        if isinstance(said, list) and all(isinstance(text, str) for text in said):
            row = {"messages": _messages(said), "category": category}
            yield [row[name] for name in columns]
        else:
            why, text = "is no list of texts", beginning(str(said))
            yield BadRow(number, "wrong_value", f"row {number + 1}", why, text, shown=60)


def _load(file: SourceFile, stream: IO[bytes]) -> dict[str, Any]:
    # All values as they are written: YAML itself would read Yes as true. libyaml's is ten times as fast.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        values = yaml.load(stream, loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise DataError(
            f"{file.name}{where} is not valid YAML: {getattr(error, 'problem', error)}"
        ) from error
    if not isinstance(values, dict) or not isinstance(values.get("conversations"), list):
        raise DataError(f"{file.name} holds no `conversations`, a list of lists of what is said in turn")
    return values


def _messages(said: list[str]) -> str:
    turns = [{"role": SPEAKERS[i % 2], "content": text} for i, text in enumerate(said)]
    return json.dumps(turns, ensure_ascii=False)
