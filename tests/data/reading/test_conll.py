"""CoNLL columns: sentences, columns by place, and the line of whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.data.reading.readers import column_names, read_tables
from lib.data.reading.sources import SourceFile, find_files
from lib.errors import DataError

TEXT = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O

# a comment, as CoNLL-U has them
Peter NNP I-NP I-PER
"""


def source(tmp_path: Path, text: str | bytes, name: str = "a.conll") -> SourceFile:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    (file,) = find_files([str(path)], "conll")
    return file


def test_sentences_are_rows_and_columns_go_by_place(tmp_path: Path) -> None:
    file = source(tmp_path, TEXT)
    assert column_names(file) == ["1", "2", "3", "4", "last"]
    tables = list(read_tables(file, ["1", "last"], 1))
    assert [t.num_rows for t in tables] == [1, 1]
    rows = [[json.loads(value) for value in row.values()] for t in tables for row in t.to_pylist()]
    assert rows == [[["EU", "rejects"], ["I-ORG", "O"]], [["Peter"], ["I-PER"]]]


def test_the_format_is_known_by_ending_or_told(tmp_path: Path) -> None:
    source(tmp_path, TEXT, "eng.train")
    (by_ending,) = find_files([str(source(tmp_path, TEXT).uri)])
    assert by_ending.format == "conll"


def test_windows_line_ends_tabs_and_no_last_empty_line(tmp_path: Path) -> None:
    file = source(tmp_path, b"\xef\xbb\xbfNew York\tB-LOC\r\nis\tO\r\n\r\n\r\nhere\tO")
    (table,) = read_tables(file, ["1", "2"], 10)
    assert [json.loads(v) for v in table["1"].to_pylist()] == [["New York", "is"], ["here"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("EU NNP O\nrejects O\n", "line 2 has 2 columns where the first word has 3"),
        (b"EU O\n\xff O\n", r"line 2, byte 1 \(0xff\) is not valid UTF-8"),
        ("-DOCSTART- -X-\n\n", "holds no words"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str | bytes, said: str) -> None:
    file = source(tmp_path, text)
    with pytest.raises(DataError, match=said):
        [column_names(file), *read_tables(file, ["1"], 10)]
