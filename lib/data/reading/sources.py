"""Which files a source is: URIs, folders and globs → files whose format is known and checked.

The ending names the format; the first bytes must agree with it, and the columns that the configuration
names must be there. All of this is looked at before Ray starts, so that a wrong path or column name
answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from lib import storage
from lib.data.reading import preferences, queries
from lib.errors import ConfigError, DataError, nearest
from lib.samples import is_sample, sample_path

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".conll": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".txt": "text",
    ".yml": "chatterbot",
    ".yaml": "chatterbot",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
FORMAT_NAMES = {
    "csv": "CSV",
    "tsv": "tab-separated text",
    "json": "JSON",
    "jsonl": "JSON Lines",
    "parquet": "Parquet",
    "arrow": "Arrow IPC",
    "conll": "CoNLL columns",
    "text": "plain text",
    "paragraphs": "plain text",
    "documents": "plain text",
    "chatterbot": "a ChatterBot corpus",
}
COMPRESSION_NAMES = {"gzip": "gzip", "bz2": "bzip2", "xz": "xz", "zstd": "Zstandard"}
# These compress inside, and need to be read from several places.
BINARY = ("parquet", "arrow")
# What a file with a wrong ending most often is.
MAGIC = {
    b"PAR1": "Parquet",
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"ARROW1": "Arrow IPC",
    b"\xff\xff\xff\xff": "Arrow IPC",  # as a stream
    b"FEA1": "Feather of version 1",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
ZIP = ".zip"
# What `datasets` writes beside the files of a dataset that it saves, and over those of several splits.
SAVED, SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    uri: str
    format: str
    """One of FORMAT_NAMES."""
    compression: str | None
    """gzip, bz2, xz or zstd."""
    size: int
    """Bytes; 0 where a server does not tell."""
    name: str
    """As messages and manifests show it: `sample://NAME`, or the URI without `file://` and passwords."""
    split: str | None = None
    """The split that all its rows belong to; None where they are divided among the splits."""
    columns: tuple[str, ...] | None = None
    """Of what a query gave: known already, as is `checksum`."""
    checksum: str | None = None
    source: int = 0
    """Number of its source among all of the configuration."""


def find_files(
    sources: Sequence[str],
    kind: str = "auto",
    split: str | None = None,
    key: str = "data.source",
    query: str | None = None,
    fresh: bool = True,
) -> list[SourceFile]:
    """The files of all sources: sources in the given order, the files of each sorted by path.

    `kind` is the format of all files, or `auto` to go by their endings; `split` is where their rows belong;
    `key` of the configuration named them; `query` is what a database among them is asked, anew if `fresh`.

    Raises ConfigError for a source that names nothing or an ending that names no format, DataError for a
    file that is not what its ending says, StorageError for a URI that cannot be reached.
    """
    files: list[SourceFile] = []
    for source in sources:
        if queries.is_database(source):
            files.append(_asked(source, query, split, key, fresh))
            continue
        found = _files_of(source, kind, split, key)
        for file in found:
            _check_content(file)
        files += found
    return files


def _asked(source: str, query: str | None, split: str | None, key: str, fresh: bool) -> SourceFile:
    rows = queries.snapshot(source, query, key, fresh)
    columns = tuple(rows.columns)
    return SourceFile(rows.uri, "parquet", None, rows.size, rows.shown, split, columns, rows.content)


def _files_of(source: str, kind: str, split: str | None, key: str) -> list[SourceFile]:
    if preferences.is_made(source):
        source_uri = preferences.made(source)
    else:
        source_uri = str(sample_path(source, "data")) if is_sample(source) else source
    uris = _found(source_uri, key)
    if not uris:
        raise ConfigError(f"{key}: {_why_nothing(source)}")
    if kind == "auto":
        known = [(uri, found) for uri in uris if (found := file_format(uri))]
        # Beside data a text tells about it, or whose it is.
        if len(uris) > 1 and any(name != "text" for _, (name, _) in known):
            known = [(uri, found) for uri, found in known if found[0] != "text"]
    else:
        known = [(uri, (kind, None if kind in BINARY else _compression(uri))) for uri in uris]
    if not known:
        raise ConfigError(
            f"{key}: cannot tell the format of {storage.display(uris[0])} from its ending; "
            f"known are {', '.join(ENDINGS)}, and {', '.join(COMPRESSIONS)} after the ending of a text file; "
            f"or set {key.partition('.')[0]}.format"
        )
    names = [source if is_sample(source) and len(known) == 1 else storage.display(uri) for uri, _ in known]
    return [
        SourceFile(uri, *found, storage.size(uri), name, split)
        for (uri, found), name in zip(known, names, strict=True)
    ]


def _found(source: str, key: str) -> list[str]:
    """The files that a source names: of an archive those in it, of what `datasets` has saved those with its rows."""
    if storage.without_query(source).lower().endswith(ZIP) and "::" not in source:
        source = f"zip://::{storage.uri(source)}"
    uris = storage.find(source)
    folders: dict[str, set[str]] = {}
    for uri in uris:
        folder, _, name = uri.partition("::")[0].rpartition("/")
        folders.setdefault(folder, set()).add(name)
    if any(SAVED_SPLITS in names for names in folders.values()):
        splits = storage.read_json(next(uri for uri in uris if SAVED_SPLITS in uri))["splits"]
        shown = storage.display(storage.uri(source))
        raise ConfigError(
            f"{key}: {shown} holds several splits ({', '.join(splits)}), saved by datasets; name the folder of one, such as "
            f"{shown}/{splits[0]}, and those of others as data.validation_source and data.test_source"
        )
    saved = [folder for folder, names in folders.items() if names.issuperset(SAVED)]
    for folder in saved:
        state = storage.read_json(next(uri for uri in uris if uri.startswith(f"{folder}/{SAVED[0]}")))
        data = {f"{folder}/{file['filename']}" for file in state["_data_files"]}
        uris = [
            uri
            for uri in uris
            if uri.partition("::")[0] in data or uri.partition("::")[0].rpartition("/")[0] != folder
        ]
    return uris


def file_format(uri: str) -> tuple[str, str | None] | None:
    """Format and compression, from the name; None when the name does not tell."""
    suffixes = _suffixes(uri)
    # Parquet compresses inside; what writers add to the name (.parquet.brotli, .snappy.parquet) is only a hint.
    if ".parquet" in suffixes:
        return "parquet", None
    compression = _compression(uri)
    ending = suffixes[-2:-1] if compression else suffixes[-1:]
    name = ENDINGS.get(ending[0]) if ending else None
    return (name, compression) if name and not (compression and name in BINARY) else None


def _compression(uri: str) -> str | None:
    return COMPRESSIONS.get("".join(_suffixes(uri)[-1:]))


def _suffixes(uri: str) -> list[str]:
    name = PurePosixPath(storage.without_query(uri.partition("::")[0]))
    return [suffix.lower() for suffix in name.suffixes]


def _why_nothing(source: str) -> str:
    shown = storage.display(storage.uri(source))
    if any(c in source for c in "*?["):
        return f"no file matches {shown}"
    if storage.exists(source):
        return f"{shown} holds no files ({', '.join(ENDINGS)} are looked for)"
    parent, _, name = storage.uri(source).rpartition("/")
    return f"{shown} does not exist{nearest(name, storage.ls(parent))}"


def _check_content(file: SourceFile) -> None:
    with storage.open_file(file.uri, forward=True) as stream:
        start = stream.read(4096)
    if not start:
        raise DataError(f"{file.name} is empty (0 bytes)")
    found = next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)
    expected = COMPRESSION_NAMES[file.compression] if file.compression else FORMAT_NAMES[file.format]
    if found == expected:
        return
    if found is None and (file.compression or file.format in BINARY):
        found = f"not {expected}"
    elif found is None and b"\0" in start:
        found = "binary"
    if found:
        raise DataError(
            f"{file.name} is not what its ending says: it should be {expected} but is {found}; rename or convert it"
        )


def check_columns(
    file: SourceFile, wanted: dict[str, str], present: Sequence[str], section: str = "data"
) -> None:
    """Raise DataError when a column of `wanted` (configuration key → column) is not in the file."""
    for key, column in wanted.items():
        if column not in present:
            listed = ", ".join(repr(c) for c in list(present)[:20]) + (", …" if len(present) > 20 else "")
            raise DataError(
                f"{file.name} has no column {column!r} ({section}.{key}){nearest(column, present)} (columns: {listed})"
            )
