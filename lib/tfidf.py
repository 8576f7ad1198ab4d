"""Logistic regression on TF-IDF weights of words and word pairs: what evaluation compares models with, and what looks for
wrong labels before one is trained. Seconds, and no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

# Below this many rows a word that occurs once is kept; above, it is mostly a spelling mistake.
RARE_WORDS_MATTER = 1_000


def vectorizer(texts: Sequence[str]) -> TfidfVectorizer | None:
    """For these texts, not fitted yet; None where the first thousand hold no word."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    common = 2 if len(texts) >= RARE_WORDS_MATTER else 1
    # One-letter words count: in many scripts a letter is a word.
    found = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=common, token_pattern=r"(?u)\b\w+\b", dtype=np.float32
    )
    return found if any(found.build_analyzer()(text) for text in texts[:1000]) else None


def fit(features: Any, labels: np.ndarray, strength: float, weighting: str | None) -> LogisticRegression:
    """`strength` is C, the inverse of the regularisation; `weighting` None or `balanced`."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, class_weight=weighting, max_iter=500).fit(features, labels)


def probabilities(model: LogisticRegression, features: Any, classes: int) -> np.ndarray:
    """float64 [N, classes]; classes that the rows of `fit` lacked get 0."""
    found = np.zeros((features.shape[0], classes))
    found[:, model.classes_] = model.predict_proba(features)
    return found
