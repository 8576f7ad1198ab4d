"""The ranker finds what tells candidates apart, says how likely each is, and keeps away from what tells nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.recommender import ranker, ranks
from lib.recommender.ranker import LEAST_QUESTIONS, Questions, Ranker, candidates, fit, ranked

NAMES = ["score", "helps", "noise", "user"]


def asked(count: int, true: Any, seed: int = 0, size: int = 12) -> Questions:
    """Answers drawn from the softmax of `true(features)`."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, size, len(NAMES))).astype(np.float32)
    features[:, :, 3] = features[:, :1, 3]
    utilities = true(features) + random.gumbel(size=(count, size))
    answers = utilities.argmax(1)
    retrieval = np.array(
        [
            ranks.rank(row[:, 0], int(answer), np.zeros(0, int))
            for row, answer in zip(features, answers, strict=True)
        ]
    )
    return Questions(NAMES, features, np.ones((count, size), bool), answers, retrieval)


def test_weights_are_those_of_who_answered() -> None:
    found = fit(asked(2_000, lambda x: x[..., 0] + 2 * x[..., 1]))
    assert found is not None
    assert found.crosses == []
    assert found.weights == pytest.approx([1, 2, 0, 0], abs=0.15)
    assert found.coverage == 1
    left_out, alone = found.measured["left_out"], found.measured["retrieval"]
    assert left_out["ndcg_10"] > alone["ndcg_10"] + 0.1


def test_crosses_are_taken_where_they_tell_something() -> None:
    found = fit(asked(2_000, lambda x: x[..., 0] + 2 * x[..., 1] * x[..., 3]))
    assert found is not None
    assert len(found.crosses) == 1
    features = asked(1, lambda x: x[..., 0]).features[0]
    for user in (-1.0, 1.0):  # what helps one user is no help to another
        features[:, 3] = user
        scores = found.scores(features)
        assert np.corrcoef(scores - features[:, 0], features[:, 1])[0, 1] * user > 0.9


def test_chances_are_as_often_right_as_they_say() -> None:
    found = fit(asked(2_000, lambda x: x[..., 0] + x[..., 1]))
    assert found is not None
    others = asked(2_000, lambda x: x[..., 0] + x[..., 1], seed=1)
    scores = found.scores(others.features)
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    right = np.arange(scores.shape[1]) == others.answers[:, None]
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0)):
        chosen = (chances >= low) & (chances < high)
        assert right[chosen].mean() == pytest.approx(chances[chosen].mean(), abs=0.03)


def test_too_few_questions_teach_nothing() -> None:
    found = asked(LEAST_QUESTIONS, lambda x: x[..., 0])
    assert fit(found) is not None
    found.answers[0] = -1
    assert fit(found) is None


def test_candidates_stand_before_all_others() -> None:
    scores = np.array([[0.1, 0.9, 0.5, -np.inf], [1.0, 1.0, 0.0, 0.0]])
    assert ranked(scores, np.array([2, 0]), np.array([5.0, 7.0])).tolist() == [2, 1.5]
    assert ranked(scores, np.array([-1, 3]), np.array([250.0, 1.0])).tolist() == [250, 3.5]


def test_candidates_are_the_best_that_were_not_had() -> None:
    scores = np.array([5.0, 1, 4, 3, 2])
    assert candidates(scores, np.array([0]), 3).tolist() == [2, 3, 4]
    assert candidates(scores, np.array([0, 2]), 9).tolist() == [3, 4, 1]
    assert candidates(scores, np.arange(5)).tolist() == []


def test_questions_are_of_who_did_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranker, "TOGETHER", 2)
    known = [{"items": np.array(row, np.int64)} for row in ([], [0], [0, 1], [4])]
    scores = np.array([0.0, 5, 3, 1, 4])
    found = ranker.questions(
        known,
        np.array([1, 2, 0, 3]),
        lambda some: np.tile(scores, (len(some), 1)),
        lambda one, best, own: np.stack([own, best], 1),
        ["score", "item"],
    )
    # Had: 0; 0 and 1, of which 0 is asked again; 4.
    assert found.features[..., 1].tolist() == [[1, 4, 2, 3], [4, 2, 3, 0], [1, 2, 3, 0]]
    assert found.answers.tolist() == [2, 3, 2]
    assert found.retrieval.tolist() == [3, 4, 3]


def test_a_file_gives_the_same(tmp_path: Path) -> None:
    found = fit(asked(300, lambda x: x[..., 0] + 2 * x[..., 1] * x[..., 3]))
    assert found is not None
    found.write(tmp_path)
    assert Ranker.read(tmp_path / ranker.FILE) == found
