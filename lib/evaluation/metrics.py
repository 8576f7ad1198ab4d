"""Classification metrics from labels and probabilities.

Everything that only counts right and wrong answers is computed from the confusion matrix, with leading
axes allowed, so that one call scores a thousand bootstrap resamples. The conventions are
scikit-learn's; the tests hold the values against it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Metrics by which a model may be promoted: the higher the better, between 0 and 1.
DECIDING = ("macro_f1", "accuracy", "balanced_accuracy", "weighted_f1", "entity_f1")


def summary(labels: Ints, probabilities: Floats, bins: int = 15) -> dict[str, float]:
    """The headline metrics of one model on one split, in the order in which they are shown.

    `log_loss` is in nats. Raises ValueError when there are no rows.
    """
    confusion = confusion_matrix(labels, probabilities.argmax(-1), probabilities.shape[1])
    return {
        "accuracy": accuracy(confusion),
        "macro_f1": float(macro_f1(confusion)),
        "weighted_f1": weighted_f1(confusion),
        "balanced_accuracy": balanced_accuracy(confusion),
        "log_loss": log_loss(labels, probabilities),
        "brier": brier(labels, probabilities),
        "calibration_error": expected_calibration_error(calibration(labels, probabilities, bins)),
    }


def confusion_matrix(labels: Ints, predicted: Ints, classes: int) -> Ints:
    """Row counts [C, C]: true class down, predicted class across."""
    if len(labels) == 0:
        raise ValueError("no rows to measure")
    cells = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return cells.reshape(classes, classes).astype(np.int64)


def accuracy(confusion: Ints) -> float:
    return float(np.trace(confusion) / confusion.sum())


def f1(confusion: Ints) -> Floats:
    """F1 of each class, [..., C] from [..., C, C]; 0 for a class with neither rows nor predictions."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    return _share(2 * right, confusion.sum(-1) + confusion.sum(-2))


def macro_f1(confusion: Ints) -> Floats:
    """Mean F1 over all classes, [...] from [..., C, C]; every class counts the same, however rare."""
    return np.asarray(f1(confusion).mean(-1))


def macro_f1_of_present(confusion: Ints) -> float:
    """Mean F1 over the classes that have rows or predictions.

    For slices: a slice that lacks a class altogether is not marked down for it.
    """
    present = (confusion.sum(0) + confusion.sum(1)) > 0
    return float(f1(confusion)[present].mean())


def weighted_f1(confusion: Ints) -> float:
    """Mean F1, each class weighted by its rows."""
    return float(np.average(f1(confusion), weights=confusion.sum(1)))


def balanced_accuracy(confusion: Ints) -> float:
    """Mean recall over the classes that have rows."""
    rows = confusion.sum(1)
    return float((np.diag(confusion)[rows > 0] / rows[rows > 0]).mean())


def per_class(confusion: Ints, names: list[str]) -> dict[str, dict[str, float]]:
    """Label → rows, precision, recall, f1."""
    right = np.diag(confusion).astype(np.float64)
    rows = confusion.sum(1)
    precision, recall = _share(right, confusion.sum(0)), _share(right, rows)
    scores = f1(confusion)
    return {
        name: {
            "rows": int(rows[i]),
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(scores[i]),
        }
        for i, name in enumerate(names)
    }


def log_loss(labels: Ints, probabilities: Floats) -> float:
    """Mean negative log-likelihood of the true class, in nats; probabilities below 1e-15 count as that."""
    true = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(true, 1e-15, 1)).mean())


def brier(labels: Ints, probabilities: Floats) -> float:
    """Brier score over all classes (Brier 1950): mean squared distance to the one-hot truth, 0 to 2."""
    distance = probabilities.copy()
    distance[np.arange(len(labels)), labels] -= 1
    return float((distance**2).sum(-1).mean())


def calibration(labels: Ints, probabilities: Floats, bins: int = 15) -> list[dict[str, float]]:
    """Equal-width bins of the predicted class's probability (Guo et al. 2017), low to high.

    Bin b of B holds confidences in (b/B, (b+1)/B]. Each gives `lower`, `upper`, `rows`, and the mean
    `confidence` and `accuracy` of its rows (both 0 in an empty bin).
    """
    confidence = probabilities.max(-1)
    right = (probabilities.argmax(-1) == labels).astype(np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    sure = _share(np.bincount(place, weights=confidence, minlength=bins), rows)
    hit = _share(np.bincount(place, weights=right, minlength=bins), rows)
    return [
        {
            "lower": b / bins,
            "upper": (b + 1) / bins,
            "rows": int(rows[b]),
            "confidence": float(sure[b]),
            "accuracy": float(hit[b]),
        }
        for b in range(bins)
    ]


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """Mean |accuracy - confidence| over the bins, weighted by their rows (Guo et al. 2017, eq. 3)."""
    total = sum(b["rows"] for b in bins)
    return float(sum(b["rows"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total)


def _share(part: NDArray[np.generic], whole: NDArray[np.generic]) -> Floats:
    """part / whole, and 0 where the whole is 0."""
    part = np.asarray(part, np.float64)
    share: Floats = np.divide(part, whole, out=np.zeros_like(part), where=np.asarray(whole) > 0)
    return share
