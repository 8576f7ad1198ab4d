"""Batches of like lengths under a token budget, the same number of them on every worker.

A worker holds a window of rows, sorts it by length and cuts it into contiguous groups, so that almost
no padding is computed. Every step ends in a collective operation, so all workers must take the same
number of steps: they agree, window by window, on the largest number that any of them needs, and each
cuts its window into exactly that many groups. Since all sort by length and all shuffle the groups with
the same seed, their n-th batches are alike in size and nobody waits long for another.

Where rows are packed, a group is some packs instead: sequences of the model's length, each filled with whole rows
by best-fit decreasing (lib.training.packing). All packs are about full, so all batches are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lib import storage
from lib.training.packing import batches_of, deal, pack

Indices = NDArray[np.int64]
PACK = "pack"
# Columns that only evaluation reads.
NOT_TRAINED = (
    "id",
    "text",
    "tokens",
    "tags",
    "messages",
    "asked",
    "passages",
    "rejected_messages",
    "user",
    "fresh",
    "item_names",
    "item_titles",
    "augmented_from",
    "augmented_by",
)


@dataclass(frozen=True)
class Planned:
    """One micro-batch of this worker, and the loss weight of it and of its peers together."""

    rows: pa.Table
    """With the column `pack` int32 where rows are packed: which of them share a sequence."""
    weight: float


def cut(lengths: NDArray[np.int32], budget: int) -> list[Indices]:
    """Row indices in groups, longest rows first; rows · longest row ≤ `budget` tokens in each group.

    A single row above the budget is a group of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        size = max(1, budget // max(int(lengths[order[start]]), 1))
        groups.append(order[start : start + size])
        start += size
    return groups


def cut_into(lengths: NDArray[np.int32], budget: int, count: int) -> list[Indices]:
    """Exactly `count` groups of like lengths and about equal padded tokens, none above `budget`.

    `count` is at least what `cut` needs and at most the number of rows (ValueError otherwise).
    """
    if not len(cut(lengths, budget)) <= count <= len(lengths):
        raise ValueError(f"{len(lengths)} rows do not go into {count} groups of {budget} tokens")
    low, high = 1, budget
    while low < high:  # the smallest budget that still needs no more than `count` groups
        middle = (low + high) // 2
        if len(cut(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    groups = cut(lengths, low)
    while len(groups) < count:  # halve the costliest
        costs = [len(g) * int(lengths[g[0]]) if len(g) > 1 else -1 for g in groups]
        worst = int(np.argmax(costs))
        half = (len(groups[worst]) + 1) // 2
        groups[worst : worst + 1] = [groups[worst][:half], groups[worst][half:]]
    return groups


def plan_window(
    window: pa.Table,
    budget: int,
    random: np.random.Generator,
    weigh: Callable[[pa.Table], float],
    agree_on_largest: Callable[[int], int],
    add_up: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    context: int | None = None,
) -> list[Planned]:
    """The micro-batches of one window, in the order in which they are trained; packed where there is a `context`.

    `random` is in the same state on every worker. `agree_on_largest` and `add_up` are collective: the
    largest of a number, and the element-wise sum of a vector, over all workers.
    """
    lengths = window["length"].to_numpy()
    # Ties in length fall differently each epoch; the rest of the order is drawn over whole groups.
    shuffled = np.random.default_rng(random.integers(2**63)).permutation(len(lengths))
    if context is None:
        count = agree_on_largest(len(cut(lengths, budget)))
        groups = [shuffled[g] for g in cut_into(lengths[shuffled], budget, count)]
        parts = [window.take(pa.array(groups[i])) for i in random.permutation(count)]
    else:
        packs = pack(lengths[shuffled], context)
        count = agree_on_largest(batches_of(len(packs), budget, context))
        # The last packs hold the shortest rows and are the least full; all batches get their share of them.
        drawn = np.random.default_rng(random.integers(2**63)).permutation(len(packs))
        dealt = deal([shuffled[packs[i]] for i in drawn], count)
        parts = [_packed(window, group) for group in dealt]
    totals = add_up(np.array([weigh(part) for part in parts]))
    return [Planned(part, float(total)) for part, total in zip(parts, totals, strict=True)]


def _packed(window: pa.Table, packs: list[Indices]) -> pa.Table:
    rows = window.take(pa.array(np.concatenate(packs)))
    numbers = np.repeat(np.arange(len(packs), dtype=np.int32), [len(p) for p in packs])
    return rows.append_column(PACK, pa.array(numbers))


def read(shards: list[str], rows: int) -> Iterator[pa.Table]:
    """Tables of at most `rows` rows from Parquet files, in order.

    For validation: every worker reads the whole split and computes its share. A Ray Data execution for
    each worker and each validation would take longer to start than the split to read.
    """
    for shard in shards:
        with storage.open_file(shard) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=rows, columns=columns(shard)):
                yield pa.Table.from_batches([batch])


def columns(shard: str) -> list[str]:
    """The columns that training reads: all but those that only evaluation needs."""
    with storage.open_file(shard) as file:
        return [name for name in pq.read_schema(file).names if name not in NOT_TRAINED]


def in_order(window: pa.Table, budget: int, rank: int, world: int) -> Iterator[pa.Table]:
    """This worker's share of a window's batches, for validation: every row on exactly one worker."""
    for group in cut(window["length"].to_numpy(), budget)[rank::world]:
        yield window.take(pa.array(group))
