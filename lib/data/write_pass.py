"""The second pass over a source on Ray Data: what stays of each block, tokenised, as shards.

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

from lib.artifacts import SPLITS
from lib.data import blocks, grounding, noise
from lib.data.alike import dedup
from lib.data.alike.dedup import Reason
from lib.data.augment.making import Making, written_for
from lib.data.examples import Examples, first_of, join_examples
from lib.data.passes import Scanned
from lib.data.places import Found, Places, places
from lib.data.plan import Plan
from lib.data.reading import quarantine
from lib.data.reading.quarantine import UNENCODABLE, Entry, Quarantined
from lib.data.reading.rows import beginning
from lib.data.ready import Ready, prepare
from lib.data.shards import SplitCount, write_shards
from lib.data.splitting import weights
from lib.data.stream import parallel_tasks, rows_of
from lib.tasks import UnencodableError, load_task

SAY_SECONDS = 10


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


@dataclass(frozen=True)
class Writing:
    """What every task of the second pass knows."""

    plan: Plan
    uri: str
    """Under which the shards lie."""
    found: Found
    first_shards: Sequence[int]
    """Fragment → number of its first shard."""
    usable: int
    """Rows that there are in all."""
    making: Making | None
    """Makes further rows of those that train."""

    @classmethod
    def of(cls, plan: Plan, uri: str, scanned: Scanned, found: Found, making: Making | None) -> Writing:
        """After the first pass."""
        shards = [scanned.blocks[fragment] for fragment in range(len(plan.reading.fragments()))]
        return cls(plan, uri, found, np.cumsum([0, *shards]).tolist(), scanned.usable, making)


def write(job: Writing, packed: ray.data.Dataset, rows: int, say: Callable[[str], None]) -> Written:
    """Second pass: over the same blocks again, `rows` rows in all, leave out what is dropped, encode, write the shards.

    Where there is no terminal for bars, `say` gets a line of progress now and then.
    """
    counts = packed.map_batches(
        write_block,
        fn_kwargs={"job": job},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
    )
    written, data = Written(), job.plan.settings.data
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
        written.sampled = noise.kept([*written.sampled, *block["sampled"]], data)
        written.thinned += block["thinned"]
        written.repeated += block["repeated"]
        for index, kept in block["kept"].items():
            before = written.kept.get(int(index), [0] * len(SPLITS))
            written.kept[int(index)] = [a + b for a, b in zip(before, kept, strict=True)]
        written.redacted.update(block["redacted"])
        join_examples(written.examples, block["examples"], data.clean.samples)
        for split, count in block["splits"].items():
            written.splits[split].add(SplitCount(**count))
        if time.monotonic() - said > SAY_SECONDS and not sys.stdout.isatty():
            said = time.monotonic()
            say(f"written {written.rows:,} of {rows:,} rows")
    return written


@dataclass
class Chosen:
    """What of a block is written."""

    rows: pa.Table
    split: np.ndarray
    """int8 [rows]: index into SPLITS."""
    sources: np.ndarray
    """int64 [rows]: which of the block's usable rows each is, or was made of."""
    again: np.ndarray
    """Bool [rows]: there once more, by the weight of its source."""
    thinned: int
    """Rows that the weight of their source leaves out."""
    made: Counter[str]
    """As `Written.augmented`."""
    sampled: list[Any]
    """As `Written.sampled`."""


def write_block(row: pa.Table, job: Writing) -> pa.Table:
    """Runs in a task: one block's shards; its counts."""
    # Tasks run side by side already; each with a tokeniser of many threads would only contend.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reading, settings, rules = job.plan.reading, job.plan.settings, job.plan.rules
    task, data = load_task(settings.task), settings.data
    block = blocks.from_row(row, list(reading.columns))
    ready = prepare(block.rows, settings, ray.get(list(job.found.rejected)))
    positions = block.rows[blocks.POSITION].to_numpy()[ready.usable]
    texts = ready.prepared.texts.filter(pa.array(ready.usable))
    labels = ready.prepared.labels[ready.usable]
    at = places(job.found, reading, data, positions, labels, ready.group, ready.high, ready.seconds)
    chosen = _chosen(row, block, ready, at, job)
    refused: dict[int, str] | None = {} if reading.bad_rows else None
    knowledge = job.plan.knowledge
    try:
        splits = write_shards(
            chosen.rows if knowledge is None else grounding.ground(chosen.rows, settings, knowledge, refused),
            chosen.split,
            job.first_shards[block.fragment] + block.number,
            job.uri,
            task,
            settings.model,
            task.classes(data),
            refused,
        )
    except UnencodableError as error:
        first = [int(positions[chosen.sources[error.row]]), str(error)]
        return pa.table({"counts": [json.dumps({"refused": first})]})
    entries = quarantine.set_aside(block, ready, settings, rules)
    if refused:
        # New rows that were made of a row are refused with it, which is told once.
        whose = {int(chosen.sources[n]): reason for n, reason in refused.items()}
        more = [
            Entry(int(positions[n]), UNENCODABLE, reason, beginning(texts[n].as_py()))
            for n, reason in whose.items()
        ]
        entries += quarantine.without_personal_data(more, rules)
        entries.sort(key=lambda entry: entry.position)
    quarantine.write(entries, reading, block, job.uri)
    why = {reason.name.lower(): at.reasons == reason for reason in Reason}
    if data.leakage == "check":
        why |= {"leaking": at.leaking | why["leaking"], "moved": at.moved}
    counts = {
        "rows": block.rows.num_rows,
        "dropped": {reason.name.lower(): int((at.reasons == reason).sum()) for reason in Reason},
        "quarantined": Quarantined.among(entries, block.bad).to_json(),
        "moved": int(at.moved.sum()),
        "leaking": int(at.leaking.sum() + (at.reasons == Reason.LEAKING).sum()),
        "undersampled": int(at.spare.sum()),
        "augmented": chosen.made,
        "sampled": chosen.sampled,
        "thinned": chosen.thinned,
        "repeated": int(chosen.again.sum()) - sum(bool(chosen.again[n]) for n in refused or ()),
        "kept": weights.by_file(positions[chosen.sources], chosen.split, refused or ()),
        "examples": first_of(why, positions, texts, data.clean.samples),
        "redacted": blocks.redacted_of(row),
        "splits": {name: asdict(count) for name, count in splits.items()},
    }
    return pa.table({"counts": [json.dumps(counts)]})


def _chosen(row: pa.Table, block: blocks.Block, ready: Ready, at: Places, job: Writing) -> Chosen:
    """Of a block, packed as `row`: what stays, as often as the weights say, and what is made of it."""
    reading, data, making = job.plan.reading, job.plan.settings.data, job.making
    positions = block.rows[blocks.POSITION].to_numpy()[ready.usable]
    rows = ready.prepared.rows
    for name in data.slices:
        rows = rows.append_column(name, block.rows[name])
    ids = dedup.row_ids(ready.high, positions if data.duplicates == "keep" else None)
    rows = rows.filter(pa.array(ready.usable)).add_column(0, "id", ids)
    copies = np.zeros(len(positions), np.int64)
    stays = at.stays
    copies[stays] = weights.copies(
        reading.weighed(positions[stays]), at.split[stays], ready.high[stays], data.split.seed
    )
    sources = np.flatnonzero(copies)
    rows, split = rows.take(pa.array(sources)), at.split[sources]
    sampled = noise.sample(rows, split, ready.high[sources], positions[sources], data, job.usable)
    made: Counter[str] = Counter()
    if making is not None:
        labels = ready.prepared.labels[ready.usable][sources]
        rows, split, of, made = making.added(rows, split, labels, written_for(row), block)
        sources = sources[of]
    rows, chosen = weights.repeated(rows, copies[sources])
    again = np.zeros(len(chosen), bool)
    again[1:] = chosen[1:] == chosen[:-1]
    thinned = int(stays.sum()) - int((copies > 0).sum())
    return Chosen(rows, split[chosen], sources[chosen], again, thinned, made, sampled)
