"""Exact duplicates."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from lib.artifacts import SPLITS
from lib.data.alike.dedup import (
    Reason,
    among,
    by_position,
    find_duplicates,
    hash_texts,
    partition_of,
    partitions,
    row_ids,
)
from lib.data.blocks import ROW_BITS


def rows(texts: list[str], labels: list[int], positions: list[int]) -> pa.Table:
    high, low = hash_texts(pa.array(texts))
    return pa.table(
        {
            "high": high,
            "low": low,
            "position": np.array(positions, np.int64),
            "label": np.array(labels, np.int32),
        }
    )


def test_the_hash_is_blake2b_and_the_id_its_beginning() -> None:
    high, low = hash_texts(pa.array(["Größe", ""]))
    digest = hashlib.blake2b("Größe".encode(), digest_size=16).hexdigest()
    assert row_ids(high)[0].as_py() == digest[:16]
    assert row_ids(low)[0].as_py() == digest[16:]


ONE_FILE = np.zeros(1, np.int8)


def test_the_first_in_source_order_is_kept() -> None:
    # Rows come in any order: tasks finish when they finish.
    table = rows(["b", "a", "a", "c", "a", "b"], [0, 1, 1, 2, 0, 0], [50, 40, 10, 30, 20, 5])
    found = by_position(find_duplicates(table, ONE_FILE))
    assert found.to_pydict() == {
        "position": [20, 40, 50],
        "reason": [Reason.CONFLICTING, Reason.DUPLICATE, Reason.DUPLICATE],
    }


def test_of_a_split_that_is_given_no_row_goes_for_a_row_that_is_drawn() -> None:
    second_file = 1 << ROW_BITS
    table = rows(["a", "a", "b", "a", "b"], [0, 0, 0, 1, 0], [0, second_file, 1, second_file + 1, 2])
    given = np.array([-1, SPLITS.index("test")], np.int8)
    assert by_position(find_duplicates(table, given)).to_pydict() == {
        "position": [0, 2, second_file + 1],
        "reason": [Reason.LEAKING, Reason.DUPLICATE, Reason.CONFLICTING],
    }


def test_only_whole_hashes_count() -> None:
    table = pa.table(
        {
            "high": np.array([7, 7, 8]),
            "low": np.array([1, 2, 1]),
            "position": np.array([0, 1, 2]),
            "label": np.zeros(3, np.int32),
        }
    )
    assert find_duplicates(table, ONE_FILE).num_rows == 0


def test_nothing_gives_nothing() -> None:
    empty = rows([], [], []).slice(0, 0)
    assert find_duplicates(empty, ONE_FILE).num_rows == 0


def test_among_looks_into_all_tables() -> None:
    tables = [
        pa.table({"position": np.array([2, 9, 11]), "reason": np.array([1, 2, 1], np.int8)}),
        pa.table({"position": np.array([], np.int64), "reason": pa.array([], pa.int8())}),
        pa.table({}),
        pa.table({"position": np.array([10, 30]), "reason": np.array([5, 1], np.int8)}),
    ]
    assert among(tables, np.array([8, 9, 10, 11, 12]), "reason", 0).tolist() == [0, 2, 5, 1, 0]
    assert among(tables, np.array([], np.int64), "reason", 0).tolist() == []
    # Positions that are not there are no one's.
    assert among(tables, np.array([8, 12]), "reason", 0).tolist() == [0, 0]


def test_partitions_are_even_and_bounded() -> None:
    high, _ = hash_texts(pa.array([str(i) for i in range(20_000)]))
    counts = np.bincount(partition_of(high, 8), minlength=8)
    assert counts.min() > 2300
    assert partitions(0) == 1
    assert partitions(1 << 30) == 16
