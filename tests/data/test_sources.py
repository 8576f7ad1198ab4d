"""URIs, globs and folders → files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.sources import check_columns, file_format, find_files
from lib.errors import ConfigError, DataError, StorageError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.csv", ("csv", False)),
        ("a.CSV.GZ", ("csv", True)),
        ("a.tsv", ("tsv", False)),
        ("2024.01.jsonl", ("jsonl", False)),
        ("a.ndjson.gz", ("jsonl", True)),
        ("a.snappy.parquet", ("parquet", False)),
        ("a.parquet.brotli", ("parquet", False)),
        ("a.xlsx", None),
        ("a.gz", None),
        ("csv", None),
    ],
)
def test_the_ending_names_the_format(name: str, expected: tuple[str, bool] | None) -> None:
    assert file_format(f"s3://bucket/x.csv.d/{name}") == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.csv", "a.csv", "deep/er/c.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text,label\ngood,1\n")
    (tmp_path / ".hidden.csv").write_text("no")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "readme.md").write_text("about these files")
    return tmp_path


def names(folder: Path, *sources: str) -> list[str]:
    return [Path(f.name).relative_to(folder).as_posix() for f in find_files(sources)]


def test_a_folder_is_read_in_depth_sorted_by_path(folder: Path) -> None:
    assert names(folder, str(folder)) == ["a.csv", "b.csv", "deep/er/c.csv"]


def test_globs_and_lists(folder: Path) -> None:
    assert names(folder, f"{folder}/*.csv") == ["a.csv", "b.csv"]
    assert names(folder, f"file://{folder}/**/c.csv", f"{folder}/a.csv") == ["deep/er/c.csv", "a.csv"]


def test_any_fsspec_uri(folder: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/whorl-sources/x.csv", b"text,label\ngood,1\n")
    try:
        (file,) = find_files(["memory://whorl-sources/*.csv"])
        assert (file.uri, file.format, file.size) == ("memory:///whorl-sources/x.csv", "csv", 18)
    finally:
        memory.rm("/whorl-sources", recursive=True)


def test_a_sample_keeps_its_name() -> None:
    (file,) = find_files(["sample://reviews"])
    assert (file.name, file.format) == ("sample://reviews", "parquet")


def test_what_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.cvs does not exist; did you mean 'a\.csv'\?"):
        find_files([f"{folder}/a.cvs"])
    with pytest.raises(ConfigError, match=r"no file matches .*x\*\.csv"):
        find_files([f"{folder}/x*.csv"])
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no files \(\.csv"):
        find_files([f"{folder}/empty"])
    with pytest.raises(StorageError, match="nosuch"):
        find_files(["nosuch://bucket/a.csv"])
    with pytest.raises(ConfigError, match="did you mean 'reviews'"):
        find_files(["sample://review"])


def test_an_unknown_ending(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot tell the format of .*readme\.md from its ending"):
        find_files([f"{folder}/readme.md"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.parquet", b"text,label\n", "should be Parquet but is not Parquet"),
        ("x.parquet", b"PK\x03\x04....", "should be Parquet but is a zip archive"),
        ("x.csv", b"PAR1....", "should be CSV but is Parquet"),
        ("x.csv", b"\x1f\x8b\x08", "should be CSV but is gzip"),
        ("x.csv", b"\xff\xfet\x00", "should be CSV but is UTF-16 text"),
        ("x.jsonl", b"\x00\x01\x02", "should be JSON Lines but is binary"),
        ("x.csv.gz", b"text,label\n", "should be gzip but is not gzip"),
        ("x.csv", b"", "is empty"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        find_files([str(tmp_path / name)])


def test_missing_columns_are_named_with_the_nearest(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Review Text": ["a"], "Rating": [1]}), tmp_path / "x.parquet")
    (file,) = find_files([str(tmp_path)])
    with pytest.raises(DataError) as caught:
        check_columns(
            file, {"columns.text": "review text", "columns.label": "Rating"}, ["Review Text", "Rating"]
        )
    assert str(caught.value) == (
        f"{tmp_path}/x.parquet has no column 'review text' (data.columns.text); did you mean 'Review Text'? "
        "(columns: 'Review Text', 'Rating')"
    )
