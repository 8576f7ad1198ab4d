"""The columns of a block as its task understands them: mended, judged, normalised and hashed. Every pass takes these steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import times
from lib.data import blocks, clean
from lib.data.alike import dedup, near
from lib.data.splitting import split
from lib.settings import DataSettings, Settings
from lib.tasks import Prepared, load_task
from lib.text import is_empty


@dataclass(frozen=True)
class Ready:
    """A block after the steps that all passes take."""

    prepared: Prepared
    rejected: np.ndarray
    """Bool [rows]: `data.clean` leaves them out."""
    usable: np.ndarray
    """Rows of the right form that say something, have a known label and are not rejected."""
    high: np.ndarray
    low: np.ndarray
    """Hash of the text, of usable rows alone."""
    group: np.ndarray
    """What decides the split, of usable rows alone: `low`, or the same of the task's own groups, or of `data.split.group`."""
    said: np.ndarray
    """The same without `data.split.group`."""
    worth: np.ndarray
    """float64, of usable rows alone: which of near duplicates stays."""
    cleaned: clean.Cleaned
    seconds: np.ndarray | None = None
    """int64, of usable rows alone: when, where `data.split` goes by time."""

    def compared(self, by_group: bool) -> list[str | None]:
        """The texts that near duplicates are told by, or those that decide the split; of usable rows alone."""
        said = self.prepared.compared if self.prepared.compared is not None else self.prepared.texts
        texts = self.prepared.groups if by_group and self.prepared.groups is not None else said
        kept: list[str | None] = texts.filter(pa.array(self.usable)).to_pylist()
        return kept


def prepare(rows: pa.Table, settings: Settings, rejected: Sequence[Any] | None = None) -> Ready:
    """The columns of a block as the task understands them. `rejected` are the tables of what an earlier pass has left out;
    without them `data.clean` judges."""
    task, data = load_task(settings.task), settings.data
    columns = {name: blocks.flat(rows[name]) for name in rows.column_names}
    worth = columns.pop("worth", None)
    owners, moments = columns.pop(split.GROUP, None), columns.pop(split.TIME, None)
    cleaned = clean.clean(columns, clean.texts(task), task.LISTS, data.clean, judge=rejected is None)
    if rejected is None:
        out = np.zeros(rows.num_rows, bool)
        out[list(cleaned.rejected)] = True
    else:
        positions = columns[blocks.POSITION].to_numpy()
        out = dedup.among(rejected, positions, blocks.POSITION, -1) >= 0
    prepared = task.prepare(cleaned.without(out, clean.texts(task)), data)
    usable = ~prepared.empty & (prepared.labels >= 0) & ~out
    if worth is not None:
        worth = _numbers(worth, usable, prepared.malformed)
    seconds = None if moments is None else _seconds(moments, usable, prepared.malformed)
    usable[list(prepared.malformed)] = False
    high, low = dedup.hash_texts(prepared.texts.filter(pa.array(usable)))
    groups = prepared.groups
    group = said_by = low if groups is None else dedup.hash_texts(groups.filter(pa.array(usable)))[1]
    if owners is not None:
        owners = pc.utf8_trim_whitespace(owners.filter(pa.array(usable)))
        group = np.where(is_empty(owners), said_by, dedup.hash_texts(owners)[1])
    if data.near.keep == "longest":
        said = prepared.compared if prepared.compared is not None else prepared.texts
        worth = np.asarray(pc.utf8_length(said).fill_null(0)).astype(float)
    worth = np.zeros(rows.num_rows) if worth is None else worth
    seconds = None if seconds is None else seconds[usable]
    return Ready(prepared, out, usable, high, low, group, said_by, worth[usable], cleaned, seconds)


def _seconds(values: pa.Array, usable: np.ndarray, malformed: dict[int, str]) -> np.ndarray:
    """int64 [rows] of `data.split.time`, 0 for rows that are not usable; what is no time is told in `malformed`."""
    found = np.zeros(len(values), np.int64)
    found[usable], wrong = times.column(values.filter(pa.array(usable)), assume_utc=True)
    for row, why in wrong.items():
        place = int(np.flatnonzero(usable)[row])
        malformed.setdefault(place, f"is wrong in the column of data.split.time: {why}")
    return found


def _numbers(values: pa.Array, usable: np.ndarray, malformed: dict[int, str]) -> np.ndarray:
    """float64 [rows] of `data.near.column`, -inf for none; what is no number is told in `malformed`."""
    numbers = np.full(len(values), -np.inf)
    for row, value in enumerate(values.to_pylist()):
        if value is None or not value.strip():
            continue
        try:
            numbers[row] = float(value)
        except ValueError:
            numbers[row] = np.nan
        if np.isnan(numbers[row]):
            numbers[row] = -np.inf
            if usable[row]:
                malformed.setdefault(
                    row, f"holds {value[:40]!r} in the column of data.near.column, which is no number"
                )
    return numbers


def bands(ready: Ready, data: DataSettings) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Keys of the bands of a block's rows, one row after the other, and the sizes of their sketches; none of what nobody
    will look for."""
    grouped = ready.prepared.groups is not None
    wanted = {
        "text_bands": data.near.duplicates == "drop" or (data.checks_leakage and not grouped),
        "group_bands": data.checks_leakage and grouped,
    }
    keys, sizes = dict.fromkeys(wanted, np.empty(0, np.int64)), {}
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        found, sizes[name] = near.band_keys(ready.compared(name == "group_bands"), data.near)
        keys[name] = found.ravel()
    return keys, sizes
