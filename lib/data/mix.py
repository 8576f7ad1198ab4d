"""Several datasets as one, for a run that trains one encoder on all of them (`lib.tasks.multitask`).

How many training rows a part gives is its probability times the rows of all; the probability goes by
size^(1/T): at T = 1 by size, and the larger T, the more even (Devlin's multilingual BERT takes 1/T = 0.7; Raffel et
al. 2020, section 3.5.2, call it temperature-scaled mixing). A part that gives more than it has is repeated, one that
gives fewer is thinned by the seed. Every shard holds all parts in their shares, in an order of its own, so that any
window of training is a fair sample; batches and their positions need no change. Validation takes every row once,
and there is no test split: each part is evaluated alone, on its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import storage, tracking
from lib.artifacts import SPLITS
from lib.data import report
from lib.data.plan import Plan
from lib.data.shards import SplitCount, length_classes, shard_name
from lib.parts import own, stored
from lib.tasks import load_task

BATCH_ROWS = 1024


def shares(sizes: dict[str, int], temperature: float) -> dict[str, int]:
    """Part → rows that it gives of as many as there are in all, at least one."""
    weights = {name: float(rows) ** (1 / temperature) for name, rows in sizes.items()}
    total, whole = sum(sizes.values()), sum(weights.values())
    return {name: max(1, round(total * weight / whole)) for name, weight in weights.items()}


class Stream:
    """`count` rows of one part: all of them as often as that needs, and of the last time a part drawn by the seed."""

    def __init__(self, name: str, shards: list[str], rows: int, count: int, seed: list[int]) -> None:
        self.name, self.shards, self.count = name, shards, count
        self.whole, rest = divmod(count, rows)
        self.chosen = np.sort(np.random.default_rng(seed).choice(rows, rest, replace=False))
        self.tables = self._tables()
        self.held: list[pa.Table] = []

    def take(self, rows: int) -> pa.Table | None:
        """The next rows; None for none."""
        taken: list[pa.Table] = []
        while rows:
            table = self.held.pop() if self.held else next(self.tables)
            if len(table) > rows:
                self.held.append(table.slice(rows))
                table = table.slice(0, rows)
            taken.append(table)
            rows -= len(table)
        return pa.concat_tables(taken) if taken else None

    def _tables(self) -> Iterator[pa.Table]:
        for _ in range(self.whole):
            yield from self._once()
        start = 0
        for table in self._once():
            first, last = np.searchsorted(self.chosen, [start, start + len(table)])
            yield table.take(pa.array(self.chosen[first:last] - start))
            start += len(table)

    def _once(self) -> Iterator[pa.Table]:
        for shard in self.shards:
            with storage.open_file(shard) as file:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
                    yield stored(self.name, pa.Table.from_batches([batch]))


def mix(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make and publish the mixed dataset of parts that are there; its manifest."""
    manifests = {name: part.ref.manifest() for name, part in plan.parts.items()}
    settings = plan.settings
    with storage.publish_from_workers(plan.ref.uri) as uri:
        splits = {split: _split(plan, manifests, split, uri) for split in SPLITS}
        for name, part in splits["train"]["parts"].items():
            say(
                f"{name}: {part['rows']:,} of {manifests[name]['splits']['train']['rows']:,} training rows an epoch"
            )
        manifest = {
            **plan.manifest_head(),
            "parts": {name: part.ref.fingerprint for name, part in plan.parts.items()},
            "rows_read": sum(one["rows_read"] for one in manifests.values()),
            "dropped": {
                reason: sum(one["dropped"].get(reason, 0) for one in manifests.values())
                for reason in dict.fromkeys(why for one in manifests.values() for why in one["dropped"])
            },
            "redacted": dict(
                sum((Counter(one.get("redacted", {})) for one in manifests.values()), Counter())
            ),
            "splits": splits,
            "settings": {"temperature": settings.data.temperature, "seed": settings.data.split.seed},
            "versions": tracking.versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        report.write(uri, manifest)
    return manifest


def _split(plan: Plan, manifests: dict[str, dict[str, Any]], split: str, uri: str) -> dict[str, Any]:
    """Write the shards of one split; what the manifest says of it."""
    data = plan.settings.data
    sizes = {name: one["splits"][split]["rows"] for name, one in manifests.items()}
    sizes = {name: rows for name, rows in sizes.items() if rows and split != "test"}
    counts = shares(sizes, data.temperature) if split == "train" else sizes
    place = SPLITS.index(split)
    streams = [
        Stream(
            name,
            plan.parts[name].ref.shards(split),
            sizes[name],
            rows,
            [data.split.seed, place, list(manifests).index(name)],
        )
        for name, rows in counts.items()
    ]
    number = -(-sum(counts.values()) // data.rows_per_shard)
    count, of_parts = SplitCount(), {name: SplitCount() for name in counts}
    for shard in range(number):
        given = [s.take(s.count * (shard + 1) // number - s.count * shard // number) for s in streams]
        mixed = pa.concat_tables([table for table in given if table is not None], promote_options="default")
        order = np.random.default_rng([data.split.seed, place, shard]).permutation(len(mixed))
        with storage.open_file(storage.join(uri, split, shard_name(shard)), "wb") as file:
            pq.write_table(mixed.take(pa.array(order)), file, compression="zstd")
        count.shards.append(shard_name(shard))
        for stream, table in zip(streams, given, strict=True):
            if table is not None:
                _add(of_parts[stream.name], stream.name, table, plan, manifests[stream.name]["labels"])
    for one in of_parts.values():
        count.add(SplitCount(one.rows, one.tokens, one.truncated, lengths=one.lengths))
    labels = {f"{name}/{label}": n for name, one in of_parts.items() for label, n in one.labels.items()}
    return {
        **count.manifest([]),
        "labels": {
            f"{name}/{label}": labels.get(f"{name}/{label}", 0)
            for name, one in manifests.items()
            for label in one["labels"]
        },
        "parts": {name: {"rows": one.rows, "labels": one.labels} for name, one in of_parts.items()},
    }


def _add(count: SplitCount, name: str, table: pa.Table, plan: Plan, labels: list[str]) -> None:
    """Count the rows of a part that went into a shard."""
    task = load_task(plan.parts[name].settings.task)
    count.add(
        SplitCount(
            rows=len(table),
            tokens=int(np.sum(table["length"].to_numpy(), dtype=np.int64)),
            truncated=int(np.sum(table["truncated"].to_numpy())),
            labels=task.counts(own(name, table), labels),
            lengths=length_classes(table["length"].to_numpy()),
        )
    )
