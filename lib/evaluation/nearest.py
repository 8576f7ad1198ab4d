"""The chat baseline that needs no language model: the answer that the nearest training question got.

Nearest is the highest cosine of TF-IDF weights of words and word pairs (Salton and Buckley 1988). A model that
answers no better than this has learned nothing that a search could not have found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

# Similarities held at a time: 64 MiB of float32.
CELLS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Nearest:
    """An answer for each question, and how it was found."""

    answers: list[str]
    seconds: float
    how: str


def nearest(questions: Sequence[str], answers: Sequence[str], asked: Sequence[str]) -> Nearest:
    """For each of `asked`, the answer of the training question that is nearest to it; the first of equals."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    began = time.perf_counter()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    analyze = vectorizer.build_analyzer()
    if not any(analyze(question) for question in questions):
        how = "no training question holds a word: always the first answer"
        return Nearest([answers[0]] * len(asked), time.perf_counter() - began, how)
    known = vectorizer.fit_transform(questions)
    found: list[str] = []
    step = max(1, CELLS_AT_ONCE // known.shape[0])
    for start in range(0, len(asked), step):
        near = (vectorizer.transform(asked[start : start + step]) @ known.T).toarray().argmax(-1)
        found += [answers[int(i)] for i in near]
    how = f"the answer to the nearest of {len(questions):,} training questions by TF-IDF"
    return Nearest(found, time.perf_counter() - began, how)
