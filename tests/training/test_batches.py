"""Batches: under the budget, the same number everywhere, every row once, the gradient of one big batch."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.training import batches

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(lambda x: np.array(x, np.int32))


@given(LENGTHS, st.integers(1, 2000))
def test_cut_keeps_every_row_once_and_the_budget(lengths: np.ndarray, budget: int) -> None:
    groups = batches.cut(lengths, budget)
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    for group in groups:
        assert len(group) * lengths[group].max() <= budget or len(group) == 1


@given(LENGTHS, st.integers(300, 2000), st.integers(0, 20))
def test_cut_into_gives_exactly_the_number_asked_for(lengths: np.ndarray, budget: int, more: int) -> None:
    count = min(len(batches.cut(lengths, budget)) + more, len(lengths))
    groups = batches.cut_into(lengths, budget, count)
    assert len(groups) == count
    assert sorted(np.concatenate(groups)) == list(range(len(lengths)))
    assert all(len(g) * lengths[g].max() <= budget for g in groups)


def test_cut_into_refuses_the_impossible() -> None:
    with pytest.raises(ValueError, match="do not go into"):
        batches.cut_into(np.array([10, 10], np.int32), 100, 3)


def test_like_lengths_leave_little_padding() -> None:
    lengths = np.random.default_rng(0).gamma(3, 25, 4096).clip(3, 192).astype(np.int32)
    groups = batches.cut(lengths, 2048)
    padded = sum(len(g) * int(lengths[g].max()) for g in groups)
    assert 1 - lengths.sum() / padded < 0.02
    at_random = sum(len(g) * int(g.max()) for g in np.array_split(lengths, len(groups)))
    assert padded < 0.6 * at_random


def test_workers_agree_without_losing_a_row() -> None:
    random = np.random.default_rng(1)
    windows = [
        pa.table({"length": pa.array(random.integers(5, size, 300), pa.int32()), "label": list(range(300))})
        for size in (50, 190)
    ]
    largest = max(len(batches.cut(w["length"].to_numpy(), 1000)) for w in windows)

    def plan(window: pa.Table) -> list[batches.Planned]:
        same_state = np.random.default_rng(7)
        return batches.plan_window(
            window, 1000, same_state, lambda r: r.num_rows, lambda _: largest, lambda v: 2 * v
        )

    plans = [plan(w) for w in windows]
    assert [len(p) for p in plans] == [largest, largest]
    for window_plan in plans:
        assert sorted(label for p in window_plan for label in p.rows["label"].to_pylist()) == list(range(300))
        assert all(p.weight == 2 * p.rows.num_rows for p in window_plan)
    # The n-th batches are alike in length, so that no worker waits long for the other.
    means = [[float(np.mean(p.rows["length"].to_numpy())) for p in window_plan] for window_plan in plans]
    assert np.corrcoef(means[0], means[1])[0, 1] > 0.9


@given(LENGTHS, st.integers(1, 4))
def test_validation_rows_are_on_exactly_one_worker(lengths: np.ndarray, world: int) -> None:
    window = pa.table({"length": lengths, "row": np.arange(len(lengths))})
    seen = [
        row
        for rank in range(world)
        for part in batches.in_order(window, 500, rank, world)
        for row in part["row"].to_pylist()
    ]
    assert sorted(seen) == list(range(len(lengths)))
