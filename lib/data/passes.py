"""The two passes over a source on Ray Data, and the shuffle between them.

Tasks hand back counts as JSON in small tables; the driver adds them up. Nothing here raises for what is
wrong with the data: it is counted, so that the job can report the first problem in source order.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from lib.artifacts import SPLITS, IndexRef
from lib.data import blocks, dedup, grounding
from lib.data.blocks import Block, Reading
from lib.data.redact import Rules
from lib.data.redact.columns import redact
from lib.data.shards import SplitCount, write_shards
from lib.data.split import assign, kept
from lib.labels import MISSING, Unknown
from lib.progress import data_context
from lib.settings import DataSettings, Settings
from lib.tasks import Prepared, UnencodableError, load_task

# Ray Data ends a block once it holds this much. Blocks of ours are single rows, most of them larger.
RAY_BLOCK_BYTES = 1 << 20
# Blocks that may wait for each task in the object store.
AHEAD_BLOCKS = 2
SHUFFLE_BYTES = 64 << 20
SAY_SECONDS = 10
HASH_COLUMNS = ("partition", "high", "low", "position", "label")


@dataclass
class Scanned:
    """What the first pass found."""

    rows: int = 0
    empty: int = 0
    unlabelled: int = 0
    unknown: Unknown = field(default_factory=Unknown)
    files: Counter[int] = field(default_factory=Counter)
    """Index of the file → rows."""
    blocks: Counter[int] = field(default_factory=Counter)
    """Fragment → blocks."""
    problem: str | None = None
    """The first thing in the source that could not be read."""
    malformed: tuple[int, str] | None = None
    """Position of the first row of a wrong form, and what is wrong with it."""


@dataclass
class Written:
    """What the second pass wrote."""

    rows: int = 0
    duplicate: int = 0
    conflicting: int = 0
    undersampled: int = 0
    redacted: Counter[str] = field(default_factory=Counter)
    """Kind → values, each once a row, and `rows` that have any."""
    refused: tuple[int, str] | None = None
    """Position of the first row that could not be encoded, and why."""
    splits: dict[str, SplitCount] = field(default_factory=lambda: {name: SplitCount() for name in SPLITS})


def source(reading: Reading, texts: frozenset[str], rules: Rules | None, name: str) -> ray.data.Dataset:
    """The packed blocks that a pass begins with: personal data leaves the columns `texts` before anything else sees them.

    So texts are hashed without it, too: an id tells nothing about an address that was in its text, and texts that
    differ in nothing else are duplicates, of which no second one falls into another split.
    """
    return without_personal_data(packed_blocks(reading, name), list(reading.columns), texts, rules)


def without_personal_data(
    packed: ray.data.Dataset, columns: list[str], texts: frozenset[str], rules: Rules | None
) -> ray.data.Dataset:
    """Packed blocks with what was found in `redacted`, counts as JSON; as they are where there are no rules."""
    if rules is None or not texts:
        return packed
    return packed.map_batches(
        redact_block,
        fn_kwargs={"columns": columns, "texts": texts, "rules": rules},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
    )


def redact_block(row: pa.Table, columns: list[str], texts: frozenset[str], rules: Rules) -> pa.Table:
    """Runs in a task: one block without personal data."""
    block = blocks.from_row(row, columns)
    rows, counts = redact(block.rows, texts, rules)
    return blocks.to_row(replace(block, rows=rows)).append_column("redacted", pa.array([json.dumps(counts)]))


def scan(reading: Reading, settings: Settings, packed: ray.data.Dataset) -> tuple[Scanned, ray.data.Dataset]:
    """First pass, over packed blocks: count what is there and hash every usable text.

    The hashes are a dataset of packed HASH_COLUMNS that lies in the object store while it is referred to.
    """
    hashes = (
        packed.map_batches(
            scan_block,
            fn_kwargs={
                "columns": list(reading.columns),
                "settings": settings,
                "partitions": _partitions(reading),
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
        )
    ).materialize()
    found = rows_of(hashes.select_columns(["fragment", "number", "problem", "counts"]))
    scanned = Scanned()
    for row in sorted(found, key=lambda r: (r["fragment"], r["number"])):
        counts = json.loads(row["counts"])
        scanned.problem = scanned.problem or row["problem"]
        if scanned.malformed is None and counts["malformed"]:
            scanned.malformed = tuple(counts["malformed"])
        scanned.blocks[row["fragment"]] += 1
        scanned.rows += counts["rows"]
        scanned.empty += counts["empty"]
        scanned.unlabelled += counts["unlabelled"]
        scanned.unknown = scanned.unknown.merge(Unknown(**counts["unknown"]))
        scanned.files.update({int(index): rows for index, rows in counts["files"].items()})
    return scanned, hashes


def find_duplicates(reading: Reading, hashes: ray.data.Dataset) -> ray.data.Dataset:
    """Shuffle by hash; a dataset of dedup.DROPPED, each block sorted by position."""
    flat = hashes.map_batches(
        blocks.unpack, fn_kwargs={"names": HASH_COLUMNS}, batch_size=None, batch_format="pyarrow"
    )
    groups = flat.groupby("partition", num_partitions=_partitions(reading))
    found = groups.map_groups(dedup.find_duplicates, batch_format="pyarrow")
    # A block holds what was found in several partitions, one after the other.
    return found.map_batches(dedup.by_position, batch_size=None, batch_format="pyarrow").materialize()


def write(
    reading: Reading,
    settings: Settings,
    packed: ray.data.Dataset,
    scanned: Scanned,
    dropped: ray.data.Dataset | None,
    uri: str,
    say: Callable[[str], None],
    knowledge: IndexRef | None = None,
) -> Written:
    """Second pass: over the same blocks again, leave out what is dropped, encode, write the shards under `uri`. Dialogues get the
    passages that `knowledge` has for them.

    Where there is no terminal for bars, `say` gets a line of progress now and then.
    """
    first_shards = np.cumsum([0] + [scanned.blocks[i] for i in range(len(reading.fragments()))]).tolist()
    counts = packed.map_batches(
        write_block,
        fn_kwargs={
            "reading": reading,
            "settings": settings,
            "first_shards": first_shards,
            "dropped": dropped.to_arrow_refs() if dropped else [],
            "uri": uri,
            "knowledge": knowledge,
        },
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
    )
    written = Written()
    said = time.monotonic()
    for row in rows_of(counts):
        block = json.loads(row["counts"])
        if refused := block.get("refused"):
            found = (int(refused[0]), str(refused[1]))
            written.refused = min(written.refused or found, found)
            continue
        written.rows += block["rows"]
        written.duplicate += block["duplicate"]
        written.conflicting += block["conflicting"]
        written.undersampled += block["undersampled"]
        written.redacted.update(block["redacted"])
        for split, count in block["splits"].items():
            written.splits[split].add(SplitCount(**count))
        if time.monotonic() - said > SAY_SECONDS and not sys.stdout.isatty():
            said = time.monotonic()
            say(f"written {written.rows:,} of {scanned.rows:,} rows")
    return written


def _partitions(reading: Reading) -> int:
    return dedup.partitions(sum(file.size for file in reading.files))


def packed_blocks(reading: Reading, name: str) -> ray.data.Dataset:
    """A dataset of blocks, each packed into one row."""
    fragments = [
        {"fragment": i, "start": start, "end": end} for i, (start, end) in enumerate(reading.fragments())
    ]
    with ray.data.DataContext.current(_context()):
        source = ray.data.from_items(fragments, override_num_blocks=len(fragments))
        source.set_name(name)
        # Asking for another share of a CPU than the next step keeps Ray Data from fusing the two: one
        # reader then feeds many tasks, even when the source is a single file that cannot be cut.
        return source.map_batches(
            read,
            fn_kwargs={"reading": reading},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0.5,
            compute=ray.data.TaskPoolStrategy(size=min(parallel_tasks(), len(fragments))),
        )


def _context() -> ray.data.DataContext:
    """Ray Data's settings for both passes."""
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks", UserWarning)
    context = data_context()
    context.target_max_block_size = RAY_BLOCK_BYTES
    # Readers are faster than the tokeniser: without a limit they would fill the object store.
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=AHEAD_BLOCKS * blocks.BLOCK_BYTES * parallel_tasks()
    )
    # By default a map task of the shuffle takes 1 GiB of hashes at once.
    context.shuffle_input_batch_bytes = SHUFFLE_BYTES
    return context


def parallel_tasks() -> int:
    """How many tasks may run at a time: a local head has more logical CPUs than cores, and more tasks
    than cores only cost memory and start-up time."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    logical = int(sum(node["Resources"].get("CPU", 0) for node in nodes))
    return max(1, min(logical, os.cpu_count() or 1) if len(nodes) == 1 else logical)


def rows_of(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


def read(fragment: pa.Table, reading: Reading) -> Iterator[pa.Table]:
    """Runs in a task: the blocks of one fragment."""
    number, start, end = (fragment[name][0].as_py() for name in ("fragment", "start", "end"))
    for block in blocks.read_blocks(reading, number, (start, end)):
        yield blocks.to_row(block)


@dataclass(frozen=True)
class _Ready:
    """A block after the steps that both passes take."""

    prepared: Prepared
    usable: np.ndarray
    """Rows of the right form that say something and have a known label."""
    high: np.ndarray
    low: np.ndarray
    """Hash of the text, of usable rows alone."""
    group: np.ndarray
    """What decides the split, of usable rows alone: `low`, or the same of the task's own groups."""


def _prepare(block: Block, settings: Settings) -> _Ready:
    columns = {name: blocks.flat(block.rows[name]) for name in block.rows.column_names}
    prepared = load_task(settings.task).prepare(columns, settings.data)
    usable = ~prepared.empty & (prepared.labels >= 0)
    usable[list(prepared.malformed)] = False
    high, low = dedup.hash_texts(prepared.texts.filter(pa.array(usable)))
    groups = prepared.groups
    group = low if groups is None else dedup.hash_texts(groups.filter(pa.array(usable)))[1]
    return _Ready(prepared, usable, high, low, group)


def scan_block(row: pa.Table, columns: Sequence[str], settings: Settings, partitions: int) -> pa.Table:
    """Runs in a task: counts and hashes of one block."""
    block = blocks.from_row(row, columns)
    ready = _prepare(block, settings)
    prepared = ready.prepared
    positions = block.rows[blocks.POSITION].to_numpy()
    first_wrong = min(prepared.malformed, default=None)
    files, file_rows = np.unique(positions >> blocks.ROW_BITS, return_counts=True)
    counts = {
        "rows": len(positions),
        "empty": int(prepared.empty.sum()),
        "unlabelled": int((~prepared.empty & (prepared.labels == MISSING)).sum()),
        "malformed": None
        if first_wrong is None
        else [int(positions[first_wrong]), prepared.malformed[first_wrong]],
        "unknown": asdict(Unknown.among(prepared.values, prepared.labels, positions)),
        "files": dict(zip(files.tolist(), file_rows.tolist(), strict=True)),
    }
    hashes = {
        "partition": dedup.partition_of(ready.high, partitions),
        "high": ready.high,
        "low": ready.low,
        "position": positions[ready.usable],
        "label": prepared.labels[ready.usable],
    }
    scalars = {name: blocks.flat(row[name]) for name in ("fragment", "number", "problem")}
    return blocks.pack(
        {name: pa.array(values) for name, values in hashes.items()},
        {**scalars, "counts": pa.array([json.dumps(counts)])},
    )


def write_block(
    row: pa.Table,
    reading: Reading,
    settings: Settings,
    first_shards: Sequence[int],
    dropped: Sequence[Any],
    uri: str,
    knowledge: IndexRef | None = None,
) -> pa.Table:
    """Runs in a task: one block's shards; its counts."""
    # Tasks run side by side already; each with a tokeniser of many threads would only contend.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    task, data = load_task(settings.task), settings.data
    block = blocks.from_row(row, list(reading.columns))
    ready = _prepare(block, settings)
    positions = block.rows[blocks.POSITION].to_numpy()[ready.usable]
    gone, conflict = dedup.dropped_among(ray.get(list(dropped)), positions)
    keep = ~gone
    rows = ready.prepared.rows
    for name in data.slices:
        rows = rows.append_column(name, block.rows[name])
    ids = dedup.row_ids(ready.high, positions if data.duplicates == "keep" else None)
    rows = rows.filter(pa.array(ready.usable)).add_column(0, "id", ids).filter(pa.array(keep))
    given = reading.splits(positions[keep])
    places = np.where(given < 0, assign(ready.group[keep], data), given)
    spare = _undersampled(ready.prepared.labels[ready.usable][keep], places, ready.high[keep], data)
    rows = rows.filter(pa.array(~spare))
    try:
        splits = write_shards(
            rows if knowledge is None else grounding.ground(rows, settings, knowledge),
            places[~spare],
            first_shards[block.fragment] + block.number,
            uri,
            task,
            settings.model,
            task.classes(data),
        )
    except UnencodableError as error:
        refused = [int(positions[keep][~spare][error.row]), str(error)]
        return pa.table({"counts": [json.dumps({"refused": refused})]})
    counts = {
        "rows": block.rows.num_rows,
        "duplicate": int((gone & ~conflict).sum()),
        "conflicting": int(conflict.sum()),
        "undersampled": int(spare.sum()),
        "redacted": json.loads(row["redacted"][0].as_py()) if "redacted" in row.column_names else {},
        "splits": {name: asdict(count) for name, count in splits.items()},
    }
    return pa.table({"counts": [json.dumps(counts)]})


def _undersampled(
    classes: np.ndarray, splits: np.ndarray, hashes: np.ndarray, data: DataSettings
) -> np.ndarray:
    """Bool [rows]: training rows that `data.undersample` leaves out, the same ones in every run."""
    if not data.undersample:
        return np.zeros(len(classes), bool)
    shares = np.array([data.undersample.get(label, 1.0) for label in data.label_names])
    training = splits == SPLITS.index("train")
    spare: np.ndarray = training & ~kept(hashes, shares[classes], data.split.seed)
    return spare
