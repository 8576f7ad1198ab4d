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
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa

from lib.data.blocks import ROW_BITS, flat

# Source bytes behind one partition: at 30 compressed bytes a text, 2 million rows and 80 MB.
PARTITION_BYTES = 64 << 20
MAX_PARTITIONS = 512


class Reason(IntEnum):
    """Why a row is dropped."""

    DUPLICATE = 1
    CONFLICTING = 2
    """The row that is kept has another label."""
    NEAR_DUPLICATE = 3
    NEAR_CONFLICTING = 4
    LEAKING = 5
    """A row of a given split says the same."""


DROPPED = pa.schema([("position", pa.int64()), ("reason", pa.int8())])


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


def find_duplicates(rows: pa.Table, ranks: np.ndarray) -> pa.Table:
    """Rows of one partition (`high`, `low`, `position` int64, `label` int32) → DROPPED, in any order.

    Of equal rows the first in source order stays, of the files with the highest of `ranks` int8 [files]: what leaks
    into a given split goes, and not the row of that split.
    """
    high, low, position, label = (rows[c].to_numpy() for c in ("high", "low", "position", "label"))
    rank = ranks[position >> ROW_BITS]
    order = np.lexsort((position, -rank, low, high))
    high, low, rank, label = high[order], low[order], rank[order], label[order]
    first = np.ones(len(order), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    kept = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    reason = np.where(label != label[kept], Reason.CONFLICTING, Reason.DUPLICATE)
    reason = np.where(rank < rank[kept], Reason.LEAKING, reason).astype(np.int8)
    return pa.table([position[order][~first], reason[~first]], schema=DROPPED)


def by_position(found: pa.Table) -> pa.Table:
    return found.sort_by("position")


def among(tables: Sequence[Any], positions: np.ndarray, column: str, absent: int) -> np.ndarray:
    """`column` of `tables` for each of `positions`, sorted, and `absent` for those that no table has: int64 [rows].

    The tables, each sorted by position, lie in Ray's object store: only the few pages that are looked at are touched.
    """
    found = np.full(len(positions), absent, np.int64)
    if not len(positions):
        return found
    for table in tables:
        if not table.num_rows:  # it may lack the columns too
            continue
        of = flat(table["position"]).to_numpy()
        start, end = np.searchsorted(of, [positions[0], positions[-1] + 1])
        index = np.searchsorted(positions, of[start:end])
        # A source that changed between the passes may lack a row that was to be dropped.
        there = positions[index] == of[start:end]
        found[index[there]] = table[column].slice(start, end - start).to_numpy()[there]
    return found
