"""The two baselines: that they learn what there is to learn, and survive what there is not."""

from __future__ import annotations

import numpy as np
import pytest

from lib.evaluation.baselines import majority, tfidf

GOOD, BAD = "i love this soft dress it fits", "awful and poor it fell apart"


def rows(copies: int) -> tuple[list[str], np.ndarray]:
    return [f"{GOOD} {i}" if i % 2 else f"{BAD} {i}" for i in range(copies)], np.arange(copies) % 2


def test_majority_answers_the_most_frequent_class_everywhere():
    baseline = majority(np.array([2, 2, 2, 0]), 5, classes=3)
    assert baseline.probabilities.argmax(-1).tolist() == [2] * 5
    assert baseline.probabilities[0].tolist() == [0.25, 0, 0.75]
    assert "75.0%" in baseline.how


def test_tfidf_learns_which_words_go_with_which_class():
    baseline = tfidf(rows(40), rows(10), ["love it so soft", "poor poor thing"], classes=2)
    assert baseline.probabilities.argmax(-1).tolist() == [1, 0]
    assert baseline.probabilities.sum(-1) == pytest.approx([1, 1])
    assert "by validation" in baseline.how


def test_tfidf_without_validation_rows_says_so():
    baseline = tfidf(rows(40), ([], np.zeros(0, np.int64)), [GOOD], classes=2)
    assert "unvalidated" in baseline.how


def test_class_absent_from_training_gets_no_probability():
    baseline = tfidf(rows(20), rows(4), [GOOD], classes=4)
    assert baseline.probabilities.shape == (1, 4)
    assert baseline.probabilities[0, 2:].tolist() == [0, 0]


def test_one_class_only_falls_back_to_majority():
    baseline = tfidf((["a b", "c d"], np.array([1, 1])), ([], np.zeros(0, np.int64)), ["a"], classes=2)
    assert baseline.probabilities.tolist() == [[0, 1]]


def test_texts_without_words_fall_back_to_majority():
    baseline = tfidf((["!!", "??", "--"], np.array([0, 1, 1])), (["."], np.array([0])), ["!"], classes=2)
    assert baseline.probabilities.argmax(-1).tolist() == [1]
