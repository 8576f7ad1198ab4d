"""URIs, globs and folders → files."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage as files
from lib.data.reading.readers import column_names, read_tables
from lib.data.reading.sources import SourceFile, check_columns, file_format, find_files
from lib.errors import ConfigError, DataError, StorageError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.csv", ("csv", None)),
        ("a.CSV.GZ", ("csv", "gzip")),
        ("a.tsv", ("tsv", None)),
        ("2024.01.jsonl", ("jsonl", None)),
        ("a.ndjson.gz", ("jsonl", "gzip")),
        ("a.snappy.parquet", ("parquet", None)),
        ("a.parquet.brotli", ("parquet", None)),
        ("a.json", ("json", None)),
        ("a.csv.bz2", ("csv", "bz2")),
        ("a.jsonl.XZ", ("jsonl", "xz")),
        ("a.txt.zst", ("text", "zstd")),
        ("a.feather", ("arrow", None)),
        ("a.arrow.gz", None),
        ("a.xlsx", None),
        ("a.gz", None),
        ("csv", None),
    ],
)
def test_the_ending_names_the_format(name: str, expected: tuple[str, str | None] | None) -> None:
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
        ("x.csv.bz2", b"\x1f\x8b\x08", "should be bzip2 but is gzip"),
        ("x.csv.xz", b"text,label\n", "should be xz but is not xz"),
        ("x.jsonl.zst", b"text,label\n", "should be Zstandard but is not Zstandard"),
        ("x.arrow", b"PAR1....", "should be Arrow IPC but is Parquet"),
        ("x.arrow", b"text", "should be Arrow IPC but is not Arrow IPC"),
        ("x.feather", b"FEA1....", "should be Arrow IPC but is Feather of version 1"),
        ("x.txt", b"\x00\x01", "should be plain text but is binary"),
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


def texts(file: SourceFile) -> list[str]:
    return [text for table in read_tables(file, ["text"], 100) for text in table["text"].to_pylist()]


def test_beside_data_plain_text_tells_about_it(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text("Do what you like")
    assert names(folder, str(folder)) == ["a.csv", "b.csv", "deep/er/c.csv"]
    assert names(folder, f"{folder}/LICENSE.txt") == ["LICENSE.txt"]
    assert names(folder, f"{folder}/*.txt") == ["LICENSE.txt"]


def test_files_in_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/b.csv", "text,label\nb,1\n")
        archive.writestr("in/a.jsonl", '{"text": "a", "label": 1}\n')
        archive.writestr("in/about.md", "about these files")
        archive.writestr("__MACOSX/in/._a.jsonl", "no")
        archive.writestr("c.csv", "text,label\nc,1\n")
    for source, expected in (
        (f"{tmp_path}/all.zip", ["c", "a", "b"]),
        (f"zip://in/*.csv::{tmp_path}/all.zip", ["b"]),
        (f"zip://in::file://{tmp_path}/all.zip", ["a", "b"]),
        (f"zip://c.csv::{tmp_path}/all.zip", ["c"]),
    ):
        found = find_files([source])
        assert [text for file in found for text in texts(file)] == expected
    (file,) = find_files([f"zip://in/*.csv::{tmp_path}/all.zip"])
    assert file.uri == f"zip://in/b.csv::file://{tmp_path}/all.zip"
    assert file.name == f"zip://in/b.csv::{tmp_path}/all.zip"
    (tmp_path / "b.csv").write_text("text,label\nb,1\n")
    assert files.checksum(file.uri) == files.checksum(str(tmp_path / "b.csv"))
    with pytest.raises(ConfigError, match=r"no file matches zip://\*\.tsv::.*all\.zip"):
        find_files([f"zip://*.tsv::{tmp_path}/all.zip"])
    (tmp_path / "no.zip").write_text("text")
    with pytest.raises(StorageError, match=r"cannot open .*no\.zip.*not a zip file"):
        find_files([f"{tmp_path}/no.zip"])
    with pytest.raises((ConfigError, StorageError), match=r"not\.zip"):
        find_files([f"{tmp_path}/not.zip"])


def save(folder: Path, rows: list[str], shards: int = 2, info: bool = True) -> None:
    """What `datasets.Dataset.save_to_disk` leaves, and a cache of a map over it."""
    folder.mkdir(parents=True)
    schema = pa.schema(
        [("text", pa.string()), ("label", pa.int64())],
        metadata={
            "huggingface": json.dumps({"info": {"features": {"text": {"dtype": "string", "_type": "Value"}}}})
        },
    )
    written = []
    for shard in range(shards):
        written.append({"filename": f"data-{shard:05d}-of-{shards:05d}.arrow"})
        some = rows[shard::shards]
        with pa.ipc.new_stream(folder / written[-1]["filename"], schema) as writer:
            writer.write_table(pa.table({"text": some, "label": [1] * len(some)}, schema=schema))
    with pa.ipc.new_stream(folder / "cache-0123.arrow", schema) as writer:
        writer.write_table(pa.table({"text": ["cached"], "label": [1]}, schema=schema))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": written, "_fingerprint": "x", "_split": "train"})
    )
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def test_what_datasets_has_saved(tmp_path: Path) -> None:
    save(tmp_path / "one", ["a", "b", "c"])
    found = find_files([f"{tmp_path}/one"])
    assert [file.format for file in found] == ["arrow", "arrow"]
    assert column_names(found[0]) == ["text", "label"]
    assert [text for file in found for text in texts(file)] == ["a", "c", "b"]
    save(tmp_path / "all" / "train", ["d"], shards=1)
    save(tmp_path / "all" / "test", ["e"], shards=1)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError) as caught:
        find_files([f"{tmp_path}/all"])
    assert str(caught.value) == (
        f"data.source: {tmp_path}/all holds several splits (train, test), saved by datasets; name the folder of one, such as "
        f"{tmp_path}/all/train, and those of others as data.validation_source and data.test_source"
    )
    (file,) = find_files([f"{tmp_path}/all/test"], split="test")
    assert (texts(file), file.split) == (["e"], "test")


class Site(http.server.SimpleHTTPRequestHandler):
    """A folder by HTTP; `whole` does without tags and ranges."""

    whole = False

    def do_GET(self) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if self.whole or not last:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        if not self.whole and Path(self.translate_path(self.path)).is_file():
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_header("ETag", f'"{hash(content)}"')
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("whole", [True, False])
def test_files_of_the_web(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    monkeypatch.setattr(Site, "whole", whole)
    (tmp_path / "a.csv").write_text("text,label\n" + "good,1\n" * 1_000_000)
    (file,) = find_files([f"{site}/a.csv?Signature=secret&x=[1]"])
    assert file.name == f"{site}/a.csv?…"
    assert file.format == "csv"
    assert file.size == 11 + 7_000_000
    assert texts(file) == ["good"] * 1_000_000
    before = files.checksum(file.uri)
    assert files.checksum(f"{site}/a.csv") == before
    (tmp_path / "a.csv").write_text("text,label\n" + "evil,1\n" * 1_000_000)
    assert files.checksum(file.uri) != before
    with pytest.raises(ConfigError, match=r"data\.source: http.*/b\.csv does not exist"):
        find_files([f"{site}/b.csv"])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("c.csv", "text,label\nc,1\n")
    pq.write_table(pa.table({"text": ["p"], "label": [1]}), tmp_path / "a.parquet")
    if whole:
        with pytest.raises(
            StorageError, match=r"cannot open 'zip://::http.*all\.zip\?…'.*support range requests"
        ):
            find_files([f"{site}/all.zip?Signature=secret"])
    else:
        found = find_files([f"{site}/all.zip?Signature=secret", f"{site}/a.parquet"])
        assert [text for file in found for text in texts(file)] == ["c", "p"]
        assert "secret" not in found[0].name


def test_objects_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        bucket = boto3.client("s3", "us-east-1")
        bucket.create_bucket(Bucket="whorl")
        rows = "".join(json.dumps({"text": f"row {i}", "label": 1}) + "\n" for i in range(20_000))
        bucket.put_object(Bucket="whorl", Key="data/a.jsonl", Body=rows.encode())
        bucket.put_object(
            Bucket="whorl",
            Key="data/deep/b.csv.zst",
            Body=pa.compress(b"text,label\nb,1\n", "zstd", asbytes=True),
        )
        bucket.put_object(Bucket="whorl", Key="data/_SUCCESS", Body=b"")
        first, second = find_files(["s3://whorl/data"])
        assert (first.name, first.size) == ("s3://whorl/data/a.jsonl", len(rows))
        assert texts(first) == [f"row {i}" for i in range(20_000)]
        assert texts(second) == ["b"]
        assert [file.uri for file in find_files(["s3://whorl/**/*.zst"])] == [second.uri]
        before = files.checksum(first.uri)
        bucket.put_object(Bucket="whorl", Key="data/a.jsonl", Body=rows.upper().encode())
        find_files(["s3://whorl/data"])
        assert files.checksum(first.uri) != before
        with pytest.raises(ConfigError, match=r"s3://whorl/date does not exist; did you mean 'data'"):
            find_files(["s3://whorl/date"])
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("uri", "driver", "extra"),
    [("az://box/a.csv", "adlfs", "azure"), ("gs://bucket/a.csv", "gcsfs", "gcp")],
)
def test_a_driver_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, uri: str, driver: str, extra: str
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == driver]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, driver, None)  # as if it were not there
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    with pytest.raises(StorageError) as caught:
        find_files([uri])
    scheme = uri.partition(":")[0]
    assert str(caught.value) == f"cannot open '{uri}': {scheme}:// needs pip install '.[{extra}]'"
