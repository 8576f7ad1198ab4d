"""The metrics against scikit-learn's, and against values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as theirs

from lib.evaluation import metrics


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    """Labels [500] of four classes, one of them rare, and probabilities [500, 4] that lean the right way."""
    random = np.random.default_rng(7)
    labels = random.choice(4, 500, p=[0.6, 0.25, 0.14, 0.01])
    logits = random.normal(size=(500, 4))
    logits[np.arange(500), labels] += 1.2
    exponents = np.exp(logits)
    return labels, exponents / exponents.sum(-1, keepdims=True)


def test_summary_equals_scikit_learn(answers):
    labels, probabilities = answers
    predicted = probabilities.argmax(-1)
    ours = metrics.summary(labels, probabilities)
    assert ours["accuracy"] == pytest.approx(theirs.accuracy_score(labels, predicted))
    assert ours["macro_f1"] == pytest.approx(theirs.f1_score(labels, predicted, average="macro"))
    assert ours["weighted_f1"] == pytest.approx(theirs.f1_score(labels, predicted, average="weighted"))
    assert ours["balanced_accuracy"] == pytest.approx(theirs.balanced_accuracy_score(labels, predicted))
    assert ours["log_loss"] == pytest.approx(theirs.log_loss(labels, probabilities))
    assert ours["brier"] == pytest.approx(theirs.brier_score_loss(labels, probabilities))


def test_per_class_equals_scikit_learn(answers):
    labels, probabilities = answers
    predicted = probabilities.argmax(-1)
    names = ["a", "b", "c", "d"]
    ours = metrics.per_class(metrics.confusion_matrix(labels, predicted, 4), names)
    report = theirs.classification_report(labels, predicted, target_names=names, output_dict=True)
    for name in names:
        assert ours[name]["rows"] == report[name]["support"]
        assert ours[name]["precision"] == pytest.approx(report[name]["precision"])
        assert ours[name]["recall"] == pytest.approx(report[name]["recall"])
        assert ours[name]["f1"] == pytest.approx(report[name]["f1-score"])


def test_confusion_has_the_truth_down_and_the_prediction_across():
    confusion = metrics.confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_class_that_never_occurs_counts_zero_in_the_whole_and_not_at_all_in_a_slice():
    confusion = metrics.confusion_matrix(np.array([0, 1]), np.array([0, 1]), 3)
    assert metrics.macro_f1(confusion) == pytest.approx(2 / 3)
    assert metrics.macro_f1_of_present(confusion) == 1.0
    labels, predicted = [0, 1], [0, 1]
    assert metrics.macro_f1(confusion) == pytest.approx(
        theirs.f1_score(labels, predicted, labels=[0, 1, 2], average="macro", zero_division=0)
    )


def test_f1_of_many_matrices_at_once_equals_one_by_one():
    matrices = np.random.default_rng(0).integers(0, 20, (5, 3, 3))
    together = metrics.macro_f1(matrices)
    assert together == pytest.approx([float(metrics.macro_f1(m)) for m in matrices])


def test_calibration_error_by_hand():
    # Five rows at confidence 0.9, four of them right: gap 0.1. Five at 0.6, all right: gap 0.4.
    probabilities = np.array([[0.9, 0.1]] * 5 + [[0.4, 0.6]] * 5)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    bins = metrics.calibration(labels, probabilities, bins=10)
    assert [b["rows"] for b in bins] == [0, 0, 0, 0, 0, 5, 0, 0, 5, 0]
    assert bins[8]["accuracy"] == pytest.approx(0.8)
    assert metrics.expected_calibration_error(bins) == pytest.approx(0.25)


def test_calibration_bins_are_closed_above():
    bins = metrics.calibration(np.array([0, 0]), np.array([[0.5, 0.5], [1.0, 0.0]]), bins=2)
    assert [b["rows"] for b in bins] == [1, 1]


def test_certain_and_right_is_perfectly_calibrated():
    probabilities = np.eye(3)[[0, 1, 2, 1]]
    summary = metrics.summary(np.array([0, 1, 2, 1]), probabilities)
    assert summary["calibration_error"] == 0
    assert summary["brier"] == 0
    assert summary["log_loss"] == pytest.approx(0)


def test_certain_and_wrong_stays_finite():
    summary = metrics.summary(np.array([0]), np.array([[0.0, 1.0]]))
    assert summary["brier"] == pytest.approx(2)
    assert np.isfinite(summary["log_loss"])


def test_no_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        metrics.summary(np.zeros(0, np.int64), np.zeros((0, 3)))
