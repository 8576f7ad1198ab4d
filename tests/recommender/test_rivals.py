"""Popularity and transitions."""

from __future__ import annotations

import numpy as np
import pytest

from lib.recommender.rivals import DISTANCE, RECENCY, Transitions, popularity


def test_popularity_is_the_same_for_all() -> None:
    found = popularity(np.array([3, 0, 7]), [np.array([0]), np.array([], np.int64)])
    assert found.tolist() == [[3, 0, 7]] * 2


def test_followers_count_by_how_soon_they_came_and_the_last_item_of_a_history_most() -> None:
    model = Transitions.fit([np.array([0, 1, 2]), np.array([0, 3])], 5)
    follows = model.follows.toarray()
    sums = 2 + DISTANCE
    assert follows[0].tolist() == pytest.approx([0, 1 / sums, DISTANCE / sums, 1 / sums, 0])
    assert follows[1].tolist() == [0, 0, 1, 0, 0]
    assert not follows[[2, 3, 4]].any()
    scores = model.scores([np.array([0, 1]), np.array([], np.int64), np.array([4])])
    assert scores[0].tolist() == pytest.approx((RECENCY * follows[0] + follows[1]).tolist())
    assert not scores[1:].any()


def test_nobody_has_two_items() -> None:
    assert not Transitions.fit([np.array([1]), np.array([2])], 3).scores([np.array([1])]).any()
    assert not Transitions.fit([], 3).scores([np.array([1])]).any()
