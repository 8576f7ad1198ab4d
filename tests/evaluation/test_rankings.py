"""Lists are judged by rank, and by how likely they were said to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lib.evaluation.lists import calibration
from lib.evaluation.rankings import _joined, rank


def known(histories: list[list[int]]) -> list[dict[str, Any]]:
    return [{"items": np.array(row, np.int64)} for row in histories]


def test_two_stages_are_one_distribution() -> None:
    scores = np.log(np.array([0.1, 0.2, 0.3, 0.25, 0.15], np.float32))
    found = np.exp(_joined(scores, np.array([4]), np.array([2, 3]), np.log([1.0, 3.0]), 0.8))
    # Of .8 a quarter and three quarters; .2 to the others but what was had, as 1 to 2.
    assert found[[2, 3]] == pytest.approx([0.2, 0.6])
    assert found[[0, 1]] == pytest.approx([0.2 / 3, 0.4 / 3], rel=1e-5)
    assert found[:4].sum() == pytest.approx(1, rel=1e-5)


def test_all_that_is_left_may_be_candidates() -> None:
    found = np.exp(_joined(np.zeros(3, np.float32), np.array([0]), np.array([1, 2]), np.zeros(2), 0.9))
    assert found[1:] == pytest.approx([0.45, 0.45])


def test_chances_are_as_often_right_as_they_are_said_to_be() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(3_000, 20)) * 1.5
    targets = (logits + random.gumbel(size=logits.shape)).argmax(1)
    places = iter(range(0, len(logits), 256))

    def scorer(part: list[dict[str, Any]]) -> np.ndarray:
        start = next(places)
        return logits[start : start + len(part)]

    found = rank(scorer, known([[]] * len(logits)), targets)
    bins = calibration(found.first, found.chances, targets, 10)
    assert sum(one["rows"] for one in bins) == found.first.size
    assert [one["confidence"] for one in bins] == sorted(one["confidence"] for one in bins)
    for one in bins:
        assert one["accuracy"] == pytest.approx(one["confidence"], abs=0.03)


def test_what_was_had_is_no_chance() -> None:
    found = rank(lambda part: np.zeros((len(part), 5)), known([[0, 1], [2]]), np.array([2, 3]))
    assert found.first.shape == (2, 3)  # as many as the user with the fewest has left
    assert found.chances[0] == pytest.approx([1 / 3] * 3)
    assert found.ranks.tolist() == [2, 2.5]
