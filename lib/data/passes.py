"""The two passes over a source on Ray Data, and the shuffle between them.

Tasks hand back counts as JSON in small tables; the driver adds them up. Nothing here raises for what is
wrong with the data: it is counted, so that the job can report the first problem in source order.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from lib.artifacts import SPLITS, IndexRef
from lib.data import blocks, clean, dedup, grounding, noise, quarantine, weights
from lib.data.augment.making import Making, written_for
from lib.data.blocks import Reading
from lib.data.dedup import Reason
from lib.data.places import Found, places
from lib.data.quarantine import UNENCODABLE, Entry, Quarantined
from lib.data.ready import Ready, bands, prepare
from lib.data.redact import Rules
from lib.data.rows import beginning
from lib.data.shards import SplitCount, write_shards
from lib.data.stream import SHUFFLE_BYTES, parallel_tasks, rows_of
from lib.labels import MISSING, Unknown
from lib.settings import Settings
from lib.tasks import UnencodableError, load_task

SAY_SECONDS = 10
HASH_COLUMNS = ("partition", "high", "low", "position", "label")
# What the near duplicates and the leakage check are found by; the bands are flat, some for each row.
NEAR_COLUMNS = ("worth", "group", "text_bands", "group_bands")


# Why rows were left out → the first of them in source order: position, how the text begins.
Examples = dict[str, list[tuple[int, str]]]
SHOWN_TEXT = 120


def first_of(
    why: dict[str, np.ndarray], positions: np.ndarray, texts: pa.Array, shown: int
) -> dict[str, list[list[Any]]]:
    """Examples of a block, for its counts: of the rows of each mask bool [rows] the first `shown`."""
    found = {}
    for name, mask in why.items():
        if rows := np.flatnonzero(mask)[:shown].tolist():
            found[name] = [[int(positions[row]), (texts[row].as_py() or "")[:SHOWN_TEXT]] for row in rows]
    return found


def join_examples(known: Examples, more: dict[str, list[list[Any]]], shown: int) -> None:
    """Add those of a block, of any place in the source, to `known`."""
    for name, rows in more.items():
        joined = [*known.get(name, []), *((int(position), str(text)) for position, text in rows)]
        known[name] = sorted(joined)[:shown]


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
    quarantined: Quarantined = field(default_factory=Quarantined)
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
    examples: Examples = field(default_factory=dict)
    """Of rows that are `empty` or `unlabelled`."""


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
    augmented: Counter[str] = field(default_factory=Counter)
    """Method → new rows; `unchanged` and `known`: why some were not made."""
    sampled: list[Any] = field(default_factory=list)
    """Training rows among which wrong labels are looked for (`noise.sample`)."""
    thinned: int = 0
    """Training rows that the weight of their source leaves out."""
    repeated: int = 0
    """Rows that are there once more, by the weight of their source."""
    kept: dict[int, list[int]] = field(default_factory=dict)
    """Index of the file → rows of it in each of SPLITS."""
    redacted: Counter[str] = field(default_factory=Counter)
    """Kind → values, each once a row, and `rows` that have any."""
    refused: tuple[int, str] | None = None
    """Position of the first row that could not be encoded, and why."""
    quarantined: Quarantined = field(default_factory=Quarantined)
    """Those of the first pass, and rows that could not be encoded."""
    examples: Examples = field(default_factory=dict)
    """Of the rows of each `dropped`, and of those that are `moved`."""
    splits: dict[str, SplitCount] = field(default_factory=lambda: {name: SplitCount() for name in SPLITS})


def scan(
    reading: Reading, settings: Settings, packed: ray.data.Dataset, rules: Rules | None = None
) -> tuple[Scanned, ray.data.Dataset]:
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
                "rules": rules,
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
        scanned.quarantined.add(Quarantined.from_json(counts["quarantined"]))
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
        join_examples(scanned.examples, counts["examples"], settings.data.clean.samples)
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


def write(
    reading: Reading,
    settings: Settings,
    packed: ray.data.Dataset,
    scanned: Scanned,
    found: Found,
    uri: str,
    say: Callable[[str], None],
    knowledge: IndexRef | None = None,
    making: Making | None = None,
    rules: Rules | None = None,
) -> Written:
    """Second pass: over the same blocks again, leave out what is dropped, encode, write the shards under `uri`. Dialogues get the
    passages that `knowledge` has for them, and `making` makes further rows of those that train.

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
            "making": making,
            "usable": scanned.usable,
            "rules": rules,
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
        written.quarantined.add(Quarantined.from_json(block["quarantined"]))
        written.dropped.update(block["dropped"])
        written.moved += block["moved"]
        written.leaking += block["leaking"]
        written.undersampled += block["undersampled"]
        written.augmented.update(block["augmented"])
        written.sampled = noise.kept([*written.sampled, *block["sampled"]], settings.data)
        written.thinned += block["thinned"]
        written.repeated += block["repeated"]
        for index, rows in block["kept"].items():
            before = written.kept.get(int(index), [0] * len(SPLITS))
            written.kept[int(index)] = [a + b for a, b in zip(before, rows, strict=True)]
        written.redacted.update(block["redacted"])
        join_examples(written.examples, block["examples"], settings.data.clean.samples)
        for split, count in block["splits"].items():
            written.splits[split].add(SplitCount(**count))
        if time.monotonic() - said > SAY_SECONDS and not sys.stdout.isatty():
            said = time.monotonic()
            say(f"written {written.rows:,} of {scanned.rows:,} rows")
    return written


def _partitions(reading: Reading) -> int:
    return dedup.partitions(sum(file.size for file in reading.files))


def scan_block(
    row: pa.Table, columns: Sequence[str], settings: Settings, partitions: int, rules: Rules | None = None
) -> pa.Table:
    """Runs in a task: counts and hashes of one block."""
    block = blocks.from_row(row, columns)
    ready = prepare(block.rows, settings)
    prepared, cleaned = ready.prepared, ready.cleaned
    positions = block.rows[blocks.POSITION].to_numpy()
    empty = prepared.empty & ~ready.rejected
    unlabelled = ~empty & ~ready.rejected & (prepared.labels == MISSING)
    first_wrong = min(prepared.malformed, default=None)
    entries = _set_aside(block, ready, settings, rules)
    keys, sketched = bands(ready, settings.data)
    files, file_rows = np.unique(positions >> blocks.ROW_BITS, return_counts=True)
    counts = {
        "rows": len(positions),
        "empty": int(empty.sum()),
        "unlabelled": int(unlabelled.sum()),
        "examples": first_of(
            {"empty": empty, "unlabelled": unlabelled}, positions, prepared.texts, settings.data.clean.samples
        ),
        "malformed": None
        if first_wrong is None
        else [int(positions[first_wrong]), prepared.malformed[first_wrong]],
        "unknown": asdict(Unknown.among(prepared.values, prepared.labels, positions)),
        "files": dict(zip(files.tolist(), file_rows.tolist(), strict=True)),
        "quarantined": Quarantined.among(entries, block.bad).to_json(),
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
        **keys,
    }
    if ready.seconds is not None:
        hashes["time"] = ready.seconds
    if settings.data.augment:
        hashes["said"] = ready.said
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


def write_block(
    row: pa.Table,
    reading: Reading,
    settings: Settings,
    first_shards: Sequence[int],
    found: Found,
    uri: str,
    knowledge: IndexRef | None = None,
    making: Making | None = None,
    usable: int = 0,
    rules: Rules | None = None,
) -> pa.Table:
    """Runs in a task: one block's shards; its counts. `usable` rows there are in all."""
    # Tasks run side by side already; each with a tokeniser of many threads would only contend.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    task, data = load_task(settings.task), settings.data
    block = blocks.from_row(row, list(reading.columns))
    ready = prepare(block.rows, settings, ray.get(list(found.rejected)))
    positions = block.rows[blocks.POSITION].to_numpy()[ready.usable]
    labels = ready.prepared.labels[ready.usable]
    at = places(found, reading, data, positions, labels, ready.group, ready.high, ready.seconds)
    why = {reason.name.lower(): at.reasons == reason for reason in Reason}
    texts = ready.prepared.texts.filter(pa.array(ready.usable))
    if data.leakage == "check":
        why |= {"leaking": at.leaking | why["leaking"], "moved": at.moved}
    rows = ready.prepared.rows
    for name in data.slices:
        rows = rows.append_column(name, block.rows[name])
    ids = dedup.row_ids(ready.high, positions if data.duplicates == "keep" else None)
    rows = rows.filter(pa.array(ready.usable)).add_column(0, "id", ids).filter(pa.array(at.stays))
    split, sources = at.split[at.stays], np.flatnonzero(at.stays)
    copies = weights.copies(reading.weighed(positions[sources]), split, ready.high[sources], data.split.seed)
    wanted = copies > 0
    rows, split, sources, copies = (
        rows.filter(pa.array(wanted)),
        split[wanted],
        sources[wanted],
        copies[wanted],
    )
    sampled = noise.sample(rows, split, ready.high[sources], positions[sources], data, usable)
    made: Counter[str] = Counter()
    if making is not None:
        rows, split, of, made = making.added(rows, split, labels[sources], written_for(row), block)
        sources, copies = sources[of], copies[of]
    rows, chosen = weights.repeated(rows, copies)
    split, sources, again = split[chosen], sources[chosen], np.append(False, chosen[1:] == chosen[:-1])
    refused: dict[int, str] | None = {} if reading.bad_rows else None
    try:
        splits = write_shards(
            rows if knowledge is None else grounding.ground(rows, settings, knowledge, refused),
            split,
            first_shards[block.fragment] + block.number,
            uri,
            task,
            settings.model,
            task.classes(data),
            refused,
        )
    except UnencodableError as error:
        return pa.table(
            {"counts": [json.dumps({"refused": [int(positions[sources[error.row]]), str(error)]})]}
        )
    entries = _set_aside(block, ready, settings, rules)
    if refused:
        # New rows that were made of a row are refused with it, which is told once.
        whose = {int(sources[n]): why for n, why in refused.items()}
        more = [
            Entry(int(positions[n]), UNENCODABLE, why, beginning(texts[n].as_py()))
            for n, why in whose.items()
        ]
        entries += quarantine.without_personal_data(more, rules)
        entries.sort(key=lambda entry: entry.position)
    quarantine.write(entries, reading, block, uri)
    counts = {
        "rows": block.rows.num_rows,
        "dropped": {reason.name.lower(): int((at.reasons == reason).sum()) for reason in Reason},
        "quarantined": Quarantined.among(entries, block.bad).to_json(),
        "moved": int(at.moved.sum()),
        "leaking": int(at.leaking.sum() + (at.reasons == Reason.LEAKING).sum()),
        "undersampled": int(at.spare.sum()),
        "augmented": made,
        "sampled": sampled,
        "thinned": int((~wanted).sum()),
        "repeated": int(again.sum()) - sum(bool(again[n]) for n in refused or ()),
        "kept": weights.by_file(positions[sources], split, refused or ()),
        "examples": first_of(why, positions, texts, data.clean.samples),
        "redacted": json.loads(row["redacted"][0].as_py()) if "redacted" in row.column_names else {},
        "splits": {name: asdict(count) for name, count in splits.items()},
    }
    return pa.table({"counts": [json.dumps(counts)]})


def _set_aside(block: blocks.Block, ready: Ready, settings: Settings, rules: Rules | None) -> list[Entry]:
    """What both passes leave out of a block; nothing, where the first of them ends the job."""
    if not settings.data.quarantine.share:
        return []
    return quarantine.of_block(block, ready, load_task(settings.task).TEXTS, rules)
