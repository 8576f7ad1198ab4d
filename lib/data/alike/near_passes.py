"""Near duplicates of a source on Ray Data: found, compared, joined into clusters, and what becomes of each row.

    band keys (from the first pass)   shuffled by key          → candidates, 16 bytes each, fewer than 7 k for k rows of one key
    candidates                        shuffled by their first  → each once
    sketches of those rows alone      read again, shuffled     → links: pairs that are near duplicates
    links                             joined                   → rows of clusters
    these rows                        shuffled by cluster      → what is dropped, or into which split it goes

Every shuffle is in partitions whose number goes by what is shuffled, PARTITION_BYTES each; a sketch is of 4 KiB at
most. No process holds more than a block, or the few partitions that Ray gives it at a time. Where nothing agrees in a
band, only the first is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from lib.data import blocks
from lib.data.alike import clusters, dedup, near, semantic_passes
from lib.data.alike.clusters import node_partition
from lib.data.alike.near import Bands
from lib.data.blocks import Reading
from lib.data.passes import Scanned
from lib.data.ready import prepare
from lib.data.shuffles import (
    PAIR_BYTES,
    Pairs,
    exchange,
    links_by_node,
    mapped,
    packed_pairs,
    partitions_of,
    staying,
)
from lib.data.splitting.split import Cuts, mix
from lib.data.stream import parallel_tasks, tables
from lib.settings import Settings

# What is shuffled of a row's sketch beside its hashes, and of a member of a cluster.
ROW_BYTES, MEMBER_BYTES = 24, 44


@dataclass(frozen=True)
class Source:
    """What is compared: a source after the first pass."""

    reading: Reading
    settings: Settings
    read: Callable[[str], Dataset]
    """The packed blocks of a pass, by its name (`stream.source`)."""
    scanned: Scanned
    hashes: Dataset
    """Those of `passes.scan`."""
    rejected: Dataset | None
    """What `data.clean` has left out (`passes.find_rejected`)."""


def near_duplicates(source: Source, exact: Dataset) -> Dataset | None:
    """A dataset of dedup.DROPPED: of each cluster of near duplicates, all rows but the best; None where there are none.

    Rows of `exact` are dropped already.
    """
    found = _Search(source, by_group=False).clusters(exact)
    if found is None:
        return None
    data, ranks = source.settings.data, source.reading.ranks(source.settings)
    return found.decided(clusters.drop_all_but_the_best, data=data, ranks=ranks)


def straddling(source: Source, *dropped: Dataset | None, cuts: Cuts | None = None) -> Dataset | None:
    """A dataset of clusters.PLACED: rows that belong elsewhere than their own text says, since what they resemble is
    there; None where there are none.

    What is compared is what decides the split: `Prepared.groups`, else what near duplicates are told by. Rows of one of
    `data.split.group` are one cluster, whatever they say.
    """
    data, scanned = source.settings.data, source.scanned
    owned = data.split.group is not None
    if not scanned.grouped and data.near.duplicates == "drop" and not (owned and len(data.sources) > 1):
        return None  # no cluster has two rows left
    search = _Search(source, by_group=scanned.grouped)
    equal = scanned.grouped or owned or data.duplicates == "keep"
    found = search.clusters(*dropped, equal=equal, alike=not owned)
    if found is None:
        return None
    return found.decided(clusters.into_one_split, data=data, given=source.reading.given, cuts=cuts)


class _Search:
    """One search for clusters, by what rows say or by what decides their split."""

    def __init__(self, source: Source, by_group: bool) -> None:
        scanned = source.scanned
        self.reading, self.settings, self.rows = source.reading, source.settings, scanned.usable
        self.read = source.read
        self.hashes, self.rejected, self.by_group = source.hashes, source.rejected, by_group
        self.column = "group_bands" if by_group else "text_bands"
        # Of the mean row.
        self.sketch_bytes = ROW_BYTES + 4 * scanned.sketched[self.column] // max(scanned.usable, 1)

    def clusters(self, *dropped: Dataset | None, equal: bool = False, alike: bool = True) -> _Clusters | None:
        """Rows of `dropped` take no part. With `equal` there may be rows of one group: they are one cluster. Where these are
        `alike`, only the first of them is compared."""
        near_settings = self.settings.data.near
        away = tables(*dropped)
        links: Dataset | None = None
        repeated: list[Any] = []
        if equal:
            links = self._linked(near.equals, _group_keys, PAIR_BYTES, away=away)
            repeated = tables(mapped(links, _others)) if alike else []
        bands = Bands.of(near_settings.threshold).bands
        candidates = self._linked(
            near.candidates,
            _band_keys,
            PAIR_BYTES * bands,
            away=[*away, *repeated],
            column=self.column,
            bands=bands,
        )
        found = [links] if links is not None else []
        if count := candidates.count():
            found.append(self._verified(candidates, count))
        if near_settings.semantic is not None:
            meant = semantic_passes.links(
                self.reading,
                self.settings,
                self.read("embed"),
                self.rows,
                [*away, *repeated],
                tables(self.rejected),
                self.by_group,
            )
            found += [meant] if meant is not None else []
        if not found:
            return None
        # Ray Data has no union of one.
        links = found[0].union(*found[1:]) if len(found) > 1 else found[0]
        if not (count := links.count()):
            return None
        return _Clusters(self.hashes, joined(links, count))

    def _linked(
        self,
        linking: Callable[[np.ndarray, np.ndarray], pa.Table],
        keys: Callable[..., pa.Table],
        bytes_a_row: int,
        **arguments: Any,
    ) -> Dataset:
        """LINK of rows that share one of the keys that `keys` gives them; a pair may be there several times."""
        count = partitions_of(self.rows, bytes_a_row)
        packed = mapped(self.hashes, keys, partitions=count, **arguments)
        return exchange(packed, count, ("key", "position"), _linked, linking=linking)

    def _verified(self, candidates: Dataset, count: int) -> Dataset:
        """LINK of those that are near duplicates."""
        pairs = Pairs(candidates, count)
        partitions = partitions_of(2 * count, self.sketch_bytes)
        rows = self.read("compare").map_batches(
            sketch_block,
            fn_kwargs={
                "reading": self.reading,
                "settings": self.settings,
                "pairs": pairs,
                "rejected": tables(self.rejected),
                "by_group": self.by_group,
                "partitions": partitions,
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
        )
        threshold = self.settings.data.near.threshold
        return exchange(rows, partitions, ("a", "position", "value"), near.verified, threshold=threshold)


class _Clusters:
    """Rows of clusters, and the hashes of all rows."""

    def __init__(self, hashes: Dataset, members: Dataset) -> None:
        self.hashes, self.members = hashes, members

    def decided(self, function: Callable[..., pa.Table], **arguments: Any) -> Dataset:
        """What `function` says of whole clusters: `root`, `position`, `label`, `worth` and `group` of their rows."""
        partitions = partitions_of(self.members.count(), MEMBER_BYTES)
        packed = mapped(self.hashes, _member_rows, partitions=partitions, members=tables(self.members))
        timed = ("time",) if "time" in self.hashes.columns() else ()
        names = ("root", "position", "label", "worth", "group", *timed)
        return exchange(packed, partitions, names, function, **arguments)


def joined(links: Dataset, count: int) -> Dataset:
    """`count` links of any rows → clusters.MEMBER, each block sorted by position."""
    if count <= clusters.LOCAL_LINKS:
        packed = mapped(links, links_by_node, partitions=1, column="a")
        return exchange(packed, 1, ("a", "b"), clusters.components)
    partitions = partitions_of(2 * count, PAIR_BYTES)
    before = None
    for _ in range(clusters.MOST_ROUNDS):
        both = mapped(links, links_by_node, partitions=partitions, column="both")
        links = exchange(both, partitions, ("a", "b"), _starred, star=clusters.large_star)
        down = mapped(links, links_by_node, partitions=partitions, column="b")
        links = exchange(down, partitions, ("a", "b"), _starred, star=clusters.small_star)
        after = _digest(links)
        if after == before:
            break
        before = after
    packed = mapped(links, links_by_node, partitions=partitions, column="a")
    return exchange(packed, partitions, ("a", "b"), clusters.members_of_stars)


def _group_keys(rows: pa.Table, partitions: int, away: Sequence[Any]) -> pa.Table:
    positions, stay = staying(rows, away)
    keys = blocks.unpack(rows, ("group",))["group"].to_numpy()
    return _packed_keys(keys[stay], positions[stay], partitions)


def _band_keys(rows: pa.Table, partitions: int, away: Sequence[Any], column: str, bands: int) -> pa.Table:
    positions, stay = staying(rows, away)
    keys = blocks.unpack(rows, (column,))[column].to_numpy().reshape(len(positions), bands)[stay]
    return _packed_keys(keys.ravel(), np.repeat(positions[stay], bands), partitions)


def _packed_keys(keys: np.ndarray, positions: np.ndarray, partitions: int) -> pa.Table:
    return blocks.pack_by(
        dedup.partition_of(keys, partitions), {"key": pa.array(keys), "position": pa.array(positions)}
    )


def _linked(rows: pa.Table, linking: Callable[[np.ndarray, np.ndarray], pa.Table]) -> pa.Table:
    return linking(rows["key"].to_numpy(), rows["position"].to_numpy())


def _starred(rows: pa.Table, star: Callable[[np.ndarray, np.ndarray], pa.Table]) -> pa.Table:
    return star(rows["a"].to_numpy(), rows["b"].to_numpy())


def _others(links: pa.Table) -> pa.Table:
    """Of links from the first of a group, the rows that are not the first."""
    return dedup.by_position(pa.table({"position": links["b"]}))


def _digest(links: Dataset) -> tuple[int, int]:
    """How many links there are and a sum of their hashes: two equal sets have the same."""
    rows = 0
    total = np.uint64(0)
    for batch in mapped(links, _digested).iter_batches(batch_size=None, batch_format="pyarrow"):
        rows += sum(batch["rows"].to_pylist())
        with np.errstate(over="ignore"):
            total += batch["sum"].to_numpy().sum(dtype=np.uint64)
    return rows, int(total)


def _digested(links: pa.Table) -> pa.Table:
    a, b = (links[name].to_numpy().astype(np.uint64) for name in ("a", "b"))
    return pa.table({"rows": [len(a)], "sum": [mix(mix(a) ^ b).sum(dtype=np.uint64)]})


def _member_rows(rows: pa.Table, partitions: int, members: Sequence[Any]) -> pa.Table:
    names = ("position", "label", "worth", "group", "time")
    found = blocks.unpack(rows, [name for name in names if name in rows.column_names])
    positions = found["position"].to_numpy()
    order = np.argsort(positions, kind="stable")
    found, positions = found.take(pa.array(order)), positions[order]
    root = dedup.among(ray.get(list(members)), positions, "root", -1)
    mine = root >= 0
    columns = {name: blocks.flat(found[name].filter(pa.array(mine))) for name in found.column_names}
    return blocks.pack_by(node_partition(root[mine], partitions), {"root": pa.array(root[mine]), **columns})


def sketch_block(
    row: pa.Table,
    reading: Reading,
    settings: Settings,
    pairs: Pairs,
    rejected: Sequence[Any],
    by_group: bool,
    partitions: int,
) -> pa.Table:
    """Runs in a task: sketches of those rows of a block that are in a pair, once for each first row that they may be like."""
    block = blocks.from_row(row, list(reading.columns))
    positions = block.rows[blocks.POSITION].to_numpy()
    a, position = pairs.of(positions)
    rows = block.rows.filter(pa.array(np.isin(positions, position)))
    if not rows.num_rows:
        none = np.empty(0, np.int64)
        return packed_pairs(none, none, none, pa.array([], pa.list_(pa.uint32())), partitions)
    ready = prepare(rows, settings, ray.get(list(rejected)))
    there = rows[blocks.POSITION].to_numpy()[ready.usable]
    sketches = near.sketches(ready.compared(by_group), settings.data.near)
    return packed_pairs(a, position, there, sketches, partitions)
