"""Where rows are cut into splits by their times, or label by label, found by counting: no process sees more than a block.

Every row has a key: its time in seconds, or the place in [0, 2^53) that its text and the seed give it. A cut has to
leave so many of the keys below it, of all rows or of those of one label. Rows are counted by stretches of keys, then
those of the stretch in which a cut lies by parts of it, and so on: three or four looks at 8 bytes a row.
Nothing here knows Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lib import times
from lib.data.splitting.split import FAR, KEY_BITS, Cuts, bounds
from lib.settings import DataSettings

# A stretch of keys is counted in 2^14 parts.
PART_BITS = 14
# Least key of the first stretch, and log2 of its length: times of the years before and after 1970, up to 5000.
TIMES, HASHES = (-(1 << 37), 38), (0, KEY_BITS)
COUNTED = pa.schema([("cut", pa.int64()), ("part", pa.int64()), ("rows", pa.int64())])


@dataclass(frozen=True)
class Looking:
    """Stretches of keys that are looked into, for two cuts of each stratum."""

    strata: np.ndarray | None
    """int64 [strata], sorted; None, at first, for all there are."""
    low: np.ndarray
    """int64 [strata, 2]: where the stretches begin."""
    open: np.ndarray
    """bool [strata, 2]: cuts that are not found yet."""
    shift: int
    """A part is 2^shift keys."""


def counted(strata: np.ndarray, keys: np.ndarray, looking: Looking) -> pa.Table:
    """COUNTED of rows of `strata` int64 [rows] and `keys` int64 [rows]: number 2 i + j for the j-th cut of the i-th
    stratum, at first the stratum itself."""
    if looking.strata is None:
        cut, part = strata, (keys - looking.low[0, 0]) >> looking.shift
    else:
        at = np.searchsorted(looking.strata, strata)
        numbers, parts = [], []
        for side in range(2):
            offset = (keys - looking.low[at, side]) >> looking.shift
            mine = looking.open[at, side] & (offset >= 0) & (offset < 1 << PART_BITS)
            numbers.append(2 * at[mine] + side)
            parts.append(offset[mine])
        cut, part = np.concatenate(numbers), np.concatenate(parts)
    return _summed(cut, part, np.ones(len(cut), np.int64))


def together(tables: Iterable[pa.Table], most: int = 1 << 20) -> pa.Table:
    """Such counts of several blocks as one; no more than `most` rows wait to be added up, beside what they come to."""
    held: list[pa.Table] = [COUNTED.empty_table()]
    waiting = 0
    for table in tables:
        held.append(table.cast(COUNTED) if table.num_rows else COUNTED.empty_table())
        waiting += table.num_rows
        if waiting > most:
            held, waiting = [_merged(held)], 0
    return _merged(held)


def _merged(tables: list[pa.Table]) -> pa.Table:
    whole = pa.concat_tables(tables)
    return _summed(*(whole[name].to_numpy() for name in COUNTED.names))


def _summed(cut: np.ndarray, part: np.ndarray, rows: np.ndarray) -> pa.Table:
    """Each pair of cut and part once, sorted."""
    order = np.lexsort((part, cut))
    cut, part, rows = cut[order], part[order], rows[order]
    starts = np.flatnonzero(_first(cut) | _first(part))
    total = np.add.reduceat(rows, starts) if len(starts) else rows
    return pa.table([cut[starts], part[starts], total], schema=COUNTED)


def _first(values: np.ndarray) -> np.ndarray:
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return first


def at_dates(data: DataSettings) -> Cuts:
    """Of `split.validation_from` and `split.test_from`; a split that does not begin has no rows."""
    begins = {name: times.seconds(said, assume_utc=True) for name, said in data.split.dates.items()}
    test = begins.get("test", FAR)
    return Cuts(np.zeros(1, np.int64), np.array([[begins.get("validation", test), test]]))


def find(count: Callable[[Looking], pa.Table], data: DataSettings) -> Cuts:
    """`count` gives the rows of a stretch, as `counted` does. Of n rows of a stratum, the nearest whole number to n times
    the share lies before a cut, where no equal keys stand in the way: these stay together, on the nearer side."""
    by_time = data.split.by == "time"
    low, bits = TIMES if by_time else HASHES
    shift = bits - PART_BITS
    first = count(Looking(None, np.array([[low, low]]), np.ones((1, 2), bool), shift))
    strata, stratum = np.unique(first["cut"].to_numpy(), return_inverse=True)
    size = np.bincount(stratum, first["rows"].to_numpy()).astype(np.int64)
    search = _Search(
        strata, np.rint(size[:, None] * bounds(data.shares)).astype(np.int64), low, exact=by_time
    )
    search.open &= search.rank < size[:, None]
    both = np.concatenate([2 * stratum, 2 * stratum + 1])
    found = _summed(both, *(np.tile(first[name].to_numpy(), 2) for name in ("part", "rows")))
    while search.narrowed(found, shift):
        shift = max(shift - PART_BITS, 0)
        found = count(Looking(strata, search.low, search.open, shift))
    return Cuts(strata, search.at)


class _Search:
    """Cuts on the way to being found, [strata, 2] each."""

    def __init__(self, strata: np.ndarray, rank: np.ndarray, low: int, exact: bool) -> None:
        self.rank = rank
        """How many rows of the stratum are to lie before it."""
        self.at = np.full(rank.shape, FAR)
        self.low = np.full(rank.shape, low, np.int64)
        self.below = np.zeros(rank.shape, np.int64)
        """Rows before `low`."""
        self.open = np.ones(rank.shape, bool)
        self.exact = exact
        """A cut is to be a key that there is; else any between two rows will do."""

    def narrowed(self, counts: pa.Table, shift: int) -> bool:
        """Look into the counts of all stretches; whether there is something left to be found."""
        cut, part, rows = (counts[name].to_numpy() for name in COUNTED.names)
        side = (cut // 2, cut % 2)
        ends = np.cumsum(rows)
        before = ends - rows
        # Within its cut, and with what lies below the stretch.
        first = np.maximum.accumulate(np.where(_first(cut), np.arange(len(cut)), 0))
        before = before - before[first] + self.below[side]
        holds = self.open[side] & (before <= self.rank[side]) & (self.rank[side] < before + rows)
        for i, j, where, n, least in zip(
            *(values[holds] for values in (*side, part, rows, before)), strict=True
        ):
            begins, rank = self.low[i, j] + (where << shift), self.rank[i, j]
            if shift == 0:  # of `n` equal keys, all go where more of them belong
                self.at[i, j] = begins if rank - least <= least + n - rank else begins + 1
            elif least == rank and not self.exact:
                self.at[i, j] = begins
            else:
                self.low[i, j], self.below[i, j] = begins, least
                continue
            self.open[i, j] = False
        return bool(self.open.any())
