"""Storage: what is published appears whole or not at all, on a local disk and on an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib import storage as files
from lib.errors import StorageError


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "things") if request.param == "local" else f"memory://{tmp_path.name}/things"


def test_published_directory_is_whole_and_never_changes(place: str) -> None:
    with files.publish(place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("hello")
        assert not files.published(place)
    assert files.published(place)
    assert files.read_bytes(files.join(place, "sub", "a.txt")) == b"hello"
    with files.local_copy(place) as copy:
        assert (copy / "sub" / "a.txt").read_text() == "hello"
    with pytest.raises(StorageError, match="already published and never changes"), files.publish(place):
        pass


def test_crash_leaves_nothing(place: str) -> None:
    def crash() -> None:
        with files.publish(place) as folder:
            (folder / "a.txt").write_text("half")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert not files.exists(place)
    parent, name = place.rsplit("/", 1)
    assert [n for n in files.ls(parent) if name in n] == []


def test_remove_and_list(place: str) -> None:
    with files.publish(place) as folder:
        (folder / "b.txt").write_text("b")
        (folder / "a.txt").write_text("a")
    assert [n for n in files.ls(place) if n.endswith(".txt")] == ["a.txt", "b.txt"]
    files.remove(place)
    assert not files.exists(place)
    files.remove(place)
    assert files.ls(place) == []


def test_json_round_trip_and_errors(place: str) -> None:
    path = files.join(place, "x.json")
    files.write_json(path, {"ä": [1, 2.5, None]})
    assert files.read_json(path) == {"ä": [1, 2.5, None]}
    files.write_bytes(path, b"{")
    with pytest.raises(StorageError, match=r"x\.json is not valid JSON"):
        files.read_json(path)
    with pytest.raises(StorageError, match="does not exist"):
        files.read_json(files.join(place, "absent.json"))


def test_unknown_protocol_is_one_line() -> None:
    with pytest.raises(StorageError, match="cannot open 'nosuch://x'"):
        files.exists("nosuch://x")


def test_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(StorageError, match="cannot write under"),
        files.publish(str(tmp_path / "file" / "below")),
    ):
        pass


def test_checksum_follows_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("same")
    b.write_text("same")
    assert files.checksum(str(a)) == files.checksum(str(b))
    b.write_text("Same")
    assert files.checksum(str(a)) != files.checksum(str(b))


def test_fingerprint_ignores_the_order_of_keys() -> None:
    assert files.fingerprint({"a": 1, "b": [2]}) == files.fingerprint({"b": [2], "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": "1"})
    assert len(files.fingerprint({})) == 16


def test_root_follows_the_environment(storage: Path) -> None:
    assert files.root() == f"file://{storage}"


def test_workers_publish_under_one_uri(place: str) -> None:
    with files.publish_from_workers(place) as uri:
        with files.open_file(files.join(uri, "train", "a.txt"), "wb") as file:
            file.write(b"hello")
        assert not files.published(place)
    assert files.published(place)
    assert files.read_bytes(files.join(place, "train", "a.txt")) == b"hello"
    with pytest.raises(StorageError, match="already published"), files.publish_from_workers(place):
        pass


def test_crash_of_workers_leaves_nothing_and_the_next_run_starts_clean(place: str) -> None:
    def crash() -> None:
        with files.publish_from_workers(place) as uri:
            files.write_bytes(files.join(uri, "train", "half.txt"), b"half")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert not files.exists(place)
    # A killed run cleans nothing up: on an object store its files are still there.
    if place.startswith("memory"):
        files.write_bytes(files.join(place, "train", "half.txt"), b"half")
    with files.publish_from_workers(place) as uri:
        files.write_bytes(files.join(uri, "train", "whole.txt"), b"whole")
    assert files.ls(files.join(place, "train")) == ["whole.txt"]


def test_find_takes_files_globs_and_folders(place: str) -> None:
    for name in ("b.csv", "a.csv", "deep/c.csv", ".hidden.csv", "_SUCCESS", ".git/d.csv"):
        files.write_bytes(files.join(place, name), b"x,y\n")
    named = {uri.split("things/")[1]: uri for uri in files.find(place)}
    assert list(named) == ["a.csv", "b.csv", "deep/c.csv"]
    assert files.find(named["a.csv"]) == [named["a.csv"]]
    assert [u.split("things/")[1] for u in files.find(files.join(place, "*.csv"))] == ["a.csv", "b.csv"]
    assert files.find(files.join(place, "*.parquet")) == files.find(files.join(place, "absent")) == []
    assert files.size(named["a.csv"]) == 4
    with files.open_file(named["a.csv"]) as file:
        assert file.read() == b"x,y\n"
    with pytest.raises(StorageError, match="does not exist"), files.open_file(files.join(place, "absent")):
        pass


def test_no_message_shows_a_password() -> None:
    assert files.display("ftp://me:secret@host/a.csv") == "ftp://***@host/a.csv"
    assert files.display("file:///data/a.csv") == "/data/a.csv"
