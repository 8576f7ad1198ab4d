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
import pyarrow.compute as pc
import ray
import ray.data

from lib.artifacts import SPLITS, IndexRef
from lib.data import blocks, clean, dedup, grounding, near
from lib.data.blocks import Reading
from lib.data.clusters import LEFT_OUT
from lib.data.dedup import Reason
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
# What the near duplicates and the leakage check are found by; the bands are flat, some for each row.
NEAR_COLUMNS = ("worth", "group", "text_bands", "group_bands")
# Of `among`: no table of places has the row.
STAYS = -2


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
    usable: int = 0
    grouped: bool = False
    """Whether something else than its text decides the split of a row (`Prepared.groups`)."""
    sketched: Counter[str] = field(default_factory=Counter)
    """Name of its bands → of how many hashes the sketches of all usable rows would be at most."""
    changed: Counter[str] = field(default_factory=Counter)
    """Step of mending → rows that it changed."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Filter → rows that did not pass it."""
    samples: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    """Filter → the first of these rows: position, what was measured, how the text begins."""


@dataclass
class Written:
    """What the second pass wrote."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Name of a `dedup.Reason` → rows."""
    moved: int = 0
    """Rows that went into another split than their own text says, beside what they resemble."""
    leaking: int = 0
    """Rows that resemble one of a given split behind their own."""
    undersampled: int = 0
    redacted: Counter[str] = field(default_factory=Counter)
    """Kind → values, each once a row, and `rows` that have any."""
    refused: tuple[int, str] | None = None
    """Position of the first row that could not be encoded, and why."""
    splits: dict[str, SplitCount] = field(default_factory=lambda: {name: SplitCount() for name in SPLITS})


@dataclass(frozen=True)
class Found:
    """What was found of the rows between the passes: references to tables, each sorted by position."""

    rejected: Sequence[Any] = ()
    """Of `position`."""
    dropped: Sequence[Any] = ()
    """dedup.DROPPED."""
    placed: Sequence[Any] = ()
    """clusters.PLACED."""


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

    The hashes are a dataset of packed HASH_COLUMNS and NEAR_COLUMNS that lies in the object store while it is referred to.
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
        scanned.usable += counts["usable"]
        scanned.grouped |= counts["grouped"]
        scanned.sketched.update(counts["sketched"])
        scanned.changed.update(counts["changed"])
        scanned.rejected.update(counts["rejected"])
        for name, samples in counts["samples"].items():
            known = scanned.samples.setdefault(name, [])
            known += [tuple(sample) for sample in samples[: settings.data.clean.samples - len(known)]]
        scanned.unknown = scanned.unknown.merge(Unknown(**counts["unknown"]))
        scanned.files.update({int(index): rows for index, rows in counts["files"].items()})
    return scanned, hashes


def find_duplicates(reading: Reading, hashes: ray.data.Dataset, settings: Settings) -> ray.data.Dataset:
    """Shuffle by hash; a dataset of dedup.DROPPED, each block sorted by position."""
    flat = hashes.map_batches(
        blocks.unpack, fn_kwargs={"names": HASH_COLUMNS}, batch_size=None, batch_format="pyarrow"
    )
    groups = flat.groupby("partition", num_partitions=_partitions(reading))
    found = groups.map_groups(
        dedup.find_duplicates, fn_kwargs={"ranks": reading.ranks(settings)}, batch_format="pyarrow"
    )
    # A block holds what was found in several partitions, one after the other.
    return found.map_batches(dedup.by_position, batch_size=None, batch_format="pyarrow").materialize()


def find_rejected(scanned: Scanned, hashes: ray.data.Dataset) -> ray.data.Dataset | None:
    """A dataset of the positions that `data.clean` has left out, each block sorted; None where there are none."""
    rows = sum(scanned.rejected.values())
    if not rows:
        return None
    found = hashes.map_batches(
        blocks.unpack, fn_kwargs={"names": ("rejected",)}, batch_size=None, batch_format="pyarrow"
    )
    # A table for each of many blocks would cost each task of the next pass a look.
    merged = found.repartition(1 + rows * 8 // SHUFFLE_BYTES)
    return merged.map_batches(_positions, batch_size=None, batch_format="pyarrow").materialize()


def _positions(rows: pa.Table) -> pa.Table:
    return dedup.by_position(rows.rename_columns(["position"]))


def tables(*datasets: ray.data.Dataset | None) -> list[Any]:
    """References to the tables of what was found."""
    return [ref for dataset in datasets if dataset is not None for ref in dataset.to_arrow_refs()]


def write(
    reading: Reading,
    settings: Settings,
    packed: ray.data.Dataset,
    scanned: Scanned,
    found: Found,
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
            "found": found,
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
            first = (int(refused[0]), str(refused[1]))
            written.refused = min(written.refused or first, first)
            continue
        written.rows += block["rows"]
        written.dropped.update(block["dropped"])
        written.moved += block["moved"]
        written.leaking += block["leaking"]
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
    """What decides the split, of usable rows alone: `low`, or the same of the task's own groups."""
    worth: np.ndarray
    """float64, of usable rows alone: which of near duplicates stays."""
    cleaned: clean.Cleaned

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
    usable[list(prepared.malformed)] = False
    high, low = dedup.hash_texts(prepared.texts.filter(pa.array(usable)))
    groups = prepared.groups
    group = low if groups is None else dedup.hash_texts(groups.filter(pa.array(usable)))[1]
    if data.near.keep == "longest":
        said = prepared.compared if prepared.compared is not None else prepared.texts
        worth = np.asarray(pc.utf8_length(said).fill_null(0)).astype(float)
    worth = np.zeros(rows.num_rows) if worth is None else worth
    return Ready(prepared, out, usable, high, low, group, worth[usable], cleaned)


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


def scan_block(row: pa.Table, columns: Sequence[str], settings: Settings, partitions: int) -> pa.Table:
    """Runs in a task: counts and hashes of one block."""
    block = blocks.from_row(row, columns)
    ready = prepare(block.rows, settings)
    prepared, cleaned = ready.prepared, ready.cleaned
    positions = block.rows[blocks.POSITION].to_numpy()
    empty = prepared.empty & ~ready.rejected
    first_wrong = min(prepared.malformed, default=None)
    bands, sketched = _bands(ready, settings.data)
    files, file_rows = np.unique(positions >> blocks.ROW_BITS, return_counts=True)
    counts = {
        "rows": len(positions),
        "empty": int(empty.sum()),
        "unlabelled": int((~empty & ~ready.rejected & (prepared.labels == MISSING)).sum()),
        "malformed": None
        if first_wrong is None
        else [int(positions[first_wrong]), prepared.malformed[first_wrong]],
        "unknown": asdict(Unknown.among(prepared.values, prepared.labels, positions)),
        "files": dict(zip(files.tolist(), file_rows.tolist(), strict=True)),
        "usable": int(ready.usable.sum()),
        "grouped": prepared.groups is not None,
        "sketched": sketched,
        **_cleaned(cleaned, positions, settings.data.clean.samples),
    }
    hashes = {
        "partition": dedup.partition_of(ready.high, partitions),
        "high": ready.high,
        "low": ready.low,
        "position": positions[ready.usable],
        "label": prepared.labels[ready.usable],
        "rejected": positions[ready.rejected],
        "worth": ready.worth,
        "group": ready.group,
        **bands,
    }
    scalars = {name: blocks.flat(row[name]) for name in ("fragment", "number", "problem")}
    return blocks.pack(
        {name: pa.array(values) for name, values in hashes.items()},
        {**scalars, "counts": pa.array([json.dumps(counts)])},
    )


def _cleaned(cleaned: clean.Cleaned, positions: np.ndarray, shown: int) -> dict[str, Any]:
    """What `data.clean` did in a block, for its counts."""
    samples: dict[str, list[tuple[int, str, str]]] = {}
    for row, (name, measured, text) in sorted(cleaned.rejected.items()):
        known = samples.setdefault(name, [])
        if len(known) < shown:
            known.append((int(positions[row]), measured, text))
    return {
        "changed": cleaned.changed,
        "rejected": Counter(name for name, _, _ in cleaned.rejected.values()),
        "samples": samples,
    }


def _bands(ready: Ready, data: DataSettings) -> tuple[dict[str, np.ndarray], dict[str, int]]:
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


def write_block(
    row: pa.Table,
    reading: Reading,
    settings: Settings,
    first_shards: Sequence[int],
    found: Found,
    uri: str,
    knowledge: IndexRef | None = None,
) -> pa.Table:
    """Runs in a task: one block's shards; its counts."""
    # Tasks run side by side already; each with a tokeniser of many threads would only contend.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    task, data = load_task(settings.task), settings.data
    block = blocks.from_row(row, list(reading.columns))
    ready = prepare(block.rows, settings, ray.get(list(found.rejected)))
    positions = block.rows[blocks.POSITION].to_numpy()[ready.usable]
    reasons = dedup.among(ray.get(list(found.dropped)), positions, "reason", 0)
    placed = dedup.among(ray.get(list(found.placed)), positions, "place", STAYS)
    moved, leaking = (reasons == 0) & (placed >= 0), (reasons == 0) & (placed == LEFT_OUT)
    keep = reasons == 0
    if data.leakage == "check":
        keep &= ~leaking
    rows = ready.prepared.rows
    for name in data.slices:
        rows = rows.append_column(name, block.rows[name])
    ids = dedup.row_ids(ready.high, positions if data.duplicates == "keep" else None)
    rows = rows.filter(pa.array(ready.usable)).add_column(0, "id", ids).filter(pa.array(keep))
    given = reading.splits(positions)
    places = np.where(given < 0, assign(ready.group, data), given)
    if data.leakage == "check":
        places = np.where(moved, placed, places)
    places = places[keep].astype(np.int8)
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
        "dropped": {reason.name.lower(): int((reasons == reason).sum()) for reason in Reason},
        "moved": int(moved.sum()),
        "leaking": int(leaking.sum() + (reasons == Reason.LEAKING).sum()),
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
