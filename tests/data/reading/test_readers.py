"""Rows of files, and the place of what cannot be read."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.reading.readers import column_names, read_rows, read_tables
from lib.data.reading.sources import find_files
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
JSON_ARRAY = "[\n" + JSON_LINES.strip().replace("\n", ",\n ") + "]"


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
        ("a.json", JSON_ARRAY.encode()),
        ("a.json", b"\xef\xbb\xbf \n" + JSON_ARRAY.encode()),
        ("a.json.xz", lzma.compress(JSON_ARRAY.encode())),
        ("a.csv.bz2", bz2.compress(CSV.encode())),
        ("a.csv.xz", lzma.compress(CSV.encode())),
        ("a.csv.zst", pa.compress(CSV.encode(), "zstd", asbytes=True)),
        ("a.jsonl.zst", b"".join(pa.compress(part.encode(), "zstd", asbytes=True) for part in (JSON_LINES[:20], JSON_LINES[20:]))),
        ("a.jsonl.bz2", bz2.compress(JSON_LINES.encode())),
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
    with pytest.raises(
        DataError, match=r"a\.csv row 2, character 3 of 'text' \(0xef\) is not valid UTF-8; convert"
    ):
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
        ("a.jsonl", b'[\n{"text": "a"}\n]\n', r"line 1 begins JSON that goes on for lines.*one array of objects in a \.json"),
        ("a.json", b'{\n"text": "a"}\n', r"line 1 begins JSON that goes on for lines"),
        ("a.json", b'[{"text": "a"}, 7]', r"a\.json row 2 holds a number; give an array of objects"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', r"a\.json is damaged after row 1: parse error: premature EOF"),
        ("a.json", b'[{"text": "a"}, {"text": "\xff"}]', r"a\.json is damaged after row 1: lexical error: invalid bytes in UTF8"),
        ("a.csv", b"text,label\na, \xff,2,3\n", r"a\.csv row 1 has 4 columns where the header has 2"),
    ],
)  # fmt: skip
def test_damaged_text(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read(tmp_path / name)


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize(
    ("ending", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", lambda c: pa.compress(c, "zstd", asbytes=True))],
)  # fmt: skip
def test_broken_compression(tmp_path: Path, ending: str, compress: Any, damage: str) -> None:
    whole = bytearray(
        compress(json.dumps([{"text": hashlib.sha256(b"%d" % i).hexdigest()} for i in range(4000)]).encode())
    )
    if damage == "cut":
        del whole[len(whole) // 2 :]
    elif ending == "zst":  # Arrow writes it without a sum
        whole[:40] = whole[:4] + bytes(36)
    else:
        whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    path = tmp_path / f"a.json.{ending}"
    path.write_bytes(whole)
    with pytest.raises(DataError, match=rf"a\.json\.{ending} is damaged.*"):
        read(path, ["text"])


def test_damaged_files(tmp_path: Path) -> None:
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


def test_headers_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,caf\xe9\na,2\n")
    (file,) = find_files([str(tmp_path)])
    with pytest.raises(DataError, match=r"a\.csv: the header is not valid UTF-8 \('caf\ufffd'\)"):
        column_names(file)


def test_an_array_is_read_object_by_object(tmp_path: Path) -> None:
    """40 MB in memory that does not follow it."""
    objects = (json.dumps({"text": "x" * 1000, "label": i}) for i in range(40_000))
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + next(objects))
        file.writelines(f",{text}" for text in objects)
        file.write("]")
    (found,) = find_files([str(tmp_path)])
    tracemalloc.start()
    rows = sum(table.num_rows for table in read_tables(found, ["text", "label"], 500))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 40_000
    assert peak < 8 << 20


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_arrow_files_and_streams(tmp_path: Path, name: str, new: Any, compression: str | None) -> None:
    table = pa.table({"label": pa.array([1, 2, 3, 4]), **{"text": ROWS["text"]}, "more": [[1]] * 4})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(tmp_path / name, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=3)
    (file,) = find_files([str(tmp_path)])
    assert column_names(file) == ["label", "text", "more"]
    assert read(tmp_path / name, batch_rows=2) == ROWS
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"{name} is not readable Arrow IPC"):
        read(tmp_path / name)


TEXT = "One line\n\n  Two of one\nparagraph\r\n\n\n\nGröße\n"


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("auto", ["One line", "  Two of one", "paragraph", "Größe"]),
        ("text", ["One line", "  Two of one", "paragraph", "Größe"]),
        ("paragraphs", ["One line", "Two of one\nparagraph", "Größe"]),
        ("documents", [TEXT.strip()]),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_plain_text(tmp_path: Path, kind: str, texts: list[str], ending: str) -> None:
    path = tmp_path / "good" / f"a.txt{ending}"
    path.parent.mkdir()
    content = TEXT.encode().replace(b"\r\n", b"\n") if kind in ("paragraphs", "documents") else TEXT.encode()
    path.write_bytes(gzip.compress(content) if ending else content)
    (file,) = find_files([str(tmp_path)], kind)
    assert column_names(file) == ["text", "file", "folder"]
    found = pa.concat_tables(read_tables(file, ["text", "folder", "file"], 2)).to_pydict()
    assert found["text"] == [text.replace("\r", "") for text in texts]
    assert set(found["folder"]) == {"good"}
    assert set(found["file"]) == {f"a.txt{ending}"}


def test_text_without_line_ends_is_none(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "b.txt"):
        (tmp_path / name).write_bytes(b"short\n" + b"x" * (8 << 20) + b"yz\n")
    for name, kind in (("a.txt", "text"), ("a.jsonl", "jsonl"), ("b.txt", "paragraphs")):
        (file,) = find_files([str(tmp_path / name)], kind)
        if name == "a.jsonl":
            (tmp_path / name).write_bytes(b'{"text": "short"}\n' + b"x" * (9 << 20))
        with pytest.raises(DataError, match=r"line 2 is longer than 8 MiB"):
            list(read_tables(file, ["text"], 100))
    (file,) = find_files([str(tmp_path / "b.txt")], "documents")
    with pytest.raises(DataError, match=r"b\.txt is more than 8 MiB long"):
        list(read_tables(file, ["text"], 100))


def test_halves_of_characters_are_no_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one \\ud83d", "label": 1}\n{"text": "\\ud83d\\ude00", "label": 1}\n'
    )
    assert read(tmp_path / "a.jsonl")["text"] == ["one \ufffd", "😀"]


BAD = {
    "a.csv": b'text,label\ngood,1\na, b,2\nna\xefve,3\nfine,4\n"two\nlines",5\nx\nlast,6\n7,8,\xff\n',
    "a.jsonl": b'{"text": "good", "label": 1}\n\n{broken\n{"text": "\xff"}\n{"text": "fine", "label": 4}\n'
    b'{"text": "two\\nlines", "label": 5}\n[]\n{"text": "last", "label": 6}\n{"text": {}}\n',
    "a.json": b'[{"text": "good", "label": 1}, 2, "3", {"text": "fine", "label": 4},'
    b'{"text": "two\\nlines", "label": 5}, [], {"text": "last", "label": 6}, {"text": {}}]',
}


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
@pytest.mark.parametrize("name", BAD)
def test_bad_rows_lie_beside_the_others_which_keep_their_numbers(
    tmp_path: Path, name: str, batch_rows: int
) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    (file,) = find_files([str(tmp_path)])
    rows = list(read_rows(file, ["text", "label"], batch_rows, bad_rows=True))
    assert pa.concat_tables([r.table for r in rows])["text"].to_pylist() == [
        "good",
        "fine",
        "two\nlines",
        "last",
    ]
    assert [n for r in rows for n in r.numbers.tolist()] == [0, 3, 4, 6]
    bad = [b for r in rows for b in r.bad]
    assert [b.number for b in bad] == [1, 2, 5, 7]
    assert {b.reason for b in bad} <= {"wrong_columns", "not_utf8", "not_json", "wrong_value"}
    assert all(b.text for b in bad)
    with pytest.raises(DataError, match=r"(row|line) [23]"):
        read(tmp_path / name)


def test_bad_rows_of_parquet_text_and_words(tmp_path: Path) -> None:
    parquet_with_invalid_utf8(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_bytes(b"good\n\n\xff\nfine\n")
    (tmp_path / "c.conll").write_bytes(b"good O\n\nbad\nword O\n\n\xff O\nword O\n\nfine O\n")
    texts = []
    for name, column in (("a.parquet", "text"), ("b.txt", "text"), ("c.conll", "1")):
        (file,) = find_files([str(tmp_path / name)])
        rows = list(read_rows(file, [column], 100, bad_rows=True))
        texts.append(pa.concat_tables([r.table for r in rows])[column].to_pylist())
        assert [(b.number, b.reason) for r in rows for b in r.bad] == {
            "a.parquet": [(1, "not_utf8")],
            "b.txt": [(1, "not_utf8")],
            "c.conll": [(1, "wrong_columns"), (2, "not_utf8")],
        }[name]
    assert texts == [["fine"], ["good", "fine"], ['["good"]', '["fine"]']]


def test_an_unclosed_quote_stands_for_the_lines_that_it_swallows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\nfine,1\n"open,1\n' + b"x,1\n" * 20)
    (file,) = find_files([str(tmp_path)])
    rows = list(read_rows(file, ["text"], 100, bad_rows=True))
    assert [text for r in rows for text in r.table["text"].to_pylist()] == ["fine"]
    assert [(b.number, b.rows) for r in rows for b in r.bad] == [(1, 21)]


def test_what_lies_before_a_damage_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"}, {"text": ')
    (file,) = find_files([str(tmp_path)])
    read_before = read_rows(file, ["text"], 100, bad_rows=True)
    assert next(read_before).table["text"].to_pylist() == ["a", "b"]
    with pytest.raises(DataError, match="is damaged after row 2"):
        next(read_before)


@pytest.mark.parametrize("buffer", [1, 2, 3, 5, 7])
def test_characters_that_lie_across_reads(buffer: int) -> None:
    import io

    from lib.data.reading.csv_files import MARK, _Utf8

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(buffer)

    for content in ("aé€😀b" * 3, "", "é", "😀"):
        assert io.BufferedReader(_Utf8(Slow(content.encode()))).read().decode() == content
    broken = "é".encode()[:1] + b"a" + "😀".encode()[:3] + b"\xff\x80" + "€".encode() + "😀".encode()[:2]
    said = io.BufferedReader(_Utf8(Slow(broken))).read().decode()
    assert (
        re.sub(f"{MARK}([0-9a-f]{{2}})", lambda m: f"<{m[1]}>", said) == "<c3>a<f0><9f><98><ff><80>€<f0><9f>"
    )
