"""The first pass over a source on Ray Data, and the shuffle that finds equal texts.

Tasks hand back counts as JSON in small tables; the driver adds them up. Nothing here raises for what is
wrong with the data: it is counted, so that the job can report the first problem in source order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from lib.data import blocks, clean
from lib.data.alike import dedup
from lib.data.blocks import Reading
from lib.data.examples import Examples, first_of, join_examples
from lib.data.reading import quarantine
from lib.data.reading.quarantine import Quarantined
from lib.data.ready import bands, prepare
from lib.data.redact import Rules
from lib.data.stream import SHUFFLE_BYTES, parallel_tasks, rows_of
from lib.labels import MISSING, Unknown
from lib.settings import Settings

HASH_COLUMNS = ("partition", "high", "low", "position", "label")
# What the near duplicates and the leakage check are found by; the bands are flat, some for each row.
NEAR_COLUMNS = ("worth", "group", "text_bands", "group_bands")


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
    entries = quarantine.set_aside(block, ready, settings, rules)
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
