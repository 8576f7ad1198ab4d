"""Rows that are linked, directly or through others, are one cluster: who is in it, which row stays, which split it is in.

Links lie in partitions. While there are LOCAL_LINKS or fewer (16 bytes each, whatever the number of rows), one task
joins them with SciPy's connected components. More are first drawn together by large-star and small-star (Kiveris et al.
2014, "Connected components in MapReduce and beyond"): each node points to the least node that it knows, and after
O(log² n) rounds of both every node points to the least of its cluster. Each looks at the links of a node alone, so that
any number of partitions can be worked on anywhere. Nothing here knows Ray.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lib.data.alike.dedup import DROPPED, Reason
from lib.data.alike.near import unique_links
from lib.data.blocks import ROW_BITS
from lib.data.splitting.split import Cuts, assign, mix
from lib.settings import DataSettings

# 64 MiB of them; joining takes about ten times as much.
LOCAL_LINKS = 4 << 20
# Of a node's links, how many rounds there are at most: a cluster as long as 2^64 would need no more.
MOST_ROUNDS = 64

MEMBER = pa.schema([("position", pa.int64()), ("root", pa.int64())])
PLACED = pa.schema([("position", pa.int64()), ("place", pa.int8())])
# A place in PLACED: the row is left out of the dataset.
LEFT_OUT = -1


def components(links: pa.Table) -> pa.Table:
    """LINK in any order → MEMBER, sorted by position: each linked row, and the first row of its cluster."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = links["a"].to_numpy(), links["b"].to_numpy()
    if not len(a):
        return MEMBER.empty_table()
    nodes, numbers = np.unique(np.concatenate([a, b]), return_inverse=True)
    first, second = numbers[: len(a)], numbers[len(a) :]
    graph = coo_array((np.ones(len(a), np.int8), (first, second)), shape=(len(nodes), len(nodes)))
    _, found = connected_components(graph, directed=False)
    # Nodes are sorted: the first of a cluster is its least.
    _, least, of = np.unique(found, return_index=True, return_inverse=True)
    return pa.table([nodes, nodes[least[of]]], schema=MEMBER)


def large_star(a: np.ndarray, b: np.ndarray) -> pa.Table:
    """All links (a, b) of some nodes a, each link from both of its ends → LINK: each neighbour of a above it points to the
    least of a and its neighbours."""
    a, b, least = _least(a, b)
    above = b > a
    return unique_links(least[above], b[above])


def small_star(a: np.ndarray, b: np.ndarray) -> pa.Table:
    """All links of some nodes a to nodes b below them → LINK: a and all these point to the least of them."""
    a, b, least = _least(a, b)
    return unique_links(np.concatenate([least, least]), np.concatenate([a, b]))


def members_of_stars(links: pa.Table) -> pa.Table:
    """Links from the first row of each cluster to its others → MEMBER, sorted by position."""
    a, b = links["a"].to_numpy(), links["b"].to_numpy()
    firsts = np.unique(a)
    found = pa.table([np.concatenate([firsts, b]), np.concatenate([firsts, a])], schema=MEMBER)
    return found.sort_by("position")


def _least(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Links sorted by a, and the least of a and its neighbours for each."""
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    starts = np.flatnonzero(np.concatenate([[True], a[1:] != a[:-1]])) if len(a) else np.empty(0, int)
    first = np.minimum(a[starts], b[starts])
    return a, b, np.repeat(first, np.diff([*starts, len(a)]))


def node_partition(nodes: np.ndarray, count: int) -> np.ndarray:
    """int32 [nodes]; positions that follow one another go to different partitions."""
    return (mix(nodes.astype(np.uint64)) % np.uint64(count)).astype(np.int32)


def drop_all_but_the_best(members: pa.Table, data: DataSettings, ranks: np.ndarray) -> pa.Table:
    """Rows of whole clusters → DROPPED, sorted by position.

    `members` has `root`, `position`, `label`, `worth` float64, the larger the better. A row of a given split stays before
    others: `ranks` int8 [files], as `dedup.ranks` has them. Of equal worth, the first in source order stays.
    """
    root, position, label = (members[name].to_numpy() for name in ("root", "position", "label"))
    worth = members["worth"].to_numpy()
    rank = ranks[position >> ROW_BITS]
    order = np.lexsort((position, -worth, -rank, root))
    root, position, label, rank = root[order], position[order], label[order], rank[order]
    first = np.concatenate([[True], root[1:] != root[:-1]]) if len(root) else np.empty(0, bool)
    kept = np.maximum.accumulate(np.where(first, np.arange(len(root)), 0))
    reason = np.where(label != label[kept], Reason.NEAR_CONFLICTING, Reason.NEAR_DUPLICATE)
    reason = np.where(rank < rank[kept], Reason.LEAKING, reason).astype(np.int8)
    return pa.table([position[~first], reason[~first]], schema=DROPPED).sort_by("position")


def into_one_split(
    members: pa.Table, data: DataSettings, given: np.ndarray, cuts: Cuts | None = None
) -> pa.Table:
    """Rows of whole clusters → PLACED, sorted by position: those that go elsewhere than their own text says.

    `members` has `root`, `position`, `label`, `group` int64, the hash that decides a row's split, and, split by time, `time`
    int64; `given` int8 [files] is the split of rows that have one, else -1. Drawn rows go where the first of them in source
    order goes. Where that is a split before one of which the cluster has a given row (train before validation before
    test), they are left out: what a given split holds is never touched. Split by time, no row changes its split,
    which would bring what is late before what is early: rows are left out that resemble one of a later split.
    """
    members = members.sort_by([("root", "ascending"), ("position", "ascending")])
    root, position, group, label = (
        members[name].to_numpy() for name in ("root", "position", "group", "label")
    )
    seconds = members["time"].to_numpy() if "time" in members.column_names else None
    split = given[position >> ROW_BITS]
    starts = (
        np.flatnonzero(np.concatenate([[True], root[1:] != root[:-1]])) if len(root) else np.empty(0, int)
    )
    sizes = np.diff([*starts, len(root)])
    if not len(root):
        return PLACED.empty_table()
    drawn = split < 0
    own = assign(group, data, cuts, label, seconds)
    if seconds is not None:
        split = np.where(drawn, own, split)
    latest = np.repeat(np.maximum.reduceat(split, starts), sizes)
    # The first drawn row of a cluster, or its end where there is none.
    at = np.where(drawn, np.arange(len(root)), len(root))
    first = np.minimum(np.repeat(np.minimum.reduceat(at, starts), sizes), len(root) - 1)
    goes = own[first] if seconds is None else own
    place = np.where(goes < latest, LEFT_OUT, goes).astype(np.int8)
    elsewhere = drawn & (place != own)
    return pa.table([position[elsewhere], place[elsewhere]], schema=PLACED).sort_by("position")
