"""From documents to a published index, on Ray Data.

read    a task reads some documents and cuts them into passages
embed   actors, each with the encoder, add the vectors
write   the driver writes them as they come, then the indexes, and publishes the version
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from lib import storage, tracking
from lib.encoders import UNCUT, base_tokenizer
from lib.errors import DataError, StorageError
from lib.progress import data_context
from lib.retrieval.chunks import Chunker
from lib.retrieval.documents import Document, DocumentFile, Redact, read_document, without_personal_data
from lib.retrieval.embedding import Embedder
from lib.retrieval.index import PASSAGE, with_vectors, write_table
from lib.retrieval.plan import Plan
from lib.settings import KnowledgeSettings, ServingSettings

# Documents that one task reads, and passages that an actor embeds at a time.
DOCUMENTS_AT_ONCE = 16
PASSAGES_AT_ONCE = 256
# A document's passages have its number in the upper bits of their ids.
PASSAGE_BITS = 24
PROBLEMS_TOLD = 3
READ_CPUS = 0.5
# `redacted`, counts as JSON, with a document's first passage.
TOLD = ("problem", "redacted")
READ = pa.schema([*PASSAGE, *(pa.field(name, pa.string()) for name in TOLD)])


class Embed:
    """An actor of `build`: adds vectors to passages."""

    def __init__(self, knowledge: KnowledgeSettings) -> None:
        self._prefix = knowledge.passage_prefix
        self._embedder = Embedder(knowledge.base, engine(knowledge))

    def __call__(self, batch: pa.Table) -> pa.Table:
        texts = [self._prefix + searched for searched in batch["searched"].to_pylist()]
        return with_vectors(batch, self._embedder.vectors(texts))


def engine(knowledge: KnowledgeSettings) -> ServingSettings:
    """How `lib.engines` computes the vectors of one actor."""
    threads = max(1, (os.cpu_count() or 1) // knowledge.workers)
    return ServingSettings(gpus_per_replica=knowledge.gpus_per_worker, threads=threads)


def build(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make and publish the index on the connected Ray cluster; its manifest. `say` gets progress lines.

    Raises DataError, in one line, when too many documents cannot be read or none holds text; then nothing is
    published.
    """
    knowledge = plan.knowledge
    unreadable: dict[int, str] = {}
    redacted: Counter[str] = Counter()
    with storage.publish(plan.ref.uri) as folder:
        say(f"reading and embedding {len(plan.files):,} documents")
        rows, width = write_table(
            folder, _readable(_embedded(plan), unreadable, redacted), knowledge.language
        )
        _check(plan, rows, unreadable)
        manifest = {
            **plan.manifest_head(),
            "width": width,
            "passages": rows,
            "documents": [
                {"uri": file.name, "source": file.source, "checksum": checksum}
                for file, checksum in zip(plan.files, plan.checksums, strict=True)
            ],
            "unreadable": [why for _, why in sorted(unreadable.items())],
            **({"redacted": dict(sorted(redacted.items()))} if plan.redact else {}),
            "settings": knowledge.model_dump(mode="json", exclude={"source"}),
            "versions": tracking.versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        storage.write_json(str(folder / "manifest.json"), manifest)
    return manifest


def _embedded(plan: Plan) -> Iterator[pa.Table]:
    """Tables of READ and `vector`, from Ray Data."""
    knowledge = plan.knowledge
    with ray.data.DataContext.current(data_context()):
        numbers = ray.data.from_items([{"number": i} for i in range(len(plan.files))])
        read = numbers.map_batches(
            read_batch,
            fn_kwargs={"files": plan.files, "knowledge": knowledge, "redact": plan.redact},
            batch_size=DOCUMENTS_AT_ONCE,
            batch_format="pyarrow",
            # Another share of a CPU than the next step's keeps Ray Data from fusing the two.
            num_cpus=READ_CPUS,
        )
        embedded = read.map_batches(
            Embed,
            fn_constructor_kwargs={"knowledge": knowledge},
            batch_size=PASSAGES_AT_ONCE,
            batch_format="pyarrow",
            num_cpus=knowledge.cpus_per_worker,
            num_gpus=knowledge.gpus_per_worker,
            compute=ray.data.ActorPoolStrategy(size=knowledge.workers),
        )
    yield from embedded.iter_batches(batch_size=None, batch_format="pyarrow")


def read_batch(
    batch: pa.Table, files: Sequence[DocumentFile], knowledge: KnowledgeSettings, redact: Redact | None = None
) -> pa.Table:
    """Passages of the documents with these numbers; for one that cannot be read, a row that tells the problem."""
    chunker = Chunker(base_tokenizer(knowledge.base, UNCUT), knowledge.chunk_tokens, knowledge.overlap)
    rows: list[dict[str, Any]] = []
    for number in batch["number"].to_pylist():
        file, first = files[number], number << PASSAGE_BITS
        try:
            document, counts = read_document(file), dict[str, int]()
            if redact:
                document, counts = without_personal_data(document, redact)
            found = passages(file, document, chunker, first)
            found[0]["redacted"] = json.dumps(counts)
            rows += found
        except (DataError, StorageError) as error:
            rows.append({"id": first, "searched": "", "problem": str(error)})
    return pa.Table.from_pylist(rows, READ)


def passages(file: DocumentFile, document: Document, chunker: Chunker, first: int) -> list[dict[str, Any]]:
    """Rows of PASSAGE of a document, whose ids count from `first`."""
    return [
        {
            "id": first + i,
            "uri": file.name,
            "source": file.source,
            **asdict(passage),
            "searched": passage.searched,
        }
        for i, passage in enumerate(chunker.passages(document))
    ]


def _readable(
    tables: Iterator[pa.Table], unreadable: dict[int, str], redacted: Counter[str]
) -> Iterator[pa.Table]:
    """The passages; what cannot be read goes into `unreadable`, under the document's number, what was replaced into
    `redacted`."""
    for table in tables:
        is_passage = pc.is_null(table["problem"])
        for row in table.filter(pc.invert(is_passage)).select(["id", "problem"]).to_pylist():
            unreadable[row["id"] >> PASSAGE_BITS] = row["problem"]
        for counts in table["redacted"].drop_null().to_pylist():
            redacted.update(json.loads(counts))
        yield table.filter(is_passage).drop_columns(list(TOLD))


def _check(plan: Plan, rows: int, unreadable: dict[int, str]) -> None:
    documents, most = len(plan.files), plan.knowledge.max_unreadable
    told = "; ".join(why for _, why in sorted(unreadable.items())[:PROBLEMS_TOLD])
    if len(unreadable) > most * documents:
        raise DataError(
            f"{len(unreadable):,} of {documents:,} documents cannot be read: {told}"
            f"{'; …' if len(unreadable) > PROBLEMS_TOLD else ''} (knowledge.max_unreadable {most:g} of them may be)"
        )
    if not rows:
        raise DataError(f"knowledge.source: no document holds text{': ' if told else ''}{told}")
