"""Exact duplicates of normalised texts, found without any process holding all rows.

Every row becomes 36 bytes: a 128-bit hash of its text, its position and its class. These are shuffled by
hash into partitions of bounded size, and each partition names the positions to drop: all but the first in
source order, so that the result does not depend on which task ran when. At 128 bits, two different texts
among 10^9 share a hash with probability 10^-21.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lib.data.blocks import flat

# Source bytes behind one partition: at 30 compressed bytes a text, 2 million rows and 80 MB.
PARTITION_BYTES = 64 << 20
MAX_PARTITIONS = 512

DROPPED = pa.schema([("position", pa.int64()), ("conflict", pa.bool_())])


def hash_texts(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """BLAKE2b-128 of each text, as two int64 arrays [rows]: high and low half. Null hashes as empty."""
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b((t or "").encode(), digest_size=16).digest() for t in texts.to_pylist()])
    halves = np.frombuffer(joined, ">i8").astype(np.int64).reshape(-1, 2)
    return halves[:, 0], halves[:, 1]


def row_ids(high: np.ndarray, positions: np.ndarray | None = None) -> pa.Array:
    """The high half as 16 hex digits; with `positions`, where equal texts stay, the row's own behind it."""
    ids = [f"{h:016x}" for h in high.view(np.uint64).tolist()]
    if positions is not None:
        ids = [f"{name}-{position:x}" for name, position in zip(ids, positions.tolist(), strict=True)]
    return pa.array(ids, pa.string())


def partitions(source_bytes: int) -> int:
    return min(MAX_PARTITIONS, max(1, math.ceil(source_bytes / PARTITION_BYTES)))


def partition_of(high: np.ndarray, count: int) -> np.ndarray:
    """Partition int32 [rows]: equal hashes meet in one."""
    return (high.view(np.uint64) % np.uint64(count)).astype(np.int32)


def find_duplicates(rows: pa.Table) -> pa.Table:
    """Rows of one partition (`high`, `low`, `position` int64, `label` int32) → DROPPED, in any order.

    `conflict` is true where the row that is kept has another label.
    """
    high, low, position, label = (rows[c].to_numpy() for c in ("high", "low", "position", "label"))
    order = np.lexsort((position, low, high))
    high, low = high[order], low[order]
    first = np.ones(len(order), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    kept = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    conflict = label[order] != label[order][kept]
    return pa.table([position[order][~first], conflict[~first]], schema=DROPPED)


def by_position(dropped: pa.Table) -> pa.Table:
    return dropped.sort_by("position")


def dropped_among(tables: Sequence[Any], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of `positions`, sorted, any of the tables drops: bool [rows], and where the kept row has another
    label: bool [rows].

    The tables (DROPPED, each sorted by position) lie in Ray's object store: only the few pages that are looked at are touched.
    """
    dropped, conflict = np.zeros(len(positions), bool), np.zeros(len(positions), bool)
    if not len(positions):
        return dropped, conflict
    for table in tables:
        column = flat(table["position"]).to_numpy()
        start, end = np.searchsorted(column, [positions[0], positions[-1] + 1])
        index = np.searchsorted(positions, column[start:end])
        # A source that changed between the passes may lack a row that was to be dropped.
        there = positions[index] == column[start:end]
        dropped[index[there]] = True
        conflict[index[there]] = table["conflict"].slice(start, end - start).to_numpy()[there]
    return dropped, conflict
