"""Shuffles of packed rows on Ray Data, in partitions whose number goes by what is shuffled.

What is moved are few rows, each with the lists of one partition (`blocks.pack_by`), however many values there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from lib.data import blocks
from lib.data.alike import dedup, near
from lib.data.alike.clusters import node_partition
from lib.data.stream import parallel_tasks, tables

# A partition's rows are held several times while they are compared. Ray starts processes for a shuffle of several
# partitions, which takes longer than one of two million pairs.
PARTITION_BYTES = 128 << 20
# What is shuffled of a pair.
PAIR_BYTES = 16


def exchange(
    rows: Dataset, partitions: int, names: Sequence[str], function: Callable[..., pa.Table], **arguments: Any
) -> Dataset:
    """`function` on each partition of rows that `blocks.pack_by` has packed, whose lists `names` it gets flat. Each block of
    the result is sorted by its first column."""
    call = {"names": names, "function": function, "arguments": arguments}
    if partitions == 1:
        # A shuffle into one partition would cost a small source several seconds.
        found = rows.repartition(1).map_batches(
            _call, fn_kwargs=call, batch_size=None, batch_format="pyarrow"
        )
    else:
        groups = rows.groupby("partition", num_partitions=partitions)
        found = groups.map_groups(
            _call,
            fn_kwargs=call,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
        )
    # A block holds what was found in several partitions, one after the other.
    return mapped(found, in_order).materialize()


def _call(
    packed: pa.Table, names: Sequence[str], function: Callable[..., pa.Table], arguments: dict[str, Any]
) -> pa.Table:
    return function(blocks.unpack(packed, names), **arguments)


def mapped(rows: Dataset, function: Callable[..., pa.Table], **arguments: Any) -> Dataset:
    return rows.map_batches(
        function,
        fn_kwargs=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
    )


def partitions_of(rows: int, bytes_a_row: int) -> int:
    return min(dedup.MAX_PARTITIONS, 1 + rows * bytes_a_row // PARTITION_BYTES)


def staying(rows: pa.Table, away: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of packed rows, and which of them are in none of the tables `away`."""
    positions = blocks.unpack(rows, ("position",))["position"].to_numpy()
    order = np.argsort(positions, kind="stable")  # several blocks may lie in any order
    gone = np.empty(len(positions), bool)
    gone[order] = dedup.among(ray.get(list(away)), positions[order], "position", -1) >= 0
    return positions, ~gone


def unique(rows: pa.Table) -> pa.Table:
    return near.unique_links(rows["a"].to_numpy(), rows["b"].to_numpy())


def in_order(rows: pa.Table, column: str | None = None) -> pa.Table:
    """By the first column where none is named; a table without rows may have none."""
    return rows.sort_by(column or rows.column_names[0]) if rows.num_rows else rows


def links_by_node(links: pa.Table, partitions: int, column: str) -> pa.Table:
    """Links packed by the partition of their `column`, which becomes a; with "both", from each of their ends."""
    a, b = links["a"].to_numpy(), links["b"].to_numpy()
    if column == "both":
        a, b = np.concatenate([a, b]), np.concatenate([b, a])
    elif column == "b":
        a, b = b, a
    return blocks.pack_by(node_partition(a, partitions), {"a": pa.array(a), "b": pa.array(b)})


class Pairs:
    """Pairs of rows, each pair once, on their way to tasks that have the rows: whichever block a row is in finds its pairs."""

    def __init__(self, candidates: Dataset, count: int) -> None:
        """Of LINK with `count` rows, in which a pair may be several times."""
        partitions = partitions_of(count, PAIR_BYTES)
        packed = mapped(candidates, links_by_node, partitions=partitions, column="a")
        pairs = exchange(packed, partitions, ("a", "b"), unique)
        self.by_first = tables(pairs)
        self.by_second = tables(mapped(pairs, in_order, column="b").materialize())

    def of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of rows at these sorted positions: the first row `a` of each pair that one is in, and its own position, int64 [n]
        both. A row that is the first of pairs comes once with itself."""
        firsts = [
            np.unique(part["a"].to_numpy()) for part in _between(ray.get(list(self.by_first)), "a", positions)
        ]
        pairs = _between(ray.get(list(self.by_second)), "b", positions)
        none = np.empty(0, np.int64)
        a = np.concatenate([*firsts, *(part["a"].to_numpy() for part in pairs), none])
        position = np.concatenate([*firsts, *(part["b"].to_numpy() for part in pairs), none])
        return a, position


def packed_pairs(
    a: np.ndarray, position: np.ndarray, there: np.ndarray, values: pa.Array, partitions: int
) -> pa.Table:
    """`a`, `position` and `value` of rows of pairs, packed by the partition of a. `values` are those of rows at the sorted
    positions `there`."""
    at = np.searchsorted(there, position)
    # A source that changed between the passes may lack a row.
    known = at < len(there)
    known[known] = there[at[known]] == position[known]
    columns = {
        "a": pa.array(a[known]),
        "position": pa.array(position[known]),
        "value": values.take(pa.array(at[known])),
    }
    return blocks.pack_by(node_partition(a[known], partitions), columns)


def _between(links: Sequence[pa.Table], column: str, positions: np.ndarray) -> list[pa.Table]:
    """Of tables that are sorted by `column`, the parts in which it lies among sorted `positions`."""
    parts = []
    for table in links:
        if table.num_rows and len(positions):
            start, end = np.searchsorted(
                blocks.flat(table[column]).to_numpy(), [positions[0], positions[-1] + 1]
            )
            parts.append(table.slice(start, end - start))
    return parts
