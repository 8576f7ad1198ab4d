"""The tables of items and users, on Ray Data: what an encoder reads of an item, categories and numbers.

Item texts are normalised and tokenised by the tasks that read them, and go from there to storage.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from lib import storage
from lib.data import blocks, stream
from lib.data.blocks import Reading
from lib.data.redact import Rules
from lib.data.shards import shard_name
from lib.encoders import base_tokenizer, lists
from lib.errors import DataError
from lib.recommender.items import JOINT
from lib.settings import ItemSettings, ModelSettings, TableSettings
from lib.text import normalise


def prepare(rows: dict[str, pa.Array], table: TableSettings) -> tuple[pa.Table, tuple[int, str] | None]:
    """Columns of a source, all as strings → `id`, `title`, `text` (of items), `categories` list<string> and `numbers`
    list<float32>, NaN for an empty one; and the first row that cannot be read, with the reason."""
    ids = pc.utf8_trim_whitespace(rows["id"])
    malformed = {
        int(row): f"has no {table.id}"
        for row in np.flatnonzero(np.asarray(pc.fill_null(pc.equal(ids, ""), True)))
    }
    found = {"id": ids}
    if isinstance(table, ItemSettings):
        texts = [normalise(rows[f"text.{place}"]).to_pylist() for place in range(len(table.text))]
        found["title"] = pa.array([text or "" for text in texts[0]], pa.string())
        found["text"] = pa.array(
            [JOINT.join(text.rstrip(".") for text in said if text) for said in zip(*texts, strict=True)],
            pa.string(),
        )
    found["categories"] = _categories(rows, table)
    numbers = np.full((len(ids), len(table.numbers)), np.nan, np.float32)
    for place, column in enumerate(table.numbers):
        for row, value in enumerate(rows[f"numbers.{place}"].to_pylist()):
            try:
                numbers[row, place] = float(value) if value and value.strip() else np.nan
            except ValueError:
                malformed.setdefault(row, f"has the {column} {value!r}, which is no number")
    flat = pa.array(numbers.ravel())
    found["numbers"] = (
        pa.FixedSizeListArray.from_arrays(flat, len(table.numbers))
        if table.numbers
        else pa.array([[]] * len(ids), pa.list_(pa.float32()))
    )
    first = min(malformed, default=None)
    return pa.table(found), None if first is None else (first, malformed[first])


def _categories(rows: dict[str, pa.Array], table: TableSettings) -> pa.Array:
    """`COLUMN=value` of every value, in the order of the columns."""
    found: list[list[str]] = [[] for _ in range(len(rows["id"]))]
    for place, column in enumerate(table.categories):
        for row, text in enumerate(rows[f"categories.{place}"].to_pylist()):
            parts = (text or "").split(table.separator)
            found[row] += [f"{column}={part.strip()}" for part in parts if part.strip()]
    return pa.array(found, pa.list_(pa.string()))


def prepare_block(row: pa.Table, names: list[str], table: TableSettings) -> pa.Table:
    """Runs in a task: one block's `prepare` as a row of lists, with its `position`."""
    block = blocks.from_row(row, names)
    found, malformed = prepare({name: blocks.flat(block.rows[name]) for name in names}, table)
    positions = block.rows[blocks.POSITION].to_numpy()
    wrong = malformed and [int(positions[malformed[0]]), malformed[1]]
    columns = {name: blocks.flat(found[name]) for name in found.column_names}
    redacted = blocks.flat(row["redacted"]) if "redacted" in row.column_names else pa.array(["{}"])
    scalars: dict[str, Any] = {name: blocks.flat(row[name]) for name in ("fragment", "number", "problem")}
    return blocks.pack(
        columns | {blocks.POSITION: pa.array(positions)},
        {**scalars, "malformed": pa.array([json.dumps(wrong)]), "redacted": redacted},
    )


@dataclass(frozen=True)
class Table:
    """A table of items or users that was read: its rows lie in the object store."""

    ids: pa.Array
    """string, in the order of the source."""
    prepared: ray.data.Dataset
    """Of packed blocks."""
    blocks: list[tuple[int, int, int]]
    """Fragment, number and rows of each block, in the order of the source."""
    redacted: Counter[str] = field(default_factory=Counter)
    """Of the texts: kind → values, each once a row, and `rows` that have any."""


def read(reading: Reading, table: TableSettings, rules: Rules | None = None) -> Table:
    """Read a table on the connected cluster; its texts, but not its ids and categories, without what `rules` find. Raises DataError for the first row that cannot be read, and for an id that
    is there twice."""
    texts = frozenset(name for name in reading.columns if name.startswith("text."))
    packed = stream.packed_blocks(reading, "table")
    prepared = (
        stream.without_personal_data(packed, list(reading.columns), texts, rules)
        .map_batches(
            prepare_block,
            fn_kwargs={"names": list(reading.columns), "table": table},
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=stream.parallel_tasks()),
        )
        .materialize()
    )
    found = []
    names = ["fragment", "number", "problem", "malformed", "redacted", "id", blocks.POSITION]
    for batch in prepared.select_columns(names).iter_batches(batch_size=None, batch_format="pyarrow"):
        found += [batch.slice(row, 1) for row in range(batch.num_rows)]
    found.sort(key=lambda row: (row["fragment"][0].as_py(), row["number"][0].as_py()))
    for row in found:
        if problem := row["problem"][0].as_py():
            raise DataError(problem)
        if malformed := json.loads(row["malformed"][0].as_py()):
            raise DataError(f"{reading.place(malformed[0])} {malformed[1]}")
    flat = blocks.unpack(pa.concat_tables(found), ["id", blocks.POSITION]) if found else None
    if flat is None or not flat.num_rows:
        raise DataError(f"the source {reading.files[0].name} holds no rows")
    ids = blocks.flat(flat["id"])
    numbers = pc.index_in(ids, pc.unique(ids)).to_numpy()
    twice = np.flatnonzero(numbers != np.arange(len(numbers)))
    if len(twice):
        row = int(twice[0])
        place = reading.place(flat[blocks.POSITION][row].as_py())
        raise DataError(
            f"{place} has the {table.id} {ids[row].as_py()!r} of a row before it; give each one row"
        )
    counts = [(row["fragment"][0].as_py(), row["number"][0].as_py(), len(row["id"][0])) for row in found]
    redacted: Counter[str] = Counter()
    for row in found:
        redacted.update(json.loads(row["redacted"][0].as_py()))
    return Table(ids, prepared, counts, redacted)


def write_items(
    table: Table, chosen: np.ndarray, seen: np.ndarray, model: ModelSettings, uri: str
) -> list[dict[str, Any]]:
    """Tokenise the items of bool `chosen` [rows of the table] and write them under `uri`/items, a shard a block, in the
    order of the source; `seen` int32 [items chosen] goes with them. Returns what each shard holds: shard, rows, tokens."""
    ends = np.cumsum([rows for _, _, rows in table.blocks])
    numbers = np.cumsum(chosen) - 1
    parts: dict[tuple[int, int], tuple[int, np.ndarray, np.ndarray]] = {}
    for (fragment, number, rows), end in zip(table.blocks, ends, strict=True):
        mask = chosen[end - rows : end]
        first = int(numbers[end - rows : end][mask][0]) if mask.any() else 0
        parts[fragment, number] = (len(parts), mask, seen[first : first + int(mask.sum())])
    written = table.prepared.map_batches(
        write_block,
        fn_kwargs={"parts": ray.put(parts), "model": model, "uri": uri},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=stream.parallel_tasks()),
    )
    found = [json.loads(row["written"]) for row in stream.rows_of(written)]
    return sorted((one for one in found if one), key=lambda one: str(one["shard"]))


def write_block(row: pa.Table, parts: Any, model: ModelSettings, uri: str) -> pa.Table:
    """Runs in a task: one block's items → a shard."""
    shard, mask, seen = ray.get(parts)[row["fragment"][0].as_py(), row["number"][0].as_py()]
    if not mask.any():
        return pa.table({"written": ["null"]})
    names = ["id", "title", "text", "categories", "numbers"]
    rows = blocks.unpack(row, names).filter(pa.array(mask)).rename_columns(["item", *names[1:]])
    encoded = base_tokenizer(model.base, model.max_length).encode_batch(rows["text"].to_pylist())
    ids, lengths = lists([np.array(one.ids, np.int32) for one in encoded])
    rows = rows.append_column("input_ids", ids).append_column("length", lengths)
    rows = rows.append_column("interactions", pa.array(seen, pa.int32()))
    name = shard_name(shard)
    with storage.open_file(storage.join(uri, "items", name), "wb") as file:
        pq.write_table(rows, file, compression="zstd")
    told = {"shard": name, "rows": rows.num_rows, "tokens": int(np.sum(lengths.to_numpy(), dtype=np.int64))}
    return pa.table({"written": [json.dumps(told)]})


def gather(table: Table, names: Sequence[str]) -> pa.Table:
    """Columns of all rows, in the order of the source: of a table that fits into one process."""
    found: dict[tuple[int, int], pa.Table] = {}
    for batch in table.prepared.select_columns(["fragment", "number", *names]).iter_batches(
        batch_size=None, batch_format="pyarrow"
    ):
        for place in range(batch.num_rows):
            row = batch.slice(place, 1)
            found[row["fragment"][0].as_py(), row["number"][0].as_py()] = blocks.unpack(row, names)
    return pa.concat_tables([found[key] for key in sorted(found)])
