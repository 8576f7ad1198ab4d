"""What is foretold in a dataset, and what was known before it.

Shapes: M interactions that are foretold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import DatasetRef
from lib.errors import DataError


def asked(rows: pa.Table) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """What is foretold in rows of a split: what was known before each, the item int64 [M], and its row int64 [M].

    Known are `items`, `times` and `events` int64, in order, `user_categories` int64 and `user_numbers` float32.
    """
    known: list[dict[str, Any]] = []
    targets, places = [], []
    for number, row in enumerate(rows.to_pylist()):
        size = len(row["items"])
        for end in range(size - row["targets"], size):
            known.append(
                {name: np.array(row[name][:end], np.int64) for name in ("items", "times", "events")}
                | {
                    "user_categories": np.array(row["user_categories"], np.int64),
                    "user_numbers": np.array(row["user_numbers"], np.float32),
                }
            )
            targets.append(row["items"][end])
            places.append(number)
    return known, np.array(targets, np.int64), np.array(places, np.int64)


def sequences_of(dataset: DatasetRef, column: str = "items", validation: bool = False) -> list[np.ndarray]:
    """Items, or `times`, int64 of each user of the training split, in order; with those of `validation`, what was foretold
    there too. Of held-out items nothing is told."""
    found: dict[str, np.ndarray] = {}
    for split in ("train", "validation") if validation else ("train",):
        for shard in dataset.shards(split):
            with storage.open_file(shard) as file:
                rows = pq.read_table(file, columns=["user", column, "fresh"])
            of = zip(*(rows[name].combine_chunks() for name in rows.column_names), strict=True)
            found |= {
                user.as_py(): np.asarray(values.values, np.int64)
                for user, values, fresh in of
                if not fresh.as_py()
            }
    return list(found.values())


def read_split(dataset: DatasetRef, split: str) -> pa.Table:
    """Its rows. Raises DataError when it has none."""
    parts = []
    for shard in dataset.shards(split):
        with storage.open_file(shard) as file:
            parts.append(pq.read_table(file))
    if not parts:
        raise DataError(f"dataset {dataset.name}/{dataset.fingerprint} has no {split} rows")
    return pa.concat_tables(parts)
