"""What an index will be, told before anything is read or started: its documents, encoder and fingerprint."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lib import storage
from lib.artifacts import IndexRef
from lib.base_models import base_directory
from lib.errors import ConfigError
from lib.retrieval.documents import DocumentFile, Redact, find_documents
from lib.retrieval.embedding import base_checksum, max_tokens
from lib.settings import KnowledgeSettings, Settings

# Part of every fingerprint. Raise it when the same input would give other passages or another table.
FORMAT = 1
# Keys of `knowledge` that change nothing of what is in an index.
ELSEWHERE = {
    "source",
    "index",
    "base",
    "redact",
    "max_unreadable",
    "keep",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
}


@dataclass(frozen=True)
class Plan:
    """An index that is to be."""

    ref: IndexRef
    knowledge: KnowledgeSettings
    files: tuple[DocumentFile, ...]
    others: Counter[str]
    """Ending → files of the source that are no documents."""
    checksums: tuple[str, ...]
    """Of the files, in order."""
    encoder: str
    """Checksum of the base model."""
    redact: Redact | None = None
    """Takes personal data out of a document."""

    def manifest_head(self) -> dict[str, Any]:
        """What the manifest begins with; all that a reader needs to embed a question is in it."""
        return {
            "format": FORMAT,
            "name": self.ref.name,
            "fingerprint": self.ref.fingerprint,
            "base": self.knowledge.base,
            "encoder": self.encoder,
            "query_prefix": self.knowledge.query_prefix,
        }


def index_name(settings: Settings) -> str:
    return settings.knowledge.index or settings.name


def plan(settings: Settings, redact: Redact | None = None, rules: dict[str, object] | None = None) -> Plan:
    """Look at the source and name the index, without reading documents or starting Ray.

    `redact` takes personal data out of documents, and `rules` stands for how in the fingerprint.

    Raises ConfigError, ModelError or StorageError, in one line, for a source or an encoder that cannot be used.
    """
    knowledge = settings.knowledge
    if knowledge.source is None:
        raise ConfigError("knowledge.source is missing; give the folder of the documents")
    found = find_documents(knowledge.source, knowledge.base_url)
    longest = max_tokens(base_directory(knowledge.base))
    if knowledge.chunk_tokens > longest:
        raise ConfigError(
            f"knowledge.chunk_tokens {knowledge.chunk_tokens} is above the {longest} tokens that {knowledge.base} "
            f"reads; set it to {longest} or less"
        )
    with ThreadPoolExecutor(8) as pool:
        checksums = tuple(pool.map(storage.checksum, [file.uri for file in found.files]))
    encoder = base_checksum(knowledge.base)
    identity = {
        "format": FORMAT,
        "documents": [
            [storage.display(file.uri), file.source, checksum]
            for file, checksum in zip(found.files, checksums, strict=True)
        ],
        "encoder": encoder,
        "knowledge": knowledge.model_dump(mode="json", exclude=ELSEWHERE),
    }
    if redact:
        identity["redaction"] = rules
    ref = IndexRef(index_name(settings), storage.fingerprint(identity))
    return Plan(ref, knowledge, tuple(found.files), found.others, checksums, encoder, redact)
