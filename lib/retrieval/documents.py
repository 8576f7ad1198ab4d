"""Documents of a knowledge base: which files there are, and each file as a title and blocks of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from urllib.parse import unquote

import pyarrow as pa

from lib import storage, text
from lib.errors import ConfigError, DataError, nearest

KINDS = {
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".txt": "text",
    ".text": "text",
    ".pdf": "pdf",
}
# A document is held whole while it is read.
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class DocumentFile:
    """One file of a source."""

    uri: str
    kind: str
    """markdown, html, text or pdf."""
    source: str
    """Its path below the source, behind `knowledge.base_url`: what a reader of a citation may see."""

    @property
    def name(self) -> str:
        """As messages show it."""
        return storage.display(self.uri)

    @property
    def stem(self) -> str:
        """The file's name as a title of last resort."""
        return unquote(PurePosixPath(self.uri).stem).replace("-", " ").replace("_", " ").strip()


@dataclass(frozen=True)
class Block:
    """A paragraph, a list's item, a table's row."""

    text: str
    headings: tuple[str, ...]
    """Those above it, from the outermost on, without the document's title."""
    place: str
    """`page 3` in a PDF, `paragraph 12` elsewhere."""


@dataclass(frozen=True)
class Document:
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Found:
    """The files of all sources, each once, in the order of sources and paths."""

    files: list[DocumentFile]
    others: Counter[str]
    """Ending → files that are left out since it names no kind of document."""


Redact = Callable[[list[str]], tuple[list[str], dict[str, int]]]
"""Texts of one document → the same without personal data, and kind → values that were found."""


def without_personal_data(document: Document, redact: Redact) -> tuple[Document, dict[str, int]]:
    headings = list(dict.fromkeys(heading for block in document.blocks for heading in block.headings))
    (title, *said), counts = redact([document.title, *headings, *(block.text for block in document.blocks)])
    shown = dict(zip(headings, said, strict=False))
    blocks = [
        replace(block, text=text, headings=tuple(shown[heading] for heading in block.headings))
        for block, text in zip(document.blocks, said[len(headings) :], strict=True)
    ]
    return Document(title, blocks), counts


def find_documents(sources: Sequence[str], base_url: str | None = None) -> Found:
    """Raises ConfigError for a source that names no document, StorageError for one that cannot be reached."""
    files: dict[str, DocumentFile] = {}
    others: Counter[str] = Counter()
    for source in sources:
        uris, below = storage.find(source), _folder(source)
        known = [uri for uri in uris if _ending(uri) in KINDS]
        if not known:
            raise ConfigError(f"knowledge.source: {_why_nothing(source, uris)}")
        others.update(_ending(uri) or "no ending" for uri in uris if _ending(uri) not in KINDS)
        for uri in known:
            path = uri.removeprefix(below).lstrip("/") if uri.startswith(below) else uri.rpartition("/")[2]
            shown = storage.join(base_url, path) if base_url else path
            files.setdefault(uri, DocumentFile(uri, KINDS[_ending(uri)], shown))
    return Found(list(files.values()), others)


def read_document(file: DocumentFile) -> Document:
    """Title and text of one file. Raises DataError or StorageError, in one line that names it."""
    if storage.size(file.uri) > MAX_BYTES:
        raise DataError(f"{file.name} is larger than {MAX_BYTES >> 20} MiB; divide it")
    content = storage.read_bytes(file.uri)
    match file.kind:
        case "pdf":
            from lib.retrieval import pdf

            title, blocks = pdf.read(file.name, content)
        case "html":
            from lib.retrieval import markup

            title, blocks = markup.read_html(file.name, content)
        case "markdown":
            from lib.retrieval import markup

            title, blocks = markup.read_markdown(decoded(file.name, content))
        case _:
            title, blocks = None, plain(decoded(file.name, content))
    texts = text.normalise(pa.array([title or file.stem, *(block.text for block in blocks)], pa.string()))
    title, *bodies = texts.to_pylist()
    kept = [
        Block(body, block.headings, block.place) for body, block in zip(bodies, blocks, strict=True) if body
    ]
    if not kept:
        why = "; a scanned page needs its text recognised first" if file.kind == "pdf" else ""
        raise DataError(f"{file.name} holds no text{why}")
    return Document(title, kept)


def plain(content: str) -> list[Block]:
    """Paragraphs of a text file: what stands between empty lines."""
    paragraphs: list[str] = []
    held: list[str] = []
    for line in [*content.splitlines(), ""]:
        if line.strip():
            held.append(line.strip())
        elif held:
            paragraphs.append(" ".join(held))
            held = []
    return [Block(body, (), f"paragraph {number}") for number, body in enumerate(paragraphs, 1)]


def decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, byte {error.start + 1} (0x{content[error.start]:02x}) is not valid UTF-8; convert the file "
            "to UTF-8, such as with iconv -f WINDOWS-1252 -t UTF-8"
        ) from error


def _ending(uri: str) -> str:
    return PurePosixPath(uri.split("?")[0]).suffix.lower()


def _folder(source: str) -> str:
    """The folder that the paths of a source's documents are told from."""
    fs, inside = storage.filesystem(source)
    uri = str(fs.unstrip_protocol(inside))  # as `storage.find` tells what it finds
    parts = uri.split("/")
    magic = [i for i, part in enumerate(parts) if any(c in part for c in "*?[")]
    if magic:
        return "/".join(parts[: magic[0]])
    return uri if _ending(uri) not in KINDS else uri.rpartition("/")[0]


def _why_nothing(source: str, uris: Sequence[str]) -> str:
    shown, endings = storage.display(storage.uri(source)), ", ".join(KINDS)
    if uris:
        return (
            f"{shown} holds no documents, only {storage.display(uris[0])} and the like ({endings} are read)"
        )
    if any(c in source for c in "*?["):
        return f"no file matches {shown}"
    if storage.exists(source):
        return f"{shown} holds no files ({endings} are looked for)"
    parent, _, name = storage.uri(source).rpartition("/")
    return f"{shown} does not exist{nearest(name, storage.ls(parent))}"
