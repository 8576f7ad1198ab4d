"""Where splits part that go by time, or label by label, counted on Ray Data over the rows that stay (`lib.data.splitting.cuts`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Dataset

from lib.data import blocks
from lib.data.blocks import Reading
from lib.data.shuffles import staying
from lib.data.splitting.cuts import Looking, at_dates, counted, find, together
from lib.data.splitting.split import Cuts, keys
from lib.data.stream import parallel_tasks, tables
from lib.settings import DataSettings, Settings


def find_cuts(reading: Reading, settings: Settings, hashes: Dataset, *dropped: Dataset | None) -> Cuts | None:
    """Of the rows of `passes.scan`'s hashes that are not `dropped` and have no given split; None where a row's place is
    its own affair."""
    data = settings.data
    if data.split.dates:
        return at_dates(data)
    if data.split.by not in ("time", "stratified") or max(data.shares.values()) == 1:
        return None
    away = tables(*dropped)

    def count(looking: Looking) -> pa.Table:
        found = hashes.map_batches(
            count_rows,
            fn_kwargs={"data": data, "given": reading.given, "away": away, "looking": looking},
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
        )
        return together(found.iter_batches(batch_size=None, batch_format="pyarrow"))

    return find(count, data)


def count_rows(
    rows: pa.Table, data: DataSettings, given: np.ndarray, away: Sequence[Any], looking: Looking
) -> pa.Table:
    """Runs in a task: what `cuts.counted` says of packed rows."""
    position, stays = staying(rows, away)
    mine = stays & (given[position >> blocks.ROW_BITS] < 0)
    by_time = data.split.by == "time"
    found = blocks.unpack(rows, ["group", "label", *(["time"] if by_time else [])])
    seconds = found["time"].to_numpy() if by_time else None
    strata, key = keys(data, found["group"].to_numpy(), found["label"].to_numpy(), seconds)
    return counted(strata[mine], key[mine], looking)
