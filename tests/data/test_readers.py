"""Rows of files, and the place of what cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.readers import column_names, read_tables
from lib.data.sources import find_files
from lib.errors import DataError


def read(path: Path, columns: list[str] | None = None, batch_rows: int = 1000) -> dict[str, list[Any]]:
    (file,) = find_files([str(path)])
    tables = list(read_tables(file, columns or ["text", "label"], batch_rows))
    return pa.concat_tables(tables).to_pydict() if tables else {}


ROWS = {"text": ['He said "no", twice', "two\nlines", "Größe 😀", ""], "label": ["1", "2", "3", "4"]}
CSV = 'other,label,text\nx,1,"He said ""no"", twice"\nx,2,"two\nlines"\nx,3,Größe 😀\nx,4,\n'
JSON_LINES = "".join(
    json.dumps({"text": t, "label": int(n), "other": [1]}) + "\n" for t, n in zip(*ROWS.values(), strict=True)
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV.encode()),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv", CSV.replace("\n", "\r\n").replace("two\r\n", "two\n").encode()),
        ("a.csv.gz", gzip.compress(CSV.encode())),
        ("a.tsv", CSV.replace("other,label,text", "other\tlabel\ttext").replace("x,", "x\t").replace(",\"", "\t\"")
         .replace("3,G", "3\tG").replace("4,", "4\t").encode()),
        ("a.jsonl", JSON_LINES.encode()),
        ("a.ndjson", b"\xef\xbb\xbf\n" + JSON_LINES.replace("\n", "\n\n").encode()),
        ("a.json.gz", gzip.compress(JSON_LINES.encode())),
    ],
)  # fmt: skip
def test_text_formats_give_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (file,) = find_files([str(tmp_path)])
    assert set(column_names(file)) == {"text", "label", "other"}
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([1, 2, None], pa.int64()), ["1", "2", None]),
        (pa.array([1.0, float("nan"), 2.5]), ["1", None, "2.5"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array(["a", None, "b"], pa.large_string()), ["a", None, "b"]),
    ],
)
def test_parquet_types_become_text(tmp_path: Path, labels: pa.Array, expected: list[str | None]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y", "z"], "label": labels}), path, row_group_size=2)
    assert read(path) == {"text": ["x", "y", "z"], "label": expected}


def test_batches_are_small(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(1000)], "label": [1] * 1000}), path)
    (file,) = find_files([str(path)])
    sizes = [t.num_rows for t in read_tables(file, ["text", "label"], 300)]
    assert max(sizes) <= 300
    assert sum(sizes) == 1000


def parquet_with_invalid_utf8(path: Path) -> None:
    values = pa.array([b"fine", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, values.buffers())
    pq.write_table(pa.table({"text": text, "label": ["1", "2"]}), path)


def test_invalid_utf8_is_placed(tmp_path: Path) -> None:
    parquet_with_invalid_utf8(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 2, byte 4 \(0xe9\) is not valid UTF-8"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_bytes(b"text,label\nfine,1\nna\xefve,2\n")
    with pytest.raises(DataError, match=r"a\.csv line 3, byte 3 \(0xef\) is not valid UTF-8; convert"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine", "label": 1}\n{"text": "\xff", "label": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2, byte 11 \(0xff\) is not valid UTF-8"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"text,label\ngood,1\na, b,2\n", r"a\.csv row 2 has 3 columns where the header has 2"),
        ("a.csv", b"text,label\n\"open,1\n" + b"x,1\n" * 1000, r"row 1 has 1 columns.*look for a quote that is not closed"),
        ("a.csv", b"text,label\n\"open,1\n" + b"x,1\n" * 7_000_000, r"more than 8 MiB; look for a quote that is not closed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', r"a\.jsonl line 2 holds a list; JSON Lines has one object a line"),
        ("a.jsonl", b'{"text": {"en": "a"}}\n', r"row 1: 'text' holds an object"),
        ("a.json", b'[{"text": "a"}]\n', r"line 1 holds a list"),
        ("a.json", b'[\n{"text": "a"}\n]\n', r"is JSON, but not JSON Lines"),
    ],
)  # fmt: skip
def test_damaged_text(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read(tmp_path / name)


def test_damaged_files(tmp_path: Path) -> None:
    whole = gzip.compress(CSV.encode() * 500)
    (tmp_path / "a.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.csv\.gz is damaged.*fetch it again"):
        read(tmp_path / "a.csv.gz")
    pq.write_table(pa.table({"text": ["a"] * 100, "label": [1] * 100}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet is not readable Parquet"):
        read(tmp_path / "cut.parquet")


def test_columns_of_the_wrong_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [["a"], ["b"]], "label": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'text' holds list<"):
        read(tmp_path / "a.parquet")


def test_a_json_key_that_only_some_rows_have(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"label": 1}\n{"text": "b", "label": null}\n{"text": "c", "label": true}\n'
    )
    (file,) = find_files([str(tmp_path)])
    assert column_names(file) == ["label", "text"]
    assert read(tmp_path / "a.jsonl") == {"text": [None, "b", "c"], "label": ["1", None, "true"]}
