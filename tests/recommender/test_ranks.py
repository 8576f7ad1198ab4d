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


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(0, 1))
def test_a_place_gives_the_rank_for_any_bias_of_new_items(seed: int, bias: float, share: float) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(size=40).round(1)
    known, target = random.random(40) > share, int(random.integers(40))
    had = random.integers(0, 40, 5)
    place = ranks.place(scores, target, had, known)
    # In tenths, so that ties stay ties.
    tenths = round(bias * 10)
    shifted = np.rint(scores * 10) + np.where(known, 0, tenths)
    expected = ranks.rank(shifted, target, had)
    told = ranks.ranked(ranks.stacked([place]), 0.0 if known.all() else tenths / 10)
    others = np.where(np.abs(place.others + (-tenths if place.new else tenths) / 10) < 1e-4)[0]
    assert abs(told[0] - expected) <= len(others) / 2


def test_only_the_best_of_the_other_kind_are_looked_at() -> None:
    scores = np.arange(200, dtype=np.float64)
    known = np.arange(200) % 2 == 0
    (rank,) = ranks.ranked(ranks.stacked([ranks.place(scores, 0, NOTHING, known)]), 0.0)
    assert rank == 100 + ranks.OTHERS
    (rank,) = ranks.ranked(ranks.stacked([ranks.place(scores, 150, NOTHING, known)]), 0.0)
    assert rank == ranks.rank(scores, 150, NOTHING) == 50


def test_the_bias_of_new_items_is_what_makes_as_many_expected_as_came() -> None:
    random = np.random.default_rng(0)
    known = np.arange(100) >= 30
    truth = -2.0
    places = []
    for _ in range(4000):
        scores = random.normal(size=100)
        chances = np.exp(scores + np.where(known, 0, truth))
        places.append(ranks.place(scores, int(random.choice(100, p=chances / chances.sum())), NOTHING, known))
    stacked = ranks.stacked(places)
    assert ranks.fit_new_bias(stacked) == pytest.approx(truth, abs=0.2)
    better = ranks.figures(ranks.ranked(stacked, truth))["ndcg_10"]
    assert better > ranks.figures(ranks.ranked(stacked, 0.0))["ndcg_10"]
    assert ranks.fit_new_bias(ranks.stacked([ranks.place(np.arange(3.0), 0, NOTHING, np.ones(3, bool))])) == 0
