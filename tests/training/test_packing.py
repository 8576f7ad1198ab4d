"""Packing: whole rows, every one once, full packs, the same number of batches on every worker."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.training import batches, packing

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=200).map(lambda x: np.array(x, np.int32))


@pytest.mark.parametrize("pack", [packing.pack, packing.best_fit, packing.exact_fit])
@given(lengths=LENGTHS)
def test_every_row_is_in_one_pack_that_holds_it(
    pack: Callable[..., list[np.ndarray]], lengths: np.ndarray
) -> None:
    packs = pack(lengths, 100)
    assert sorted(np.concatenate(packs)) == list(range(len(lengths)))
    filled = [int(lengths[p].sum()) for p in packs]
    assert max(filled) <= 100
    # No two packs would go into one.
    assert len(packs) == 1 or sorted(filled)[0] + sorted(filled)[1] > 100


def test_rows_go_where_they_fit_best() -> None:
    packs = packing.best_fit(np.array([6, 5, 4, 3, 2], np.int32), 10)
    assert [p.tolist() for p in packs] == [[0, 2], [1, 3, 4]]
    # 3 fits behind 7 without a rest and behind 6 with one.
    assert [p.tolist() for p in packing.best_fit(np.array([6, 7, 3], np.int32), 10)] == [[1, 2], [0]]


def test_rows_that_are_alike_are_filled_exactly() -> None:
    lengths = np.repeat(np.array([47, 48, 50, 51, 56], np.int32), [199, 190, 219, 324, 118])
    assert len(packing.best_fit(lengths, 1024)) == 53
    assert len(packing.pack(lengths, 1024)) == 52 == -(-lengths.sum() // 1024)


def test_a_row_above_the_context_is_alone() -> None:
    assert [p.tolist() for p in packing.pack(np.array([3, 12, 3], np.int32), 10)] == [[1], [0, 2]]


@given(LENGTHS, st.integers(0, 10), st.integers(50, 400))
def test_packs_are_dealt_into_exactly_as_many_batches(lengths: np.ndarray, more: int, budget: int) -> None:
    packs = packing.pack(lengths, 100)
    count = min(packing.batches_of(len(packs), budget, 100) + more, len(lengths))
    dealt = packing.deal(packs, count)
    assert len(dealt) == count
    assert all(1 <= len(group) <= max(1, budget // 100) for group in dealt)
    assert sorted(np.concatenate([p for group in dealt for p in group])) == list(range(len(lengths)))


def plan(window: pa.Table, seed: int, largest: int) -> list[batches.Planned]:
    return batches.plan_window(
        window,
        400,
        np.random.default_rng(seed),
        lambda rows: float(rows["length"].to_numpy().sum()),
        lambda own: max(own, largest),
        lambda sums: sums,
        context=100,
    )


def test_a_window_is_planned_alike_each_time_and_agreed_upon() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 150)
    window = pa.table({"length": pa.array(lengths, pa.int32()), "row": list(range(150))})
    first, again, other = plan(window, 3, 0), plan(window, 3, 0), plan(window, 4, 0)
    rows = [planned.rows["row"].to_pylist() for planned in first]
    assert rows == [planned.rows["row"].to_pylist() for planned in again]
    assert rows != [planned.rows["row"].to_pylist() for planned in other]
    assert len(plan(window, 3, 30)) == 30
    for planned in first:
        filled = np.bincount(planned.rows["pack"].to_numpy(), planned.rows["length"].to_numpy())
        assert len(filled) <= 4
        assert filled.min() > 0
        assert filled.max() <= 100
    assert sorted(row for batch in rows for row in batch) == list(range(150))


def test_packs_of_short_rows_have_little_padding() -> None:
    lengths = np.random.default_rng(1).gamma(3, 25, 2000).clip(20, 300).astype(np.int32)
    packs = packing.pack(lengths, 1024)
    assert 1 - lengths.sum() / (len(packs) * 1024) < 0.02
