"""What is known of items, as arrays: the tokens of their texts, categories and numbers.

Shapes: N items, F columns of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage
from lib.artifacts import DatasetRef

# What stands between the columns that an item's text is made of.
JOINT = ". "
# Columns that a model is built from; the others are for people.
FEATURES = ("input_ids", "categories", "numbers", "interactions")


def shards(dataset: DatasetRef) -> list[str]:
    """URIs of a dataset's items, in the order in which sequences number them."""
    folder = storage.join(dataset.uri, "items")
    return [storage.join(folder, name) for name in storage.ls(folder) if name.endswith(".parquet")]


def read(dataset: DatasetRef, columns: Sequence[str] | None = None) -> pa.Table:
    """The items of a dataset; all columns where none is named."""
    parts = []
    for shard in shards(dataset):
        with storage.open_file(shard) as file:
            parts.append(pq.read_table(file, columns=list(columns) if columns else None))
    return pa.concat_tables(parts)


@dataclass(frozen=True)
class Scale:
    """Mean and spread of each column of numbers, over those that are there; [F] each."""

    mean: list[float]
    spread: list[float]

    @classmethod
    def of(cls, numbers: np.ndarray) -> Scale:
        known = np.isfinite(numbers)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, numbers, 0).sum(0) / count
        spread = np.sqrt(np.where(known, (numbers - mean) ** 2, 0).sum(0) / count)
        return cls(mean.tolist(), np.where(spread > 0, spread, 1.0).tolist())

    def apply(self, numbers: np.ndarray) -> np.ndarray:
        """float32 [rows, F]: standardised, and 0, the mean, where nothing is known."""
        scaled = (numbers - np.array(self.mean)) / np.array(self.spread)
        return np.asarray(np.nan_to_num(np.clip(scaled, -5, 5)), np.float32)

    def undo(self, scaled: np.ndarray) -> np.ndarray:
        """Numbers [..., F] from standardised ones."""
        return np.asarray(scaled * np.array(self.spread) + np.array(self.mean))


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of the same length as float64 [rows, F]."""
    joined = column.combine_chunks()
    flat = np.asarray(joined.flatten().to_numpy(zero_copy_only=False), np.float64)
    return flat.reshape(len(joined), -1) if len(flat) else np.zeros((len(joined), 0))


def vocabulary(column: pa.ChunkedArray) -> list[str]:
    """The different categories, in the order of their names."""
    return sorted(set(column.combine_chunks().flatten().to_pylist()))


def coded(column: pa.ChunkedArray, known: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Categories of rows as numbers of `known` int64, one row behind the other, and where each row begins int64 [rows].

    Categories that are not known are left out.
    """
    joined = column.combine_chunks()
    number = {name: place for place, name in enumerate(known)}
    rows = [[number[name] for name in row if name in number] for row in joined.to_pylist()]
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    return np.array([code for row in rows for code in row], np.int64), starts.astype(np.int64)


def tokens(column: pa.ChunkedArray) -> np.ndarray:
    """A column of token ids as int64 [N, T], -1 behind the end of each row."""
    joined = column.combine_chunks()
    lengths = np.diff(joined.offsets.to_numpy())
    mask = np.arange(max(int(lengths.max(initial=0)), 1)) < lengths[:, None]
    found = np.full(mask.shape, -1, np.int64)
    found[mask] = joined.flatten().to_numpy()
    return found
