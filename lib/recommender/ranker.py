"""The second stage: puts the best of the retrieval in order by more than a product of vectors.

A cross network (DCN-V2, Wang et al. 2021, https://doi.org/10.1145/3442381.3450078) over the features of each candidate
(lib.recommender.signals), fitted so that the softmax over the candidates of what came next is greatest (McFadden 1973; in
ranking ListNet's top-one loss, Cao et al. 2007). It learns from the validation split, of which the retrieval model has
seen nothing: of the items that training saw, its scores are too good to learn from. How many cross layers there are, and
how strongly weights are kept small, is what foretells users best that were left out.

Shapes: Q questions, P candidates of each, F features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lib import storage
from lib.errors import ModelError
from lib.recommender import ranks

FILE = "ranker.json"
# Candidates of a question, and questions that are learned from: few weights need no more.
CANDIDATES, QUESTIONS = 200, 5_000
# That are scored at a time.
TOGETHER = 256
# Fewer questions whose answer is among the candidates tell nothing.
LEAST_QUESTIONS = 40
FOLDS = 5
LAYERS, PENALTIES = (0, 1), (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Ranker:
    names: list[str]
    """Of the features."""
    crosses: list[list[list[float]]]
    """[F, F + 1] for each cross layer: a matrix, and behind it the bias."""
    weights: list[float]
    """[F]."""
    coverage: float
    """How often what came next was among the candidates."""
    measured: dict[str, Any]
    """What was found while it was fitted: of validation users that were left out, figures of the ranker and of the
    retrieval alone."""

    def scores(self, features: np.ndarray) -> np.ndarray:
        """float64 [P] from [P, F]; the softmax of a user's candidates, times `coverage`, is how likely each comes next."""
        state = first = features.astype(np.float64)
        for layer in self.crosses:
            matrix = np.array(layer)
            state = first * (state @ matrix[:, :-1].T + matrix[:, -1]) + state
        return np.asarray(state @ np.array(self.weights))

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, file: Path) -> Ranker:
        return cls(**json.loads(file.read_text()))


def check(directory: str) -> None:
    """Raises ModelError for a model directory that has no ranker."""
    if FILE not in storage.ls(directory):
        raise ModelError(
            f"model.recommender.ranker_from: {directory} has no {FILE}; name the model directory of a run that fitted one"
        )


@dataclass(frozen=True)
class Questions:
    """What the ranker learns from."""

    names: list[str]
    """Of the features."""
    features: np.ndarray
    """float32 [Q, P, F]; 0 behind the last candidate of a question that has fewer."""
    present: np.ndarray
    """bool [Q, P]."""
    answers: np.ndarray
    """int64 [Q]: which candidate came next; below 0: none of them."""
    retrieval: np.ndarray
    """float64 [Q]: rank of what came next, by the retrieval alone."""


def fit(found: Questions) -> Ranker | None:
    """None where too few questions have their answer among the candidates."""
    asked = np.flatnonzero(found.answers >= 0)
    if len(asked) < LEAST_QUESTIONS:
        return None
    folds = np.random.default_rng(0).integers(0, FOLDS, len(found.answers))
    tried: dict[tuple[int, float], tuple[float, np.ndarray]] = {}
    for layers in LAYERS:
        for penalty in PENALTIES:
            scores = np.zeros(found.features.shape[:2])
            for fold in range(FOLDS):
                learned = asked[folds[asked] != fold]
                left = folds == fold
                scores[left] = _scores(*_learn(found, learned, layers, penalty), found, left)
            tried[layers, penalty] = _loss(scores[asked], found.answers[asked]), scores
    layers, penalty = min(tried, key=lambda key: tried[key][0])
    loss, scores = tried[layers, penalty]
    crosses, weights = _learn(found, asked, layers, penalty)
    measured = {
        "questions": len(found.answers),
        "cross_layers": layers,
        "penalty": penalty,
        "log_loss": loss,
        "left_out": ranks.figures(ranked(scores, found.answers, found.retrieval)),
        "retrieval": ranks.figures(found.retrieval),
    }
    return Ranker(found.names, crosses.tolist(), weights.tolist(), len(asked) / len(found.answers), measured)


def ranked(scores: np.ndarray, answers: np.ndarray, retrieval: np.ndarray) -> np.ndarray:
    """Ranks float64 [Q]: the candidates stand before all others, in the order of scores [Q, P]."""
    own = np.take_along_axis(scores, np.maximum(answers, 0)[:, None], 1)
    among = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return np.where(answers >= 0, among, retrieval)


def _loss(scores: np.ndarray, answers: np.ndarray) -> float:
    return float(functional.cross_entropy(torch.from_numpy(scores), torch.from_numpy(answers)))


def _scores(crosses: np.ndarray, weights: np.ndarray, found: Questions, chosen: np.ndarray) -> np.ndarray:
    """[Q, P] of the questions of bool `chosen`; -inf where there is no candidate."""
    ranker = Ranker([], crosses.tolist(), weights.tolist(), 1.0, {})
    return np.where(found.present[chosen], ranker.scores(found.features[chosen]), -np.inf)


def _learn(found: Questions, asked: np.ndarray, layers: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Crosses [layers, F, F + 1] and weights [F], by L-BFGS over all questions at once."""
    features, absent = (torch.from_numpy(x[asked]) for x in (found.features, ~found.present))
    answers = torch.from_numpy(found.answers[asked])
    width = features.shape[2]
    crosses = torch.zeros(layers, width, width + 1, requires_grad=True)
    # From the retrieval's order: the first of the features is its score.
    weights = torch.zeros(width)
    weights[0] = 1.0
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS([crosses, weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        state = features
        for layer in crosses:
            state = features * functional.linear(state, layer[:, :-1], layer[:, -1]) + state
        loss = functional.cross_entropy((state @ weights).masked_fill(absent, -torch.inf), answers)
        loss = loss + penalty * ((weights**2).sum() + (crosses**2).sum())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
    return crosses.detach().numpy(), weights.detach().numpy()


def candidates(scores: np.ndarray, had: np.ndarray, most: int = CANDIDATES) -> np.ndarray:
    """int64 [P]: the best `most` items by scores [N], the best first, of those a user has not had."""
    left = scores.astype(np.float64)
    left[had] = -np.inf
    size = min(most, int(np.isfinite(left).sum()))
    best = np.argpartition(-left, max(size - 1, 0))[:size]
    return best[np.argsort(-left[best], kind="stable")]


def questions(
    known: Sequence[dict[str, Any]],
    targets: np.ndarray,
    score: Callable[[Sequence[dict[str, Any]]], np.ndarray],
    features: Callable[[dict[str, Any], np.ndarray, np.ndarray], np.ndarray],
    names: list[str],
) -> Questions:
    """Of what is foretold (`lib.recommender.queries.asked`): `score` gives the retrieval's scores [B, N], `features` [P, F] those
    of candidates with these scores."""
    chosen = np.array([i for i, one in enumerate(known) if len(one["items"])], np.int64)
    if len(chosen) > QUESTIONS:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, QUESTIONS, replace=False))
    rows, answers, retrieval = [], [], []
    for start in range(0, len(chosen), TOGETHER):
        part = chosen[start : start + TOGETHER].tolist()
        for i, scores in zip(part, score([known[i] for i in part]), strict=True):
            had = known[i]["items"]
            had = had[had != targets[i]]
            best = candidates(scores, had)
            rows.append(features(known[i], best, scores[best]))
            place = np.flatnonzero(best == targets[i])
            answers.append(int(place[0]) if len(place) else -1)
            retrieval.append(ranks.rank(scores, int(targets[i]), had))
    sizes = np.array([len(row) for row in rows], np.int64)
    present = np.arange(sizes.max(initial=0)) < sizes[:, None]
    padded = np.zeros((*present.shape, len(names)), np.float32)
    if rows:
        padded[present] = np.concatenate(rows)
    return Questions(names, padded, present, np.array(answers, np.int64), np.array(retrieval))
