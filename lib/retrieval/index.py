"""An index as it lies in storage: versions that never change, a pointer to the current one, the Lance table.

    indexes/NAME/FINGERPRINT/manifest.json, passages.lance/
    indexes/NAME/current.json                {"fingerprint": …, "former": […]}

A version appears whole (`storage.publish`), and then the pointer is replaced in one step: a reader sees one version
or the other. Former versions stay for a while, for readers that have not looked at the pointer again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib import storage
from lib.artifacts import IndexRef
from lib.errors import ConfigError, RegistryError, nearest

TABLE = "passages"
# With fewer rows the exact search is quicker than its index would be worth.
VECTOR_INDEX_ROWS = 50_000
# Candidates of the vector index whose distance is computed exactly, for each passage that is wanted.
REFINE_FACTOR = 10
PASSAGE = pa.schema(
    [
        ("id", pa.int64()),
        ("uri", pa.string()),
        ("source", pa.string()),
        ("title", pa.string()),
        ("headings", pa.list_(pa.string())),
        ("place", pa.string()),
        ("text", pa.string()),
        ("searched", pa.string()),
        ("tokens", pa.int32()),
    ]
)
SHOWN = [name for name in PASSAGE.names if name != "searched"]


def with_vectors(passages: pa.Table, vectors: np.ndarray) -> pa.Table:
    """Rows of PASSAGE and their vectors float32 [N, D], as the Lance table has them."""
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    return passages.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))


def write_table(folder: Path, tables: Iterator[pa.Table], language: str) -> tuple[int, int]:
    """Write passages, of PASSAGE and `vector`, as a Lance table with its indexes; how many there are, and D.

    Raises ConfigError for a language that the full-text index does not know.
    """
    import lancedb
    from lancedb.index import FTS, IvfPq

    first = next(tables)
    schema = first.schema
    batches = (batch for table in chain([first], tables) for batch in table.to_batches())
    table = lancedb.connect(str(folder)).create_table(
        TABLE, data=pa.RecordBatchReader.from_batches(schema, batches)
    )
    rows, width = int(table.count_rows()), schema.field("vector").type.list_size
    if not rows:
        return rows, width
    try:
        table.create_index("searched", config=FTS(language=language))
    except (ValueError, RuntimeError) as error:
        if "language" not in str(error).lower():
            raise
        raise ConfigError(
            f"knowledge.language: {language!r} is not known to the full-text index, as English is"
        ) from error
    if rows >= VECTOR_INDEX_ROWS:
        table.create_index("vector", config=IvfPq(distance_type="cosine"))
    return rows, width


class Index:
    """One version, open for reading; threads may share it. A copy of a remote one lasts as long as the object."""

    def __init__(self, ref: IndexRef) -> None:
        import lancedb

        self.ref = ref
        self.manifest = ref.manifest()
        with ExitStack() as files:
            folder = files.enter_context(storage.local_copy(ref.uri))
            self._table = lancedb.connect(str(folder)).open_table(TABLE)
            weakref.finalize(self, files.pop_all().close)
        self._is_approximate = bool(self.manifest["passages"] >= VECTOR_INDEX_ROWS)

    def nearest(self, vector: np.ndarray, limit: int) -> list[dict[str, Any]]:
        """Passages by the cosine of their vectors to one of length 1, float32 [D], the highest first."""
        query = self._table.search(vector, query_type="vector", vector_column_name="vector")
        query = query.distance_type("cosine").select([*SHOWN, "vector", "_distance"]).limit(limit)
        if self._is_approximate:
            query = query.refine_factor(REFINE_FACTOR)
        return _rows(query.to_arrow(), "_distance", ascending=True)

    def matching(self, words: str, limit: int) -> list[dict[str, Any]]:
        """Passages by BM25 of the words (Robertson and Zaragoza 2009), the highest first; none for no words."""
        from lancedb.query import MatchQuery

        query = self._table.search(MatchQuery(words, "searched"), query_type="fts")
        found = query.select([*SHOWN, "vector", "_score"]).limit(limit).to_arrow()
        return _rows(found, "_score", ascending=False)


def _rows(found: pa.Table, by: str, ascending: bool) -> list[dict[str, Any]]:
    """Rows by a score; those of equal score in the order of the documents."""
    sign = 1 if ascending else -1
    rows: list[dict[str, Any]] = found.to_pylist()
    return sorted(rows, key=lambda row: (sign * row[by], row["id"]))


def current(name: str) -> IndexRef:
    """The version that is read now. Raises RegistryError when there is none."""
    pointer = _pointer(name)
    if not storage.exists(pointer):
        parent = storage.join(storage.root(), "indexes")
        raise RegistryError(
            f"no index {name}{nearest(name, storage.ls(parent))}; make it with python -m jobs.index --config FILE"
        )
    return IndexRef(name, storage.read_json(pointer)["fingerprint"])


def make_current(ref: IndexRef, keep: int) -> bool:
    """Let readers see a published version; of the former ones `keep` - 1 stay. False when it is the current already."""
    pointer = _pointer(ref.name)
    known = storage.read_json(pointer) if storage.exists(pointer) else {"fingerprint": None, "former": []}
    if known["fingerprint"] == ref.fingerprint:
        return False
    before = [fingerprint for fingerprint in (known["fingerprint"], *known["former"]) if fingerprint]
    former = [fingerprint for fingerprint in before if fingerprint != ref.fingerprint]
    storage.write_json(pointer, {"fingerprint": ref.fingerprint, "former": former[: keep - 1]})
    for fingerprint in former[keep - 1 :]:
        storage.remove(IndexRef(ref.name, fingerprint).uri)
    return True


def _pointer(name: str) -> str:
    return storage.join(storage.root(), "indexes", name, "current.json")
