"""Rows of one block → Parquet shards of a dataset, written by the task that tokenises them.

Tokens are several times larger than text: they go to storage straight away and never through Ray's object
store. What the task hands back is a count.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import SPLITS
from lib.settings import ModelSettings
from lib.tasks import Task, UnencodableError

# Lengths are counted in classes whose lower ends these are: each of the first few by itself, then four to an octave.
LENGTH_ENDS = np.unique(np.round(2.0 ** (np.arange(0, 96) / 4)).astype(np.int64))
# Rows that go through the tokeniser at a time. Its objects are large: with a thousand they leave the
# processor's cache and each row costs 7% more.
ENCODE_ROWS = 128
# Columns that the other splits have not: they would be taken for slices of the rows.
OF_TRAINING = ("augmented_from", "augmented_by")


@dataclass
class SplitCount:
    """What lies in one split, of one shard or of all."""

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    """Lower end of a class of lengths (LENGTH_ENDS) → rows."""

    def add(self, other: SplitCount) -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.truncated += other.truncated
        for label, rows in other.labels.items():
            self.labels[label] = self.labels.get(label, 0) + rows
        for end, rows in other.lengths.items():  # JSON has made texts of the ends
            self.lengths[int(end)] = self.lengths.get(int(end), 0) + rows
        self.shards.extend(other.shards)

    def manifest(self, labels: list[str]) -> dict[str, Any]:
        """For the manifest: labels in the order of their classes, shards by name, lengths from the shortest."""
        counts = {name: self.labels.get(name, 0) for name in labels}
        lengths = {str(end): self.lengths[end] for end in sorted(self.lengths)}
        return {**asdict(self), "labels": counts, "shards": sorted(self.shards), "lengths": lengths}


def shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def write_shards(
    rows: pa.Table,
    splits: np.ndarray,
    number: int,
    uri: str,
    task: Task,
    model: ModelSettings,
    classes: list[str],
    refused: dict[int, str] | None = None,
) -> dict[str, SplitCount]:
    """Encode `rows` (`id`, the task's columns, slices) and write a shard for each split that has any.

    `splits` int8 [rows] indexes SPLITS; `number` names the shard. Returns the counts by split. Raises
    UnencodableError, with the number of the row among `rows`; or, where `refused` is given, leaves such rows out
    and adds them to it, with the reason, to those that it has already.
    """
    counts = {}
    for index, split in enumerate(SPLITS):
        chosen = np.array([row for row in np.flatnonzero(splits == index) if row not in (refused or ())], int)
        own = rows
        if split != "train":
            own = rows.drop_columns([name for name in OF_TRAINING if name in rows.column_names])
        parts = [
            _encode(own, chosen[start : start + ENCODE_ROWS], task, model, refused)
            for start in range(0, len(chosen), ENCODE_ROWS)
        ]
        found = [part for part in parts if part is not None]
        if not found:
            continue
        encoded = pa.concat_tables(found)
        path = storage.join(uri, split, shard_name(number))
        with storage.open_file(path, "wb") as file:
            pq.write_table(encoded, file, compression="zstd")
        counts[split] = _count(encoded, task.counts(encoded, classes), shard_name(number))
    return counts


def _encode(
    rows: pa.Table, chosen: np.ndarray, task: Task, model: ModelSettings, refused: dict[int, str] | None
) -> pa.Table | None:
    try:
        return task.encode(rows.take(pa.array(chosen)), model)
    except UnencodableError as error:
        if refused is None:
            raise UnencodableError(int(chosen[error.row]), str(error)) from None
    good = []
    for row in chosen.tolist():
        try:
            task.encode(rows.slice(row, 1), model)
            good.append(row)
        except UnencodableError as error:
            refused[row] = str(error)
    return task.encode(rows.take(pa.array(good)), model) if good else None


def _count(rows: pa.Table, labels: dict[str, int], shard: str) -> SplitCount:
    truncated = int(np.sum(rows["truncated"].to_numpy())) if "truncated" in rows.column_names else 0
    return SplitCount(
        rows=rows.num_rows,
        tokens=int(np.sum(rows["length"].to_numpy(), dtype=np.int64)),
        truncated=truncated,
        labels={name: n for name, n in labels.items() if n},
        shards=[shard],
        lengths=length_classes(rows["length"].to_numpy()),
    )


def length_classes(lengths: np.ndarray) -> dict[int, int]:
    """Lower end of a class → how many of `lengths` int [rows] are in it; empty rows are in the first."""
    place = np.maximum(np.searchsorted(LENGTH_ENDS, lengths, side="right") - 1, 0)
    found, counts = np.unique(place, return_counts=True)
    return dict(zip(LENGTH_ENDS[found].tolist(), counts.tolist(), strict=True))
