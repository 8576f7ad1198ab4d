"""What a model must beat: classifiers that take seconds and no GPU.

`majority` always answers the most frequent class of the training split. `tfidf` is logistic regression
on TF-IDF weights of words and word pairs, its regularisation and class weighting chosen by macro-F1 on
the validation split: on short texts a rival that many fine-tuned encoders do not beat by much. `lookup`, for
words, answers what the same word was most often (Tjong Kim Sang and De Meulder 2003 compare with its like).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lib.evaluation.metrics import Floats, Ints, confusion_matrix, macro_f1
from lib.tfidf import fit, probabilities, vectorizer

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

STRENGTHS = (0.3, 1.0, 3.0, 10.0)
WEIGHTINGS: tuple[Literal["balanced"] | None, ...] = ("balanced", None)


@dataclass(frozen=True)
class Baseline:
    """A baseline's answers on the test split, and how they came about."""

    probabilities: Floats
    seconds: float
    how: str


def majority(train_labels: Ints, rows: int, classes: int) -> Baseline:
    """The class shares of the training split, for every one of `rows` test rows."""
    began = time.perf_counter()
    shares = np.bincount(train_labels, minlength=classes) / len(train_labels)
    how = f"always the most frequent class, {shares.max():.1%} of the training rows"
    return Baseline(np.tile(shares, (rows, 1)), time.perf_counter() - began, how)


def lookup(train: tuple[Sequence[str], Ints], test_texts: Sequence[str], classes: int) -> Baseline:
    """The class shares that each text had in the training split; those of all texts for one it has not seen."""
    began = time.perf_counter()
    texts, labels = train
    places: dict[str, int] = {}
    rows = np.array([places.setdefault(text, len(places)) for text in texts], np.int64)
    seen = np.bincount(rows * classes + labels, minlength=len(places) * classes).reshape(-1, classes)
    everything = np.bincount(labels, minlength=classes)
    counts = np.concatenate([seen, everything[None]]).astype(np.float64)
    shares = counts / counts.sum(-1, keepdims=True)
    probabilities = shares[[places.get(text, len(places)) for text in test_texts]]
    unseen = sum(text not in places for text in test_texts) / max(len(test_texts), 1)
    how = f"the most frequent class of each of {len(places):,} words; {unseen:.1%} of the test words are new"
    return Baseline(probabilities, time.perf_counter() - began, how)


def tfidf(
    train: tuple[Sequence[str], Ints],
    validation: tuple[Sequence[str], Ints],
    test_texts: Sequence[str],
    classes: int,
) -> Baseline:
    """Fitted on `train`, chosen on `validation` (C = 1, balanced, where that is empty).

    Falls back to `majority` when the training rows hold one class only, or no word at all.
    """
    began = time.perf_counter()
    texts, labels = train
    words = vectorizer(texts)
    if len(np.unique(labels)) < 2 or words is None:
        return majority(labels, len(test_texts), classes)
    features = words.fit_transform(texts)
    model, choice = _choose(features, labels, words, validation, classes)
    shares = probabilities(model, words.transform(test_texts), classes)
    how = f"words and word pairs, {features.shape[1]:,} features, {choice}, {len(texts):,} training rows"
    return Baseline(shares, time.perf_counter() - began, how)


def _choose(
    features: Any, labels: Ints, words: Any, validation: tuple[Sequence[str], Ints], classes: int
) -> tuple[LogisticRegression, str]:
    """The fitted model with the best macro-F1 on the validation split, and what was chosen."""
    texts, truth = validation
    if len(texts) == 0:
        return fit(features, labels, 1.0, "balanced"), "C = 1 and balanced classes, unvalidated"
    held_out = words.transform(texts)
    best: tuple[float, LogisticRegression, str] | None = None
    for weighting in WEIGHTINGS:
        for strength in STRENGTHS:
            model = fit(features, labels, strength, weighting)
            score = float(macro_f1(confusion_matrix(truth, model.predict(held_out), classes)))
            if best is None or score > best[0]:
                classes_are = "balanced classes" if weighting else "classes as they are"
                best = (score, model, f"C = {strength:g} and {classes_are} by validation")
    assert best is not None
    return best[1], best[2]
