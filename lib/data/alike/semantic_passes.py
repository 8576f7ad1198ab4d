"""Semantic near duplicates of a source on Ray Data.

    rows                read again, embedded by actors     → a vector in half precision and a code of 64 bytes each
    codes               shuffled by bucket, in each table  → candidates
    vectors of these    shuffled                           → links: pairs that are near duplicates

Vectors and codes lie in Ray's object store, which spills to disk: 832 bytes a row for 384 numbers. No process holds more
than a partition or a block of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from lib.data import blocks
from lib.data.alike import dedup, semantic
from lib.data.alike.semantic import CODE_BYTES, Tables
from lib.data.blocks import Reading
from lib.data.embedding import embed, open_embedder
from lib.data.ready import prepare
from lib.data.shuffles import Pairs, exchange, mapped, packed_pairs, partitions_of
from lib.retrieval.embedding import Embedder
from lib.settings import SemanticSettings, Settings

# What is shuffled of a row in each table, and of a row of a pair beside its vector.
CODED_BYTES, ROW_BYTES = 16 + CODE_BYTES, 16
# Only for the partitions' number, which needs no more than an order of magnitude.
VECTOR_BYTES = 2 * 384


def links(
    reading: Reading,
    settings: Settings,
    read: Dataset,
    usable: int,
    away: Sequence[Any],
    rejected: Sequence[Any],
    by_group: bool,
) -> Dataset | None:
    """A dataset of LINK of rows that say the same; None where there are none.

    `read` are the packed blocks of the source, of which about `usable` rows are compared; those in the tables `away` take no
    part, and those in `rejected` are left out of the dataset. With `by_group` what decides the split is compared.
    """
    wanted = settings.data.near.semantic
    assert wanted is not None
    vectors = read.map_batches(
        Embed,
        fn_constructor_args=(list(reading.columns), settings),
        fn_kwargs={"away": (*away,), "rejected": (*rejected,), "by_group": by_group},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=wanted.workers),
        num_cpus=wanted.cpus_per_worker,
        num_gpus=wanted.gpus_per_worker,
    ).materialize()
    tables = Tables.of(wanted.threshold, usable)
    partitions = partitions_of(usable, CODED_BYTES * tables.tables)
    packed = mapped(vectors, _by_bucket, tables=tables, partitions=partitions)
    candidates = exchange(
        packed, partitions, ("key", "position", "code"), semantic.candidates, most=tables.most
    )
    count = candidates.count()
    if not count:
        return None
    pairs = Pairs(candidates, count)
    partitions = partitions_of(2 * count, ROW_BYTES + VECTOR_BYTES)
    rows = vectors.map_batches(
        _paired,
        fn_kwargs={"pairs": pairs, "partitions": partitions},
        batch_size=1,
        batch_format="pyarrow",
    )
    names = ("a", "position", "value")
    return exchange(rows, partitions, names, semantic.verified, threshold=wanted.threshold)


class Embed:
    """An actor: a packed block of the source → `position`, `vector` and `code` of its usable rows, packed."""

    def __init__(self, columns: list[str], settings: Settings) -> None:
        self._columns, self._settings = columns, settings

    @cached_property
    def _embedder(self) -> Embedder:
        wanted = self._settings.data.near.semantic
        assert isinstance(wanted, SemanticSettings)
        return open_embedder(wanted)

    def __call__(
        self, row: pa.Table, away: Sequence[Any], rejected: Sequence[Any], by_group: bool
    ) -> pa.Table:
        block = blocks.from_row(row, self._columns)
        ready = prepare(block.rows, self._settings, ray.get(list(rejected)))
        positions = block.rows[blocks.POSITION].to_numpy()[ready.usable]
        stay = dedup.among(ray.get(list(away)), positions, "position", -1) < 0
        texts = np.array(ready.compared(by_group), object)[stay].tolist()
        vectors = embed(self._embedder, [text or "" for text in texts])
        columns = {
            "position": pa.array(positions[stay]),
            "vector": semantic.to_binary(vectors.astype(np.float16)),
            "code": semantic.to_binary(semantic.codes(vectors)),
        }
        return blocks.pack(columns, {})


def _by_bucket(rows: pa.Table, tables: Tables, partitions: int) -> pa.Table:
    """Rows packed by the bucket that they are in, once for each table."""
    found = blocks.unpack(rows, ("position", "code"))
    codes = blocks.flat(found["code"])
    keys = tables.keys(semantic.from_binary(codes, np.uint8))
    which = np.repeat(np.arange(len(keys)), tables.tables)
    columns = {
        "key": pa.array(keys.ravel()),
        "position": pa.array(found["position"].to_numpy()[which]),
        "code": codes.take(pa.array(which)),
    }
    return blocks.pack_by(dedup.partition_of(keys.ravel(), partitions), columns)


def _paired(row: pa.Table, pairs: Pairs, partitions: int) -> pa.Table:
    """Vectors of those rows of a block that are in a pair, once for each first row that they may be like."""
    found = blocks.unpack(row, ("position", "vector"))
    positions = found["position"].to_numpy()
    a, position = pairs.of(positions)
    return packed_pairs(a, position, positions, blocks.flat(found["vector"]), partitions)
