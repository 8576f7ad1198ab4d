"""Near duplicates of a source on Ray Data: found, compared, joined into clusters, and what becomes of each row.

    band keys (from the first pass)   shuffled by key          → candidates, 16 bytes each, fewer than 7 k for k rows of one key
    candidates                        shuffled by their first  → each once
    sketches of those rows alone      read again, shuffled     → links: pairs that are near duplicates
    links                             joined                   → rows of clusters
    these rows                        shuffled by cluster      → what is dropped, or into which split it goes

Every shuffle is in partitions whose number goes by what is shuffled, PARTITION_BYTES each; a sketch is of 4 KiB at
most. No process holds more than a partition or a block. Where nothing agrees in a band, only the first is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from lib.data import blocks, clusters, dedup, near
from lib.data.blocks import Reading
from lib.data.clusters import node_partition
from lib.data.near import Bands
from lib.data.passes import Scanned
from lib.data.ready import prepare
from lib.data.split import Cuts, mix
from lib.data.stream import parallel_tasks, tables
from lib.settings import Settings

# A partition's rows are held several times while they are compared. Ray starts processes for a shuffle of several
# partitions, which takes longer than one of two million pairs.
PARTITION_BYTES = 128 << 20
# What is shuffled of a pair, of a row's sketch beside its hashes, and of a member of a cluster.
PAIR_BYTES, ROW_BYTES, MEMBER_BYTES = 16, 24, 44


def near_duplicates(
    reading: Reading,
    settings: Settings,
    read: Callable[[str], Dataset],
    scanned: Scanned,
    hashes: Dataset,
    rejected: Dataset | None,
    exact: Dataset,
) -> Dataset | None:
    """A dataset of dedup.DROPPED: of each cluster of near duplicates, all rows but the best; None where there are none.

    `read` gives the packed blocks of a pass by its name (`passes.source`), `hashes` are those of `passes.scan`; rows of `exact` are dropped already.
    """
    found = _Search(reading, settings, read, scanned, hashes, rejected, by_group=False).clusters(exact)
    if found is None:
        return None
    return found.decided(clusters.drop_all_but_the_best, data=settings.data, ranks=reading.ranks(settings))


def straddling(
    reading: Reading,
    settings: Settings,
    read: Callable[[str], Dataset],
    scanned: Scanned,
    hashes: Dataset,
    rejected: Dataset | None,
    *dropped: Dataset | None,
    cuts: Cuts | None = None,
) -> Dataset | None:
    """A dataset of clusters.PLACED: rows that belong elsewhere than their own text says, since what they resemble is
    there; None where there are none.

    What is compared is what decides the split: `Prepared.groups`, else what near duplicates are told by. Rows of one of
    `data.split.group` are one cluster, whatever they say.
    """
    data = settings.data
    owned = data.split.group is not None
    if not scanned.grouped and data.near.duplicates == "drop" and not (owned and len(data.sources) > 1):
        return None  # no cluster has two rows left
    search = _Search(reading, settings, read, scanned, hashes, rejected, by_group=scanned.grouped)
    equal = scanned.grouped or owned or data.duplicates == "keep"
    found = search.clusters(*dropped, equal=equal, alike=not owned)
    if found is None:
        return None
    return found.decided(clusters.into_one_split, data=data, given=reading.given, cuts=cuts)


class _Search:
    """One search for clusters, by what rows say or by what decides their split."""

    def __init__(
        self,
        reading: Reading,
        settings: Settings,
        read: Callable[[str], Dataset],
        scanned: Scanned,
        hashes: Dataset,
        rejected: Dataset | None,
        by_group: bool,
    ) -> None:
        self.reading, self.settings, self.rows = reading, settings, scanned.usable
        self.read = read
        self.hashes, self.rejected, self.by_group = hashes, rejected, by_group
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
            repeated = tables(_mapped(links, _others)) if alike else []
        bands = Bands.of(near_settings.threshold).bands
        candidates = self._linked(
            near.candidates,
            _band_keys,
            PAIR_BYTES * bands,
            away=[*away, *repeated],
            column=self.column,
            bands=bands,
        )
        if count := candidates.count():
            verified = self._verified(candidates, count)
            links = verified if links is None else links.union(verified)
        if links is None or not (count := links.count()):
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
        count = _partitions(self.rows, bytes_a_row)
        packed = _mapped(self.hashes, keys, partitions=count, **arguments)
        return exchange(packed, count, ("key", "position"), _linked, linking=linking)

    def _verified(self, candidates: Dataset, count: int) -> Dataset:
        """LINK of those that are near duplicates."""
        partitions = _partitions(count, PAIR_BYTES)
        pairs = exchange(
            _mapped(candidates, _links_by_node, partitions=partitions, column="a"),
            partitions,
            ("a", "b"),
            _unique,
        )
        partitions = _partitions(2 * count, self.sketch_bytes)
        rows = self.read("compare").map_batches(
            sketch_block,
            fn_kwargs={
                "reading": self.reading,
                "settings": self.settings,
                "by_first": tables(pairs),
                "by_second": tables(_mapped(pairs, _sorted, column="b").materialize()),
                "rejected": tables(self.rejected),
                "by_group": self.by_group,
                "partitions": partitions,
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
        )
        threshold = self.settings.data.near.threshold
        return exchange(rows, partitions, ("a", "position", "sketch"), near.verified, threshold=threshold)


class _Clusters:
    """Rows of clusters, and the hashes of all rows."""

    def __init__(self, hashes: Dataset, members: Dataset) -> None:
        self.hashes, self.members = hashes, members

    def decided(self, function: Callable[..., pa.Table], **arguments: Any) -> Dataset:
        """What `function` says of whole clusters: `root`, `position`, `label`, `worth` and `group` of their rows."""
        partitions = _partitions(self.members.count(), MEMBER_BYTES)
        packed = _mapped(self.hashes, _member_rows, partitions=partitions, members=tables(self.members))
        timed = ("time",) if "time" in self.hashes.columns() else ()
        names = ("root", "position", "label", "worth", "group", *timed)
        return exchange(packed, partitions, names, function, **arguments)


def joined(links: Dataset, count: int) -> Dataset:
    """`count` links of any rows → clusters.MEMBER, each block sorted by position."""
    if count <= clusters.LOCAL_LINKS:
        packed = _mapped(links, _links_by_node, partitions=1, column="a")
        return exchange(packed, 1, ("a", "b"), clusters.components)
    partitions = _partitions(2 * count, PAIR_BYTES)
    before = None
    for _ in range(clusters.MOST_ROUNDS):
        both = _mapped(links, _links_by_node, partitions=partitions, column="both")
        links = exchange(both, partitions, ("a", "b"), _starred, star=clusters.large_star)
        down = _mapped(links, _links_by_node, partitions=partitions, column="b")
        links = exchange(down, partitions, ("a", "b"), _starred, star=clusters.small_star)
        after = _digest(links)
        if after == before:
            break
        before = after
    packed = _mapped(links, _links_by_node, partitions=partitions, column="a")
    return exchange(packed, partitions, ("a", "b"), clusters.members_of_stars)


def exchange(
    rows: Dataset, partitions: int, names: Sequence[str], function: Callable[..., pa.Table], **arguments: Any
) -> Dataset:
    """`function` on each partition of rows that `blocks.pack_by` has packed, whose lists `names` it gets flat. Each block of
    the result is sorted by its first column."""
    call = {"names": names, "function": function, "arguments": arguments}
    if partitions == 1:
        # A shuffle into one partition would cost a small source several seconds.
        found = rows.repartition(1).map_batches(
            _call, fn_kwargs=call, batch_size=None, batch_format="pyarrow"
        )
    else:
        groups = rows.groupby("partition", num_partitions=partitions)
        found = groups.map_groups(
            _call,
            fn_kwargs=call,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
        )
    # A block holds what was found in several partitions, one after the other.
    return _mapped(found, _sorted).materialize()


def _call(
    packed: pa.Table, names: Sequence[str], function: Callable[..., pa.Table], arguments: dict[str, Any]
) -> pa.Table:
    return function(blocks.unpack(packed, names), **arguments)


def _mapped(rows: Dataset, function: Callable[..., pa.Table], **arguments: Any) -> Dataset:
    return rows.map_batches(
        function,
        fn_kwargs=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=parallel_tasks()),
    )


def _partitions(rows: int, bytes_a_row: int) -> int:
    return min(dedup.MAX_PARTITIONS, 1 + rows * bytes_a_row // PARTITION_BYTES)


def staying(rows: pa.Table, away: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of packed rows, and which of them are in none of the tables `away`."""
    positions = blocks.unpack(rows, ("position",))["position"].to_numpy()
    order = np.argsort(positions, kind="stable")  # several blocks may lie in any order
    gone = np.empty(len(positions), bool)
    gone[order] = dedup.among(ray.get(list(away)), positions[order], "position", -1) >= 0
    return positions, ~gone


def _group_keys(rows: pa.Table, partitions: int, away: Sequence[Any]) -> pa.Table:
    positions, stays = staying(rows, away)
    keys = blocks.unpack(rows, ("group",))["group"].to_numpy()
    return _packed_keys(keys[stays], positions[stays], partitions)


def _band_keys(rows: pa.Table, partitions: int, away: Sequence[Any], column: str, bands: int) -> pa.Table:
    positions, stays = staying(rows, away)
    keys = blocks.unpack(rows, (column,))[column].to_numpy().reshape(len(positions), bands)[stays]
    return _packed_keys(keys.ravel(), np.repeat(positions[stays], bands), partitions)


def _packed_keys(keys: np.ndarray, positions: np.ndarray, partitions: int) -> pa.Table:
    return blocks.pack_by(
        dedup.partition_of(keys, partitions), {"key": pa.array(keys), "position": pa.array(positions)}
    )


def _linked(rows: pa.Table, linking: Callable[[np.ndarray, np.ndarray], pa.Table]) -> pa.Table:
    return linking(rows["key"].to_numpy(), rows["position"].to_numpy())


def _unique(rows: pa.Table) -> pa.Table:
    return near.unique_links(rows["a"].to_numpy(), rows["b"].to_numpy())


def _starred(rows: pa.Table, star: Callable[[np.ndarray, np.ndarray], pa.Table]) -> pa.Table:
    return star(rows["a"].to_numpy(), rows["b"].to_numpy())


def _others(links: pa.Table) -> pa.Table:
    """Of links from the first of a group, the rows that are not the first."""
    return dedup.by_position(pa.table({"position": links["b"]}))


def _sorted(rows: pa.Table, column: str | None = None) -> pa.Table:
    """By the first column where none is named; a table without rows may have none."""
    return rows.sort_by(column or rows.column_names[0]) if rows.num_rows else rows


def _links_by_node(links: pa.Table, partitions: int, column: str) -> pa.Table:
    """Links packed by the partition of their `column`, which becomes a; with "both", from each of their ends."""
    a, b = links["a"].to_numpy(), links["b"].to_numpy()
    if column == "both":
        a, b = np.concatenate([a, b]), np.concatenate([b, a])
    elif column == "b":
        a, b = b, a
    return blocks.pack_by(node_partition(a, partitions), {"a": pa.array(a), "b": pa.array(b)})


def _digest(links: Dataset) -> tuple[int, int]:
    """How many links there are and a sum of their hashes: two equal sets have the same."""
    rows = 0
    total = np.uint64(0)
    for batch in _mapped(links, _digested).iter_batches(batch_size=None, batch_format="pyarrow"):
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
    by_first: Sequence[Any],
    by_second: Sequence[Any],
    rejected: Sequence[Any],
    by_group: bool,
    partitions: int,
) -> pa.Table:
    """Runs in a task: sketches of those rows of a block that are in a pair, once for each first row that they may be like."""
    block = blocks.from_row(row, list(reading.columns))
    positions = block.rows[blocks.POSITION].to_numpy()
    firsts = [np.unique(part["a"].to_numpy()) for part in _between(ray.get(list(by_first)), "a", positions)]
    pairs = _between(ray.get(list(by_second)), "b", positions)
    a = np.concatenate([*firsts, *(part["a"].to_numpy() for part in pairs), np.empty(0, np.int64)])
    position = np.concatenate([*firsts, *(part["b"].to_numpy() for part in pairs), np.empty(0, np.int64)])
    rows = block.rows.filter(pa.array(np.isin(positions, position)))
    if not rows.num_rows:
        return _no_sketches()
    ready = prepare(rows, settings, ray.get(list(rejected)))
    there = rows[blocks.POSITION].to_numpy()[ready.usable]
    sketches = near.sketches(ready.compared(by_group), settings.data.near)
    at = np.searchsorted(there, position)
    # A source that changed between the passes may lack a row.
    known = at < len(there)
    known[known] = there[at[known]] == position[known]
    columns = {
        "a": pa.array(a[known]),
        "position": pa.array(position[known]),
        "sketch": sketches.take(pa.array(at[known])),
    }
    return blocks.pack_by(node_partition(a[known], partitions), columns)


def _between(links: Sequence[pa.Table], column: str, positions: np.ndarray) -> list[pa.Table]:
    """Of tables that are sorted by `column`, the parts in which it lies among sorted `positions`."""
    parts = []
    for table in links:
        if table.num_rows and len(positions):
            start, end = np.searchsorted(
                blocks.flat(table[column]).to_numpy(), [positions[0], positions[-1] + 1]
            )
            parts.append(table.slice(start, end - start))
    return parts


def _no_sketches() -> pa.Table:
    none = np.empty(0, np.int64)
    lists = pa.array([], pa.list_(pa.uint32()))
    return blocks.pack_by(
        none.astype(np.int32), {"a": pa.array(none), "position": pa.array(none), "sketch": lists}
    )
