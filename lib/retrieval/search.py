"""Which passages answer a question: by words (BM25), by meaning (cosine), or by both fused.

`rrf` is reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): a passage's score is the sum over the rankings of
1 / (60 + rank). It needs no common scale. `sum` is a convex combination (Bruch, Gai and Ingber 2023) up to a factor:
cosine + weight · BM25 / the question's highest BM25. It keeps how much better one passage is than the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.retrieval.index import Index
from lib.retrieval.rerank import reranker
from lib.settings import SearchSettings

RRF_K = 60
# Passages of each ranking that are fused.
CANDIDATES = 50


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    title: str
    headings: tuple[str, ...]
    text: str
    source: str
    place: str
    uri: str
    cosine: float
    """Of the passage and the question that it is nearest to."""
    score: float
    """What hits are ordered by: the fused one."""


def search(
    index: Index, questions: Sequence[str], vectors: np.ndarray, settings: SearchSettings
) -> list[Hit]:
    """The best passages, best first; none when no passage's cosine reaches the threshold.

    `questions` are ways of putting one question, whose rankings are fused too, and `vectors`, float32 [Q, D] of
    length 1, what the index's encoder makes of them. `settings.rerank` orders the best by the last way.
    """
    rankings: list[list[dict[str, Any]]] = []
    words: dict[int, float] = {}
    for question, vector in zip(questions, vectors, strict=True):
        if settings.mode != "text":
            rankings.append(index.nearest(vector, CANDIDATES))
        if settings.mode != "vector":
            rankings.append(index.matching(question, CANDIDATES))
            highest = max((row["_score"] for row in rankings[-1]), default=1.0)
            for row in rankings[-1]:
                words[row["id"]] = max(words.get(row["id"], 0.0), row["_score"] / highest)
    rows = {row["id"]: row for ranking in rankings for row in ranking}
    if not rows:
        return []
    found = np.stack([np.asarray(row["vector"], np.float32) for row in rows.values()])
    cosines = dict(zip(rows, (found @ vectors.T).max(1).tolist(), strict=True))
    if settings.mode == "hybrid" and settings.fusion == "sum":
        scores = {one: cosine + settings.text_weight * words.get(one, 0.0) for one, cosine in cosines.items()}
    else:
        scores = fuse([[row["id"] for row in ranking] for ranking in rankings])
    best = sorted(scores, key=lambda one: (-scores[one], one))
    relevant = [one for one in best if cosines[one] >= settings.threshold]
    if settings.rerank is not None and relevant:
        first = relevant[: max(settings.rerank_candidates, settings.top_k)]
        read = ["\n".join((rows[one]["title"], *rows[one]["headings"], rows[one]["text"])) for one in first]
        judged = reranker(settings.rerank).scores(questions[-1], read)
        scores = dict(zip(first, judged.tolist(), strict=True))
        relevant = sorted(first, key=lambda one: (-scores[one], one))
    return [_hit(rows[one], cosines[one], scores[one]) for one in relevant[: settings.top_k]]


def _hit(row: dict[str, Any], cosine: float, score: float) -> Hit:
    told = {key: row[key] for key in ("title", "text", "source", "place", "uri")}
    return Hit(**told, headings=tuple(row["headings"]), cosine=cosine, score=score)


def fuse(rankings: Sequence[Sequence[int]]) -> dict[int, float]:
    """The score of each id by reciprocal rank fusion."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, found in enumerate(ranking, 1):
            scores[found] = scores.get(found, 0.0) + 1 / (RRF_K + rank)
    return scores
