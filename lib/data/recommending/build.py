"""From who did what with which item to a dataset of sequences and a catalogue, on Ray Data.

    DATASET/items/part-*.parquet      item, title, text, categories, numbers, input_ids, length, interactions
    DATASET/SPLIT/part-*.parquet      id, user, items, times, events, weights, targets, fresh, length, and what is known of the user; in the
                                      test split item_names and item_titles

`items` of a sequence are numbers of the catalogue's rows, in the order of its shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib import storage, tracking
from lib.artifacts import SPLITS
from lib.data import report
from lib.data.alike import dedup
from lib.data.plan import SOURCES, Plan
from lib.data.recommending import behaviour, catalogue
from lib.data.recommending.behaviour import Behaviour
from lib.data.recommending.interactions import Sequences, core, divide, events
from lib.data.shards import SplitCount, length_classes, shard_name
from lib.encoders import lists
from lib.errors import DataError
from lib.recommender import items
from lib.recommender.items import Scale


def build(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make and publish the dataset on the connected Ray cluster; its manifest.

    Raises DataError, in one line, for rows that cannot be read; then nothing is published.
    """
    data = plan.settings.data
    assert data.items is not None
    with storage.publish_from_workers(plan.ref.uri) as uri:
        say(f"reading {plan.reading.files[0].name}")
        found = behaviour.read(plan.reading, data)
        say(f"{found.rows:,} rows, {len(found.interactions):,} interactions; reading the catalogue")
        table = catalogue.read(plan.tables["items"], data.items, plan.rules)
        users = catalogue.read(plan.tables["users"], data.users) if data.users else None
        kept = _kept(found, table.ids, plan)
        sequences = divide(
            kept.interactions, data, dedup.hash_texts(kept.users)[1], dedup.hash_texts(kept.items)[1]
        )
        _check(kept, sequences, plan)
        seen = np.zeros(len(kept.items), np.int32)
        for row in sequences["train"].rows:
            np.add.at(seen, kept.interactions.item[row], 1)
        chosen = np.asarray(pc.is_in(table.ids, kept.items))
        say(
            f"writing {len(kept.items):,} items and {sum(len(s.rows) for s in sequences.values()):,} sequences"
        )
        shards = catalogue.write_items(table, chosen, seen, plan.settings.model, uri)
        known = Known.of(kept.users, users, len(data.users.numbers) if data.users else 0)
        titles = catalogue.gather(table, ["title"])["title"].filter(pa.array(chosen)).combine_chunks()
        counts = {
            split: _write(
                sequences[split],
                kept,
                known,
                storage.join(uri, split),
                data.rows_per_shard,
                titles if split == "test" else None,
            )
            for split in SPLITS
        }
        manifest = _manifest(plan, found, kept, known, shards, counts, table.redacted)
        report.write(uri, manifest)
    return manifest


def _kept(found: Behaviour, item_ids: pa.Array, plan: Plan) -> Behaviour:
    """What counts after the catalogue and the k-core: users and items numbered anew, items as the catalogue has them."""
    rules, all_of = plan.settings.data.interactions, found.interactions
    row = pc.fill_null(pc.index_in(found.items, item_ids), -1).to_numpy()[all_of.item]
    known = row >= 0
    if len(all_of) and not known.any():
        example, table = found.items[0].as_py(), plan.tables["items"].files[0].name
        raise DataError(f"no item of the interactions, such as {example!r}, is in {table}; see data.items.id")
    interactions = replace(all_of, item=row.astype(np.int32)).where(known)
    left = core(interactions.user, interactions.item, rules.least_per_user, rules.least_per_item)
    interactions = interactions.where(left)
    counts = np.bincount(interactions.item, minlength=len(item_ids))
    items, users = np.flatnonzero(counts >= rules.least_per_item), np.unique(interactions.user)
    numbered = replace(
        interactions,
        user=np.searchsorted(users, interactions.user).astype(np.int32),
        item=np.searchsorted(items, interactions.item).astype(np.int32),
    )
    dropped = Counter(found.dropped) + Counter(
        {"of unknown items": int((~known).sum()), "outside the core": int((~left).sum())}
    )
    return Behaviour(
        numbered, found.users.take(pa.array(users)), item_ids.take(pa.array(items)), found.rows, dict(dropped)
    )


def _check(kept: Behaviour, sequences: dict[str, Sequences], plan: Plan) -> None:
    reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in kept.dropped.items() if rows)
    if not len(kept.interactions):
        raise DataError(f"no interaction is left of {kept.rows:,} rows ({reasons}); see data.interactions")
    for split in SPLITS:
        if not len(sequences[split].rows):
            raise DataError(
                f"the {split} split would be empty: {len(kept.users):,} users have {len(kept.interactions):,} "
                f"interactions ({reasons or 'none dropped'}); give more rows or another data.interactions.split"
            )


@dataclass(frozen=True)
class Known:
    """What is known of the users besides what they do, in their order."""

    categories: list[str]
    """All that there are."""
    scale: Scale
    rows: pa.Table
    """`categories` list<int32>, numbers of `categories`, and `numbers` list<float>, standardised."""

    @classmethod
    def of(cls, names: pa.Array, users: catalogue.Table | None, width: int) -> Known:
        """Of users `names`; nothing of who is not in the table."""
        unknown = pa.table(
            {
                "categories": pa.array([[]], pa.list_(pa.string())),
                "numbers": pa.array([[float("nan")] * width], pa.list_(pa.float32())),
            }
        )
        found = unknown.take(pa.array(np.zeros(len(names), np.int64)))
        if users is not None:
            table = catalogue.gather(users, ["categories", "numbers"])
            table = pa.concat_tables([table.cast(unknown.schema), unknown])
            found = table.take(pc.fill_null(pc.index_in(names, users.ids), len(table) - 1))
        vocabulary = items.vocabulary(found["categories"])
        codes, starts = items.coded(found["categories"], vocabulary)
        numbers = items.numbers(found["numbers"])
        scale = Scale.of(numbers)
        rows = {
            "categories": lists(np.split(codes.astype(np.int32), starts[1:]))[0],
            "numbers": pa.array(list(scale.apply(numbers)), pa.list_(pa.float32())),
        }
        return cls(vocabulary, scale, pa.table(rows))


def _write(
    sequences: Sequences, kept: Behaviour, known: Known, uri: str, per_shard: int, titles: pa.Array | None
) -> SplitCount:
    """One split's shards; with names and `titles` of the items, if these are given."""
    count = SplitCount()
    for number, start in enumerate(range(0, len(sequences.rows), per_shard)):
        rows = _rows(sequences, slice(start, start + per_shard), kept, known)
        if titles is not None:
            of = rows["items"].combine_chunks()
            for name, values in (("item_names", kept.items), ("item_titles", titles)):
                taken = pa.ListArray.from_arrays(of.offsets, values.take(of.flatten()))
                rows = rows.append_column(name, taken)
        with storage.open_file(storage.join(uri, shard_name(number)), "wb") as file:
            pq.write_table(rows, file, compression="zstd")
        tokens = int(np.sum(rows["length"].to_numpy(), dtype=np.int64))
        lengths = length_classes(rows["length"].to_numpy())
        count.add(SplitCount(rows.num_rows, tokens, shards=[shard_name(number)], lengths=lengths))
    return count


def _rows(sequences: Sequences, chosen: slice, kept: Behaviour, known: Known) -> pa.Table:
    stretches, of = sequences.rows[chosen], kept.interactions
    users = pa.array([int(of.user[row[0]]) for row in stretches], pa.int32())
    names = kept.users.take(users)
    items, lengths = lists([of.item[row] for row in stretches])
    ends = [f"{name}\n{int(row[-1])}" for name, row in zip(names.to_pylist(), stretches, strict=True)]
    rows = {
        "id": dedup.row_ids(dedup.hash_texts(pa.array(ends, pa.string()))[0]),
        "user": names,
        "items": items,
        "times": _lists([of.time[row] for row in stretches], items.offsets),
        "events": _lists([of.event[row] for row in stretches], items.offsets),
        "weights": _lists([of.weight[row] for row in stretches], items.offsets),
        "targets": pa.array(sequences.targets[chosen]),
        "fresh": pa.array(sequences.fresh[chosen]),
        "length": lengths,
    }
    return pa.table(rows | {f"user_{name}": known.rows[name].take(users) for name in known.rows.column_names})


def _lists(rows: list[np.ndarray], offsets: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(rows)))


def _manifest(
    plan: Plan,
    found: Behaviour,
    kept: Behaviour,
    known: Known,
    shards: list[dict[str, Any]],
    counts: dict[str, SplitCount],
    redacted: Counter[str],
) -> dict[str, Any]:
    data = plan.settings.data
    return {
        **plan.manifest_head(),
        "rows_read": found.rows,
        "dropped": kept.dropped,
        "users": len(kept.users),
        "interactions": len(kept.interactions),
        "items": {
            "rows": len(kept.items),
            "tokens": sum(one["tokens"] for one in shards),
            "shards": [one["shard"] for one in shards],
        },
        "events": events(data.interactions),
        **({"redacted": dict(sorted(redacted.items()))} if plan.rules else {}),
        "users_known": {"categories": known.categories, "numbers": vars(known.scale)},
        "splits": {name: count.manifest([]) for name, count in counts.items()},
        "sources": [
            {"uri": file.name, "checksum": checksum}
            for file, checksum in zip(plan.all_files, plan.checksums, strict=True)
        ],
        "settings": data.model_dump(mode="json", exclude=SOURCES),
        "versions": tracking.versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
