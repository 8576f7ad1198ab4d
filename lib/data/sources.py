"""Which files a source is: URIs, folders and globs → files whose format is known and checked.

The ending names the format; the first bytes must agree with it, and the columns that the configuration
names must be there. All of this is looked at before Ray starts, so that a wrong path or column name
answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from lib import storage
from lib.data import preferences
from lib.errors import ConfigError, DataError, nearest
from lib.samples import is_sample, sample_path

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".conll": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".yml": "chatterbot",
    ".yaml": "chatterbot",
}
FORMAT_NAMES = {
    "csv": "CSV",
    "tsv": "tab-separated text",
    "jsonl": "JSON Lines",
    "parquet": "Parquet",
    "conll": "CoNLL columns",
    "chatterbot": "a ChatterBot corpus",
}
# What a file with a wrong ending most often is.
MAGIC = {
    b"PAR1": "Parquet",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"ARROW1": "Arrow IPC",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    uri: str
    format: str
    """csv, tsv, jsonl, parquet, conll or chatterbot."""
    gzip: bool
    size: int
    """Bytes."""
    name: str
    """As messages and manifests show it: `sample://NAME`, or the URI without `file://` and passwords."""
    split: str | None = None
    """The split that all its rows belong to; None where they are divided among the splits."""


def display(uri: str) -> str:
    return re.sub(r"://[^/@]+@", "://***@", uri).removeprefix("file://")


def find_files(
    sources: Sequence[str], kind: str = "auto", split: str | None = None, key: str = "data.source"
) -> list[SourceFile]:
    """The files of all sources: sources in the given order, the files of each sorted by path.

    `kind` is the format of all files, or `auto` to go by their endings; `split` is where their rows belong;
    `key` of the configuration named them.

    Raises ConfigError for a source that names nothing or an ending that names no format, DataError for a
    file that is not what its ending says, StorageError for a URI that cannot be reached.
    """
    files = [file for source in sources for file in _files_of(source, kind, split, key)]
    for file in files:
        _check_content(file)
    return files


def _files_of(source: str, kind: str, split: str | None, key: str) -> list[SourceFile]:
    if preferences.is_made(source):
        source_uri = preferences.made(source)
    else:
        source_uri = str(sample_path(source, "data")) if is_sample(source) else source
    uris = storage.find(source_uri)
    if not uris:
        raise ConfigError(f"{key}: {_why_nothing(source)}")
    if kind == "auto":
        known = [(uri, found) for uri in uris if (found := file_format(uri))]
    else:
        known = [(uri, (kind, kind != "parquet" and uri.lower().endswith(".gz"))) for uri in uris]
    if not known:
        raise ConfigError(
            f"{key}: cannot tell the format of {display(uris[0])} from its ending; "
            f"known are {', '.join(ENDINGS)}, and .gz after the ending of a text file; or set data.format"
        )
    names = [source if is_sample(source) and len(known) == 1 else display(uri) for uri, _ in known]
    return [
        SourceFile(uri, *found, storage.size(uri), name, split)
        for (uri, found), name in zip(known, names, strict=True)
    ]


def file_format(uri: str) -> tuple[str, bool] | None:
    """Format and whether it is gzipped, from the name; None when the name does not tell."""
    suffixes = [s.lower() for s in PurePosixPath(uri.split("?")[0]).suffixes]
    # Parquet compresses inside; what writers add to the name (.parquet.brotli, .snappy.parquet) is only a hint.
    if ".parquet" in suffixes:
        return "parquet", False
    gzip = suffixes[-1:] == [".gz"]
    ending = suffixes[-2:-1] if gzip else suffixes[-1:]
    name = ENDINGS.get(ending[0]) if ending else None
    return (name, gzip) if name else None


def _why_nothing(source: str) -> str:
    shown = display(storage.uri(source))
    if any(c in source for c in "*?["):
        return f"no file matches {shown}"
    if storage.exists(source):
        return f"{shown} holds no files ({', '.join(ENDINGS)} are looked for)"
    parent, _, name = storage.uri(source).rpartition("/")
    return f"{shown} does not exist{nearest(name, storage.ls(parent))}"


def _check_content(file: SourceFile) -> None:
    with storage.open_file(file.uri) as stream:
        start = stream.read(4096)
    if not start:
        raise DataError(f"{file.name} is empty (0 bytes)")
    found = next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)
    expected = "gzip" if file.gzip else FORMAT_NAMES[file.format]
    if found == expected:
        return
    if found is None and (file.gzip or file.format == "parquet"):
        found = f"not {expected}"
    elif found is None and b"\0" in start:
        found = "binary"
    if found:
        raise DataError(
            f"{file.name} is not what its ending says: it should be {expected} but is {found}; rename or convert it"
        )


def check_columns(file: SourceFile, wanted: dict[str, str], present: Sequence[str]) -> None:
    """Raise DataError when a column of `wanted` (configuration key → column) is not in the file."""
    for key, column in wanted.items():
        if column not in present:
            listed = ", ".join(repr(c) for c in list(present)[:20]) + (", …" if len(present) > 20 else "")
            raise DataError(
                f"{file.name} has no column {column!r} (data.{key}){nearest(column, present)} (columns: {listed})"
            )
