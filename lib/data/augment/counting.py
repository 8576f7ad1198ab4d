"""What new rows need to know of all rows together, counted on Ray Data: how many of each label train, and what is said already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from lib.data import blocks
from lib.data.blocks import Reading
from lib.data.places import Found, places
from lib.data.splitting import weights
from lib.data.stream import SHUFFLE_BYTES, parallel_tasks, tables
from lib.settings import DataSettings


def wanted(reading: Reading, data: DataSettings, hashes: Dataset, found: Found) -> tuple[float, ...] | None:
    """Class → new rows that each of its training rows is to have so that `augment.balance` is met; None without it."""
    if data.augment is None or data.augment.balance is None:
        return None
    counts = hashes.map_batches(
        count_labels,
        fn_kwargs={"reading": reading, "data": data, "found": found},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
    )
    total = np.zeros(len(data.label_names), np.int64)
    for batch in counts.iter_batches(batch_size=None, batch_format="pyarrow"):
        np.add.at(total, batch["label"].to_numpy(), batch["rows"].to_numpy())
    return of_counts(total, data.augment.balance.to)


def of_counts(rows: np.ndarray, to: str | int | float) -> tuple[float, ...]:
    """Class → new rows a row, of `rows` int64 [classes] that there are; none for a class without rows."""
    largest = int(rows.max(initial=0))
    target = largest if to == "largest" else to if isinstance(to, int) else round(float(to) * largest)
    needed = np.maximum(int(target) - rows, 0)
    return tuple((needed / np.maximum(rows, 1) * (rows > 0)).tolist())


def count_labels(rows: pa.Table, reading: Reading, data: DataSettings, found: Found) -> pa.Table:
    """Runs in a task: training rows of each label among packed rows of `passes.scan`'s hashes."""
    names = ["position", "label", "group", "high", *(["time"] if "time" in rows.column_names else [])]
    flat = blocks.unpack(rows, names).sort_by("position")  # several blocks may lie in any order
    columns = {name: flat[name].to_numpy() for name in names}
    seconds = columns.pop("time", None)
    position, label, group, high = columns.values()
    at = places(found, reading, data, position, label, group, high, seconds)
    # A row that a source's weight repeats is repeated with its new ones.
    copies = weights.copies(reading.weighed(position), at.split, high, data.split.seed) * at.trains
    labels, which = np.unique(label, return_inverse=True)
    count = np.bincount(which, copies, minlength=len(labels))
    return pa.table({"label": labels.astype(np.int64), "rows": count.astype(np.int64)})


def said_already(hashes: Dataset, rows: int) -> list[Any]:
    """References to tables of `said` int64, each sorted: what decides the split of each of the `rows` usable rows of the
    source, where its text does. They lie in the object store, 8 bytes a row."""
    found = hashes.map_batches(
        blocks.unpack, fn_kwargs={"names": ("said",)}, batch_size=None, batch_format="pyarrow"
    )
    # A table for each of many blocks would cost each task of the next pass a look.
    merged = found.repartition(1 + rows * 8 // SHUFFLE_BYTES)
    return tables(merged.map_batches(_sorted, batch_size=None, batch_format="pyarrow").materialize())


def _sorted(rows: pa.Table) -> pa.Table:
    return rows.sort_by("said") if rows.num_rows else rows


class Known:
    """Whether hashes are among those of `said_already`."""

    def __init__(self, references: Sequence[Any]) -> None:
        self.references = list(references)

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        """Bool [n] of int64 [n]."""
        known = np.zeros(len(hashes), bool)
        for table in ray.get(self.references):
            if table.num_rows:
                said = blocks.flat(table["said"]).to_numpy()
                at = np.minimum(np.searchsorted(said, hashes), len(said) - 1)
                known |= said[at] == hashes
        return known
