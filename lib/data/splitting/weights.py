"""How often training has the rows of a source, as its weight says; the other splits have each once."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa

from lib.artifacts import SPLITS
from lib.data.reading.rows import ROW_BITS
from lib.data.splitting.split import kept

# So that what a weight leaves out has nothing to do with what undersampling does, which goes by the same hashes.
SEED = 0x5EED


def copies(weights: np.ndarray, places: np.ndarray, hashes: np.ndarray, seed: int) -> np.ndarray:
    """int64 [rows]: how often a row is in the dataset. In training as its source's weight says, a fraction of one by the row's
    hash; else once."""
    whole = np.floor(weights)
    times = whole + kept(hashes, weights - whole, seed ^ SEED)
    return np.where(places == SPLITS.index("train"), times, 1).astype(np.int64)


def repeated(rows: pa.Table, copies: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """Each row as often as `copies` says, later ones under a name of their own; and which row each is of."""
    chosen = np.repeat(np.arange(len(copies)), copies)
    if len(chosen) == len(copies) and (copies == 1).all():
        return rows, chosen
    times = np.arange(len(chosen)) - np.repeat(np.cumsum(copies) - copies, copies)
    ids = [
        f"{name}+{time}" if time else name
        for name, time in zip(rows["id"].take(pa.array(chosen)).to_pylist(), times.tolist(), strict=True)
    ]
    return rows.take(pa.array(chosen)).set_column(0, "id", pa.array(ids, pa.string())), chosen


def by_file(positions: np.ndarray, places: np.ndarray, refused: Collection[int]) -> dict[int, list[int]]:
    """Of rows that are written, all but the refused: index of the file → rows in each of SPLITS."""
    left = np.ones(len(positions), bool)
    left[list(refused)] = False
    files, places = positions[left] >> ROW_BITS, places[left]
    return {
        int(index): np.bincount(places[files == index], minlength=len(SPLITS)).tolist()
        for index in np.unique(files)
    }
