"""Files that last: every path is an fsspec URI under one root, and what is published appears whole.

`WHORL_STORAGE` names the root (`file://…`, `s3://…`, `gs://…`, a plain path); the default is `.whorl`
in the project. A directory is published by writing it elsewhere and moving it into place. A local file
system renames, which is atomic. An object store has no rename, so there the marker file `_COMPLETE`
is written last, and `exists` asks for the marker: a reader never sees a half-written directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from lib.errors import StorageError

PROJECT = Path(__file__).resolve().parent.parent
COMPLETE = "_COMPLETE"
# Protocol → the extra of pyproject.toml whose packages read it.
EXTRAS = {"gs": "gcp", "gcs": "gcp", "az": "azure", "abfs": "azure", "abfss": "azure", "adl": "azure"}
HTTP = ("http", "https")
# Whose errors say that a place could not be reached while a file was read.
DRIVERS = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "azure")


def root() -> str:
    """The storage root as a URI without a trailing slash."""
    return uri(os.environ.get("WHORL_STORAGE") or str(PROJECT / ".whorl"))


def uri(path: str | Path) -> str:
    """`path` as an absolute URI: plain paths become `file://…`, URIs stay as they are.

    A file in an archive is `zip://INSIDE::URI`, whose last part is a path or URI of its own.
    """
    text = str(path)
    inside, chained, outside = text.rpartition("::")
    if chained and "://" in inside:
        return f"{inside}::{uri(outside)}"
    if "://" in text:
        return text.rstrip("/")
    return "file://" + str(Path(text).expanduser().absolute())


def display(path: str) -> str:
    """A URI as messages show it: without `file://`, without a password, and without what a web address may be signed with."""
    parts = [re.sub(r"://[^/@]+@", "://***@", part).removeprefix("file://") for part in path.split("::")]
    return "::".join(part if without_query(part) == part else f"{without_query(part)}?…" for part in parts)


def without_query(path: str) -> str:
    """A web address up to its `?`; any other URI as it is."""
    return path.partition("?")[0] if _protocol(path) in HTTP else path


def _protocol(path: str) -> str:
    return path.partition("://")[0] if "://" in path else "file"


def join(base: str, *parts: str) -> str:
    return "/".join([base.rstrip("/"), *(p.strip("/") for p in parts)])


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system for `path` and the path inside it.

    Raises StorageError when the protocol is unknown or its driver is not installed.
    """
    try:
        fs, inside = url_to_fs(uri(path))
    except ImportError as error:
        extra = EXTRAS.get(_protocol(path))
        mend = f"{_protocol(path)}:// needs pip install '.[{extra}]'" if extra else error
        raise StorageError(f"cannot open {display(path)!r}: {mend}") from error
    except Exception as error:  # an archive is opened at once, and a driver may raise what it likes
        raise StorageError(f"cannot open {display(path)!r}: {error}") from error
    return fs, str(inside)


def exists(path: str) -> bool:
    fs, inside = filesystem(path)
    return bool(_reach(path, fs.exists, inside))


def published(path: str) -> bool:
    """True when a directory was published here as a whole."""
    return exists(join(path, COMPLETE))


def ls(path: str) -> list[str]:
    """Names of the direct children of a directory, sorted; empty when it does not exist."""
    fs, inside = filesystem(path)
    if not _reach(path, fs.exists, inside):
        return []
    # A cached listing would hide what another process has just written.
    fs.invalidate_cache()
    entries = _reach(path, fs.ls, inside, detail=False)
    return sorted(str(e).rstrip("/").rsplit("/", 1)[-1] for e in entries)


def remove(path: str) -> None:
    """Delete a file or directory; nothing happens when it is not there."""
    fs, inside = filesystem(path)
    if not _reach(path, fs.exists, inside):
        return
    # The marker goes first, so that a reader never takes a half-deleted directory for a whole one.
    marker = f"{inside}/{COMPLETE}"
    if fs.exists(marker):
        fs.rm(marker)
    fs.rm(inside, recursive=True)


def find(pattern: str) -> list[str]:
    """URIs of the files that a glob matches, that lie below a directory at any depth, or of the file
    itself; sorted. Empty when nothing is there.

    As in a shell, a glob does not match hidden files; below a directory, those that begin with `_` are
    left out too: they are marks of other tools, not data."""
    fs, inside = filesystem(pattern)
    fs.invalidate_cache()
    web = _protocol(pattern) in HTTP
    # In a web address a question mark begins the query.
    if any(c in inside for c in ("*" if web else "*?[")):
        found = _reach(pattern, fs.glob, inside, detail=True)
        hidden = inside.rsplit("/", 1)[-1].startswith(".")
        paths = [
            p
            for p, entry in found.items()
            if entry["type"] == "file" and (hidden or not p.rsplit("/", 1)[-1].startswith("."))
        ]
    elif not web and _reach(
        pattern, fs.isdir, inside
    ):  # the web would be asked for all of a file to look for links
        below = _reach(pattern, fs.find, inside)
        skip = len(inside.rstrip("/")) + 1 if inside else 0
        paths = [p for p in below if not any(part.startswith((".", "_")) for part in p[skip:].split("/"))]
    else:
        paths = [inside] if _reach(pattern, fs.exists, inside) else []
    _, chained, outside = uri(pattern).partition("::")
    return sorted(f"{fs.unstrip_protocol(p)}{chained}{outside}" for p in paths)


def size(path: str) -> int:
    """Bytes of a file. Raises StorageError when it does not exist."""
    fs, inside = filesystem(path)
    return int(_reach(path, fs.size, inside) or 0)


@contextmanager
def open_file(path: str, mode: str = "rb", forward: bool = False) -> Iterator[Any]:
    """A binary file to read (`rb`) or to write (`wb`; its folder is made). Raises StorageError.

    With `forward` it is read from the beginning only, which every web server can do.
    """
    fs, inside = filesystem(path)
    if mode == "wb":
        _reach(path, fs.makedirs, inside.rsplit("/", 1)[0], exist_ok=True)
    options = {"block_size": 0} if forward and _protocol(path) in HTTP else {}
    with _reach(path, fs.open, inside, mode, **options) as file:
        try:
            yield file
        except Exception as error:
            if type(error).__module__.partition(".")[0] in DRIVERS:
                raise StorageError(f"cannot read {display(path)}: {type(error).__name__}: {error}") from error
            raise


def read_bytes(path: str) -> bytes:
    fs, inside = filesystem(path)
    return bytes(_reach(path, fs.cat_file, inside))


def write_bytes(path: str, content: bytes) -> None:
    """Write one file whole: readers see the old content or the new, never a part."""
    fs, inside = filesystem(path)
    parent = inside.rsplit("/", 1)[0]
    _reach(path, fs.makedirs, parent, exist_ok=True)
    if is_local(fs):
        scratch = f"{inside}.{uuid.uuid4().hex}.tmp"
        try:
            Path(scratch).write_bytes(content)
            os.replace(scratch, inside)
        except OSError as error:
            Path(scratch).unlink(missing_ok=True)
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    else:  # an object store's put is atomic
        _reach(path, fs.pipe_file, inside, content)


def read_json(path: str) -> Any:
    """Parse a JSON file. Raises StorageError when it is absent or not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise StorageError(f"{path} is not valid JSON: {error}") from error


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def publish(destination: str, replace: bool = False) -> Iterator[Path]:
    """Give a scratch directory; on a clean exit, make it appear whole at `destination`.

    On an exception nothing appears. Raises StorageError when `destination` is already published
    (datasets and model versions never change) or cannot be written. With `replace` what is there gives
    way at the very end: for a moment a reader finds nothing, but never a mixture.
    """
    fs, inside = filesystem(destination)
    if published(destination) and not replace:
        raise StorageError(f"{destination} is already published and never changes")
    with _scratch(fs, inside) as scratch:
        yield scratch
        (scratch / COMPLETE).touch()
        if replace:
            remove(destination)
        _move_into_place(fs, scratch, inside, destination)


@contextmanager
def publish_from_workers(destination: str) -> Iterator[str]:
    """Like `publish`, for work that is spread over machines: give a URI that each of them writes under.

    On a local or mounted file system it is a hidden sibling, renamed at the end. Elsewhere it is the
    destination itself, which no reader takes for whole before its marker is written, at the very end;
    on an exception what was written is removed, and so is what a killed run has left. Raises StorageError
    when `destination` is already published or cannot be written.
    """
    fs, inside = filesystem(destination)
    if is_local(fs):
        with publish(destination) as scratch:
            yield uri(scratch)
        return
    if published(destination):
        raise StorageError(f"{destination} is already published and never changes")
    remove(destination)
    try:
        yield destination
    except BaseException:
        with suppress(StorageError):
            remove(destination)
        raise
    _reach(destination, fs.pipe_file, f"{inside}/{COMPLETE}", b"")


@contextmanager
def _scratch(fs: fsspec.AbstractFileSystem, inside: str) -> Iterator[Path]:
    # Beside the destination on a local file system, so that the move is a rename.
    if is_local(fs):
        parent = Path(inside).parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write under {parent}: {error.strerror}") from error
        scratch = Path(tempfile.mkdtemp(prefix=f".{Path(inside).name}-", dir=parent))
        scratch.chmod(0o755)  # mkdtemp is private to one user; published files are not
    else:
        scratch = Path(tempfile.mkdtemp(prefix="whorl-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move_into_place(fs: fsspec.AbstractFileSystem, scratch: Path, inside: str, destination: str) -> None:
    if is_local(fs):
        try:
            scratch.rename(inside)
        except OSError as error:
            if published(destination):
                raise StorageError(f"{destination} was published by another process meanwhile") from error
            raise StorageError(
                f"cannot publish {destination}: {error.strerror or error}; remove what is there and run again"
            ) from error
        return
    for file in sorted(p for p in scratch.rglob("*") if p.is_file() and p.name != COMPLETE):
        _reach(destination, fs.put_file, str(file), f"{inside}/{file.relative_to(scratch).as_posix()}")
    _reach(destination, fs.pipe_file, f"{inside}/{COMPLETE}", b"")


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """A directory or file as a local path: itself when local, else a temporary download."""
    fs, inside = filesystem(path)
    if not _reach(path, fs.exists, inside):
        raise StorageError(f"{path} does not exist")
    if is_local(fs):
        yield Path(inside)
        return
    with tempfile.TemporaryDirectory(prefix="whorl-") as scratch:
        target = Path(scratch) / inside.rstrip("/").rsplit("/", 1)[-1]
        _reach(path, fs.get, inside, str(target), recursive=True)
        yield target


def checksum(path: str) -> str:
    """A digest that changes when the file's content does.

    Local files, what lies in an archive, and what a web server has no tag for are read (SHA-256). Elsewhere the
    store's own identity (ETag, generation, size) is taken, so that a large remote source is not downloaded only to be named.
    """
    fs, inside = filesystem(path)
    if _protocol(path) in HTTP:
        tag = _reach(path, fs.info, inside).get("ETag", "")
        if tag and not tag.startswith("W/"):
            return str(tag)
    elif not is_local(fs) and "::" not in path:
        return str(_reach(path, fs.checksum, inside))
    digest = hashlib.sha256()
    try:
        with open_file(path, forward=True) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise StorageError(f"cannot read {display(path)}: {error.strerror or error}") from error
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """16 hex digits that name a JSON value: equal values give equal names on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    protocol = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    return "file" in protocol


def _reach(path: str, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one file-system call; whatever a driver raises becomes one line that names the URI."""
    try:
        return call(*args, **kwargs)
    except FileNotFoundError as error:
        raise StorageError(f"{display(path)} does not exist") from error
    except PermissionError as error:
        raise StorageError(
            f"no permission for {display(path)}; check the credentials or the file mode"
        ) from error
    except Exception as error:
        raise StorageError(f"cannot reach {display(path)}: {type(error).__name__}: {error}") from error
