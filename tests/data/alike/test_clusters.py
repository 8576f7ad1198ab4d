"""Clusters of linked rows: who is in them, which row stays, which split they are in."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.artifacts import SPLITS
from lib.data.alike import clusters
from lib.data.alike.clusters import LEFT_OUT, components, drop_all_but_the_best, into_one_split
from lib.data.alike.dedup import Reason
from lib.data.alike.near import LINK
from lib.data.blocks import ROW_BITS
from lib.data.splitting.split import Cuts, assign
from lib.settings import DataSettings

DATA = DataSettings.model_validate({"source": "a.csv", "labels": ["a", "b"]})
# Files: what is divided, and the splits that are given.
GIVEN = np.array([-1, SPLITS.index("validation"), SPLITS.index("test")], np.int8)
VALIDATION, TEST = 1 << ROW_BITS, 2 << ROW_BITS


def links(*pairs: tuple[int, int]) -> pa.Table:
    a, b = zip(*pairs, strict=True) if pairs else ((), ())
    return pa.table([pa.array(a, pa.int64()), pa.array(b, pa.int64())], schema=LINK)


def roots(members: pa.Table) -> dict[int, int]:
    return dict(zip(members["position"].to_pylist(), members["root"].to_pylist(), strict=True))


def by_stars(given: pa.Table, partitions: int, rng: np.random.Generator) -> tuple[dict[int, int], int]:
    """Rounds of stars, each node's links in a partition of its own choosing, until nothing changes."""

    def each(star: Any, a: np.ndarray, b: np.ndarray) -> pa.Table:
        where = clusters.node_partition(a, partitions)
        parts = [star(a[where == i], b[where == i]) for i in rng.permutation(partitions)]
        return pa.concat_tables([part.take(pa.array(rng.permutation(part.num_rows))) for part in parts])

    now, rounds = given, 0
    while True:
        before = sorted(zip(*now.to_pydict().values(), strict=True))
        a, b = now["a"].to_numpy(), now["b"].to_numpy()
        now = each(clusters.large_star, np.concatenate([a, b]), np.concatenate([b, a]))
        now = each(clusters.small_star, now["b"].to_numpy(), now["a"].to_numpy())
        rounds += 1
        if sorted(zip(*now.to_pydict().values(), strict=True)) == before:
            return roots(clusters.members_of_stars(now)), rounds


@pytest.mark.parametrize("partitions", [1, 5])
def test_stars_find_the_same_clusters_as_one_task(partitions: int) -> None:
    rng = np.random.default_rng(partitions)
    for nodes, pairs in ((30, 20), (200, 150), (300, 290)):
        a, b = rng.integers(0, nodes, (2, pairs))
        given = links(*((int(x), int(y)) for x, y in zip(a, b, strict=True) if x < y))
        expected = roots(components(given))
        assert all(expected[x] == expected[y] for x, y in zip(*given.to_pydict().values(), strict=True))
        assert by_stars(given, partitions, rng)[0] == expected


def test_a_long_chain_is_one_cluster_after_few_rounds() -> None:
    rng = np.random.default_rng(0)
    chain = rng.permutation(4096)
    pairs = [(min(x, y), max(x, y)) for x, y in pairwise(chain.tolist())]
    found, rounds = by_stars(links(*pairs), 4, rng)
    assert set(found.values()) == {0}
    assert rounds <= 16
    assert roots(components(links(*pairs))) == found


def test_nothing_is_no_cluster() -> None:
    assert components(links()).num_rows == 0
    assert clusters.large_star(np.empty(0, int), np.empty(0, int)).num_rows == 0
    assert clusters.small_star(np.empty(0, int), np.empty(0, int)).num_rows == 0


def members(
    positions: list[int], roots: list[int], labels: list[int] | None = None, worth: list[float] | None = None
) -> pa.Table:
    size = len(positions)
    return pa.table(
        {
            "root": np.array(roots, np.int64),
            "position": np.array(positions, np.int64),
            "label": np.array(labels or [0] * size, np.int32),
            "worth": np.array(worth or [0.0] * size),
            "group": np.array([GROUPS[p] for p in positions], np.int64),
        }
    )


def hashes_for(split: str, count: int) -> list[int]:
    """Hashes of texts that fall into this split."""
    drawn = np.random.default_rng(3).integers(-(2**62), 2**62, 1000)
    return [int(h) for h in drawn[assign(drawn, DATA) == SPLITS.index(split)][:count]]


# Rows 0 to 3 are drawn for training, 4 for validation, 5 for the test.
GROUPS = dict(enumerate([*hashes_for("train", 4), *hashes_for("validation", 1), *hashes_for("test", 1)]))
GROUPS |= {VALIDATION: 1, TEST: 2}


@pytest.mark.parametrize("seed", range(3))
def test_the_best_stays_and_the_first_of_equals(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(5)
    rows = members([0, 1, 2, 3, 4], [0, 0, 0, 3, 3], [0, 1, 0, 0, 0], [1.0, 5.0, 5.0, -np.inf, -np.inf])
    found = drop_all_but_the_best(rows.take(pa.array(order)), DATA, np.zeros(3, np.int8))
    assert found.to_pydict() == {
        "position": [0, 2, 4],
        "reason": [Reason.NEAR_CONFLICTING, Reason.NEAR_CONFLICTING, Reason.NEAR_DUPLICATE],
    }


def test_a_row_of_a_given_split_stays_before_better_ones() -> None:
    rows = members([0, VALIDATION, TEST], [0, 0, 0], worth=[9.0, 5.0, 1.0])
    found = drop_all_but_the_best(rows, DATA, GIVEN)
    assert found.to_pydict() == {"position": [0, VALIDATION], "reason": [Reason.LEAKING] * 2}


@pytest.mark.parametrize("seed", range(3))
def test_a_cluster_goes_where_its_first_row_goes(seed: int) -> None:
    positions, at = [0, 4, 5, 2, 3], [0, 0, 0, 2, 2]
    order = np.random.default_rng(seed).permutation(5)
    found = into_one_split(members(positions, at).take(pa.array(order)), DATA, np.array([-1], np.int8))
    assert found.to_pydict() == {"position": [4, 5], "place": [0, 0]}
    found = into_one_split(members([4, 5], [4, 4]).take(pa.array([1, 0])), DATA, np.array([-1], np.int8))
    assert found.to_pydict() == {"position": [5], "place": [SPLITS.index("validation")]}


def test_what_is_like_a_row_of_a_later_given_split_is_left_out() -> None:
    rows = members([0, 5, TEST, 4, VALIDATION, 3], [0, 0, 0, 4, 4, 3])
    # 0 is for training, and its cluster with it; 4, for validation, resembles a row that validates; 3 none.
    found = into_one_split(rows, DATA, GIVEN)
    assert found.to_pydict() == {"position": [0, 5], "place": [LEFT_OUT, LEFT_OUT]}
    # Given rows alone are left alone.
    assert into_one_split(members([VALIDATION, TEST], [VALIDATION] * 2), DATA, GIVEN).num_rows == 0
    assert into_one_split(rows.slice(0, 0), DATA, GIVEN).num_rows == 0


def test_by_time_what_is_like_a_row_of_a_later_split_is_left_out_and_none_moves() -> None:
    data = DataSettings.model_validate({"source": "a", "labels": ["x", "y"], "split": {"time": "t"}})
    cuts = Cuts(np.zeros(1, np.int64), np.array([[100, 200]]))
    rows = members([0, 1, 2, 3, 4, 5], [0, 0, 0, 3, 3, 5])
    rows = rows.append_column("time", pa.array(np.array([250, 99, 150, 100, 120, 20])))
    found = into_one_split(rows.take(pa.array([3, 1, 5, 0, 4, 2])), data, np.array([-1], np.int8), cuts)
    assert found.to_pydict() == {"position": [1, 2], "place": [LEFT_OUT, LEFT_OUT]}
