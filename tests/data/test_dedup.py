"""Exact duplicates."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from lib.data.dedup import (
    by_position,
    dropped_among,
    find_duplicates,
    hash_texts,
    partition_of,
    partitions,
    row_ids,
)


def rows(texts: list[str], labels: list[int], positions: list[int]) -> pa.Table:
    high, low = hash_texts(pa.array(texts))
    return pa.table(
        {"high": high, "low": low, "position": np.array(positions), "label": np.array(labels, np.int32)}
    )


def test_the_hash_is_blake2b_and_the_id_its_beginning() -> None:
    high, low = hash_texts(pa.array(["Größe", ""]))
    digest = hashlib.blake2b("Größe".encode(), digest_size=16).hexdigest()
    assert row_ids(high)[0].as_py() == digest[:16]
    assert row_ids(low)[0].as_py() == digest[16:]


def test_the_first_in_source_order_is_kept() -> None:
    # Rows come in any order: tasks finish when they finish.
    table = rows(["b", "a", "a", "c", "a", "b"], [0, 1, 1, 2, 0, 0], [50, 40, 10, 30, 20, 5])
    found = by_position(find_duplicates(table))
    assert found.to_pydict() == {"position": [20, 40, 50], "conflict": [True, False, False]}


def test_only_whole_hashes_count() -> None:
    table = pa.table(
        {
            "high": np.array([7, 7, 8]),
            "low": np.array([1, 2, 1]),
            "position": np.array([0, 1, 2]),
            "label": np.zeros(3, np.int32),
        }
    )
    assert find_duplicates(table).num_rows == 0


def test_nothing_gives_nothing() -> None:
    empty = rows([], [], []).slice(0, 0)
    assert find_duplicates(empty).num_rows == 0


def test_dropped_among_looks_into_all_partitions() -> None:
    tables = [
        pa.table({"position": np.array([2, 9, 11]), "conflict": [False, True, False]}),
        pa.table({"position": np.array([], np.int64), "conflict": pa.array([], pa.bool_())}),
        pa.table({"position": np.array([10, 30]), "conflict": [True, False]}),
    ]
    dropped, conflict = dropped_among(tables, np.array([8, 9, 10, 11, 12]))
    assert dropped.tolist() == [False, True, True, True, False]
    assert conflict.tolist() == [False, True, True, False, False]
    assert dropped_among(tables, np.array([], np.int64))[0].tolist() == []
    # Positions that are not there are no one's.
    assert dropped_among(tables, np.array([8, 12]))[0].tolist() == [False, False]


def test_partitions_are_even_and_bounded() -> None:
    high, _ = hash_texts(pa.array([str(i) for i in range(20_000)]))
    counts = np.bincount(partition_of(high, 8), minlength=8)
    assert counts.min() > 2300
    assert partitions(0) == 1
    assert partitions(1 << 30) == 16
