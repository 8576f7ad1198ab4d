"""The bootstrap against one that resamples rows one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from lib.evaluation.intervals import bootstrap_macro_f1, interval, mcnemar, p_value


@pytest.fixture
def answers() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    random = np.random.default_rng(3)
    labels = random.choice(3, 300, p=[0.7, 0.2, 0.1])
    good = np.where(random.random(300) < 0.8, labels, random.integers(0, 3, 300))
    poor = np.where(random.random(300) < 0.5, labels, random.integers(0, 3, 300))
    return labels, {"good": good, "poor": poor}


def test_drawing_counts_equals_drawing_rows(answers):
    labels, predicted = answers
    ours = bootstrap_macro_f1(labels, predicted, 3, 2000)
    random = np.random.default_rng(11)
    rows = [random.integers(0, len(labels), len(labels)) for _ in range(500)]
    for name, one in predicted.items():
        plain = [
            f1_score(labels[r], one[r], labels=[0, 1, 2], average="macro", zero_division=0) for r in rows
        ]
        assert ours[name].mean() == pytest.approx(np.mean(plain), abs=0.006)
        assert ours[name].std() == pytest.approx(np.std(plain), rel=0.15)


def test_pairing_makes_the_difference_surer_than_its_parts(answers):
    labels, predicted = answers
    nearly = predicted["good"].copy()
    nearly[:5] = (nearly[:5] + 1) % 3
    scores = bootstrap_macro_f1(labels, {"good": predicted["good"], "nearly": nearly}, 3, 1000)
    apart = np.hypot(scores["good"].std(), scores["nearly"].std())
    assert (scores["good"] - scores["nearly"]).std() < apart / 2


def test_same_seed_same_interval(answers):
    labels, predicted = answers
    first, second = (bootstrap_macro_f1(labels, predicted, 3, 100)["good"] for _ in range(2))
    assert first.tolist() == second.tolist()


def test_interval_encloses_the_measured_value(answers):
    labels, predicted = answers
    low, high = interval(bootstrap_macro_f1(labels, predicted, 3, 1000)["good"])
    assert low < f1_score(labels, predicted["good"], average="macro") < high


def test_many_classes_are_drawn_in_parts(answers, monkeypatch):
    labels, predicted = answers
    monkeypatch.setattr("lib.evaluation.intervals.CELLS_AT_ONCE", 100)
    assert len(bootstrap_macro_f1(labels, predicted, 3, 37)["good"]) == 37


def test_mcnemar_is_the_binomial_test_of_the_rows_that_differ():
    ours = np.array([True] * 8 + [False] * 2 + [True] * 50 + [False] * 5)
    theirs = np.array([False] * 8 + [True] * 2 + [True] * 50 + [False] * 5)
    won, lost, p = mcnemar(ours, theirs)
    assert (won, lost) == (8, 2)
    assert p == pytest.approx(2 * sum(math.comb(10, k) for k in (0, 1, 2)) / 2**10)
    assert mcnemar(ours, ours) == (0, 0, 1.0)


def test_p_of_equal_models_is_spread_evenly_and_of_a_better_one_is_small():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 300)
    chances = []
    for seed in range(200):
        drawn = np.random.default_rng(seed)
        right = {name: drawn.random(300) < 0.8 for name in ("a", "b")}
        predicted = {name: np.where(hit, labels, 1 - labels) for name, hit in right.items()}
        scores = bootstrap_macro_f1(labels, predicted, 2, 200, seed)
        chances.append(p_value(scores["a"] - scores["b"]))
    assert 0.01 < np.mean(np.array(chances) < 0.05) < 0.12
    better = {
        "a": np.where(random.random(300) < 0.9, labels, 1 - labels),
        "b": np.where(random.random(300) < 0.7, labels, 1 - labels),
    }
    scores = bootstrap_macro_f1(labels, better, 2, 999)
    assert p_value(scores["a"] - scores["b"]) < 0.01
    assert p_value(scores["b"] - scores["a"]) < 0.01
