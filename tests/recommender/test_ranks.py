"""Ranks among all items, and figures of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.recommender import ranks

NOTHING = np.zeros(0, np.int64)


def test_better_items_and_half_of_the_equal_ones_come_before() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.5, 0.5, 0.2])
    assert ranks.rank(scores, 1, NOTHING) == 1
    assert ranks.rank(scores, 2, NOTHING) == 3  # 0.9, and half of two equal ones
    assert ranks.rank(scores, 0, NOTHING) == 6


def test_what_the_user_has_had_is_not_ranked_but_for_the_target_itself() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.5])
    assert ranks.rank(scores, 2, np.array([1, 1, 3])) == 1
    assert ranks.rank(scores, 2, np.array([2, 1])) == 1.5


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_a_rank_is_the_mean_place_over_all_ways_to_break_ties(values: list[int], data: st.DataObject) -> None:
    scores = np.array(values, np.float64)
    target = data.draw(st.integers(0, len(values) - 1))
    had = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), max_size=6)), np.int64)
    others = [s for i, s in enumerate(values) if i != target and i not in had]
    best = 1 + sum(s > values[target] for s in others)
    worst = 1 + sum(s >= values[target] for s in others)
    assert ranks.rank(scores, target, had) == (best + worst) / 2


def test_figures_by_hand() -> None:
    found = ranks.figures(np.array([1.0, 3.0, 10.0, 11.0]))
    assert found["hr_10"] == 0.75
    assert found["ndcg_10"] == pytest.approx((1 + 1 / 2 + 1 / np.log2(11)) / 4)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 11) / 4)
    assert ranks.figures(np.zeros(0)) == {"hr_10": 0.0, "ndcg_10": 0.0, "mrr": 0.0}
    assert ranks.hits(np.array([11.0]), 50).tolist() == [1.0]
