"""Rows of a source that say who did something with an item → interactions, on Ray Data.

Tasks read and look at blocks; what they hand back are numbers and the names of users and items, each once a block.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from lib import times
from lib.data import blocks, stream
from lib.data.blocks import Reading
from lib.data.recommending.interactions import Interactions, events, in_order
from lib.errors import DataError
from lib.settings import DataSettings

NUMBERS = {
    "user": pa.int32(),
    "item": pa.int32(),
    "time": pa.int64(),
    "weight": pa.float32(),
    "event": pa.int16(),
}


@dataclass
class Looked:
    """Rows of a block as interactions; users and items are numbers of the block's own names."""

    users: pa.Array
    items: pa.Array
    interactions: Interactions
    dropped: Counter[str] = field(default_factory=Counter)
    """Why rows do not count → how many."""
    malformed: tuple[int, str] | None = None
    """The first row that cannot be one, and why."""


def columns(data: DataSettings) -> dict[str, str]:
    """Name here → column of the source."""
    named = {name: getattr(data.columns, name) for name in ("user", "item", "time", "value", "event")}
    return {name: column for name, column in named.items() if column is not None}


def look(rows: dict[str, pa.Array], data: DataSettings) -> Looked:
    """Columns of a block, all as strings. A row that shows no interest is dropped, one that cannot be read is malformed."""
    rules, count = data.interactions, len(rows["user"])
    names = {name: pc.utf8_trim_whitespace(rows[name]) for name in ("user", "item")}
    time, wrong = times.column(rows["time"])
    malformed = {row: f"is wrong in {data.columns.time!r}: {why}" for row, why in wrong.items()}
    for name, values in names.items():
        empty = np.asarray(pc.fill_null(pc.equal(values, ""), True))
        for row in np.flatnonzero(empty).tolist():
            malformed[row] = f"has no {getattr(data.columns, name)}"
    counts, dropped = np.ones(count, bool), Counter[str]()
    if rules.least_value is not None:
        value, unread = _numbers(rows["value"])
        malformed |= {row: f"is wrong in {data.columns.value!r}: {why}" for row, why in unread.items()}
        counts = value >= rules.least_value
        dropped["below least_value"] = int((~counts).sum())
    event, weight = np.zeros(count, np.int16), np.ones(count, np.float32)
    if rules.weights:
        given = pc.utf8_trim_whitespace(rows["event"])
        event = np.asarray(pc.fill_null(pc.index_in(given, pa.array(events(rules))), -1), np.int16)
        weight = np.array([*rules.weights.values(), 0.0], np.float32)[event]
        dropped["other event"] = int((counts & (event < 0)).sum())
        counts &= event >= 0
    if malformed:
        first = min(malformed)
        return Looked(pa.array([]), pa.array([]), Interactions.none(), dropped, (first, malformed[first]))
    users, items = (names[name].filter(pa.array(counts)).dictionary_encode() for name in ("user", "item"))
    found = Interactions(
        np.asarray(users.indices, np.int32),
        np.asarray(items.indices, np.int32),
        time[counts],
        weight[counts],
        event[counts],
    )
    return Looked(users.dictionary, items.dictionary, found, dropped)


def _numbers(values: pa.Array) -> tuple[np.ndarray, dict[int, str]]:
    """float64 [rows], and row → what is wrong with it."""
    found, wrong = np.zeros(len(values)), {}
    for row, text in enumerate(values.to_pylist()):
        try:
            found[row] = float(text or "")
        except ValueError:
            wrong[row] = f"{text!r} is no number"
        else:
            if not np.isfinite(found[row]):
                wrong[row] = f"{text!r} is no number"
    return found, wrong


@dataclass(frozen=True)
class Behaviour:
    """All of a source: interactions in order, with the names of their users and items."""

    interactions: Interactions
    users: pa.Array
    """string: name of each user, in the order of the names."""
    items: pa.Array
    rows: int
    dropped: dict[str, int]


def read(reading: Reading, data: DataSettings) -> Behaviour:
    """Read and look at all of it on the connected cluster. Raises DataError for the first row that cannot be read."""
    looked = stream.packed_blocks(reading, "interactions").map_batches(
        look_block,
        fn_kwargs={"columns": list(reading.columns), "data": data},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=stream.parallel_tasks()),
    )
    found = []
    for batch in looked.iter_batches(batch_size=None, batch_format="pyarrow"):
        found += [batch.slice(row, 1) for row in range(batch.num_rows)]
    found.sort(key=lambda row: (row["fragment"][0].as_py(), row["number"][0].as_py()))
    dropped, rows = Counter[str](), 0
    for row in found:
        if problem := row["problem"][0].as_py():
            raise DataError(problem)
        counts = json.loads(row["counts"][0].as_py())
        if counts["malformed"]:
            position, why = counts["malformed"]
            raise DataError(f"{reading.place(position)} {why}")
        dropped.update(counts["dropped"])
        rows += counts["rows"]
    return Behaviour(*_joined(found), rows=rows, dropped=dict(dropped))


def look_block(row: pa.Table, columns: list[str], data: DataSettings) -> pa.Table:
    """Runs in a task: one block as a row of lists."""
    block = blocks.from_row(row, columns)
    found = look({name: blocks.flat(block.rows[name]) for name in columns}, data)
    positions = block.rows[blocks.POSITION].to_numpy()
    malformed = found.malformed and (int(positions[found.malformed[0]]), found.malformed[1])
    counts = {"rows": len(positions), "dropped": found.dropped, "malformed": malformed}
    scalars: dict[str, Any] = {name: blocks.flat(row[name]) for name in ("fragment", "number", "problem")}
    parts = found.interactions
    return blocks.pack(
        {name: pa.array(getattr(parts, name), kind) for name, kind in NUMBERS.items()}
        | {"users": found.users.cast(pa.string()), "items": found.items.cast(pa.string())},
        {**scalars, "counts": pa.array([json.dumps(counts)])},
    )


def _joined(found: list[pa.Table]) -> tuple[Interactions, pa.Array, pa.Array]:
    """Blocks as one, with numbers that do not depend on how the source was cut: by the order of the names."""
    names: dict[str, pa.Array] = {}
    for name in ("users", "items"):
        texts = [_list(row, name) for row in found]
        names[name] = (
            pc.unique(pa.chunked_array(texts, pa.string())).sort() if texts else pa.array([], pa.string())
        )
    parts = []
    for row in found:
        columns = {name: _list(row, name).to_numpy() for name in NUMBERS}
        for name in ("user", "item"):
            here = pc.index_in(_list(row, f"{name}s"), names[f"{name}s"]).to_numpy()
            columns[name] = here.astype(np.int32)[columns[name]]
        parts.append(columns)
    joined = {
        name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0) for name in NUMBERS
    }
    return in_order(Interactions(**joined)), names["users"], names["items"]


def _list(row: pa.Table, name: str) -> pa.Array:
    """The list in a column of one row."""
    return blocks.flat(row[name]).flatten()
