"""ChatterBot's corpus format: YAML with `conversations`, each a list of what is said in turn, the user first.

A conversation is a row: `messages`, as JSON, and `category`, the file's categories. Such files are written by
hand and small: one is held whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import yaml

from lib.data.sources import SourceFile
from lib.errors import DataError

COLUMNS = ("messages", "category")
SPEAKERS = ("user", "assistant")


def read_tables(
    file: SourceFile, stream: IO[bytes], columns: Sequence[str], batch_rows: int
) -> Iterator[pa.Table]:
    """Tables of at most `batch_rows` conversations, each of `columns` a string column.

    Raises DataError for a file of another form, naming the conversation where one is at fault.
    """
    values = _load(file, stream)
    category = ", ".join(map(str, values.get("categories") or [])) or None
    rows = [
        {"messages": _messages(file, number, said), "category": category}
        for number, said in enumerate(values["conversations"], 1)
    ]
    for start in range(0, len(rows), batch_rows):
        part = rows[start : start + batch_rows]
        yield pa.table({name: pa.array([row[name] for row in part], pa.string()) for name in columns})


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


def _messages(file: SourceFile, number: int, said: Any) -> str:
    if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
        raise DataError(f"{file.name} row {number} is no list of texts: {str(said)[:60]!r}")
    turns = [{"role": SPEAKERS[i % 2], "content": text} for i, text in enumerate(said)]
    return json.dumps(turns, ensure_ascii=False)
