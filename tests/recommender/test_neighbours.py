"""Neighbours of candidates, by hand and as the whole matrix has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from lib.recommender import neighbours
from lib.recommender.neighbours import Neighbours, together

SEQUENCES = [np.array([0, 1, 2]), np.array([0, 1, 3]), np.array([2, 1])]


@given(st.integers(0, 1_000))
def test_neighbours_of_candidates_are_those_of_the_whole_matrix(seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = np.where(random.random((9, 9)) < 0.4, random.random((9, 9)), 0).astype(np.float32)
    near = Neighbours.of(csr_array(matrix), 0.5)
    history = random.integers(0, 11, random.integers(0, 6))  # 9 and 10 came later
    candidates = random.permutation(11)[: random.integers(1, 11)]
    expected = np.zeros(11)
    for age, item in enumerate(history[::-1]):
        if item < 9:
            expected[:9] += 0.5**age * matrix[item]
    np.testing.assert_allclose(near.near(history, candidates), expected[candidates], atol=1e-6)


def test_only_the_nearest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 2)
    near = Neighbours.of(csr_array(np.array([[0.1, 0.3, 0.2], [-1.0, 0, 0], [0, 0, 0.5]])), 1.0)
    assert near.matrix.toarray() == pytest.approx(np.array([[0, 0.3, 0.2], [0, 0, 0], [0, 0, 0.5]]))


def test_a_small_catalogue_has_the_linear_model_and_a_large_one_cosines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = np.array([[1, 1, 1, 0], [1, 1, 0, 1], [0, 1, 1, 0]], float)
    found = together(SEQUENCES, 4).toarray()
    for item in range(4):  # ridge regression on the other columns
        others = [other for other in range(4) if other != item]
        left, right = taken[:, others], taken[:, item]
        weights = np.linalg.solve(left.T @ left + neighbours.L2 * np.eye(3), left.T @ right)
        assert found[others, item] == pytest.approx(weights, rel=1e-6)
        assert found[item, item] == 0
    monkeypatch.setattr(neighbours, "SOLVED", 3)
    cosines = together(SEQUENCES, 4).toarray()
    assert cosines[0, 1] == pytest.approx(2 / np.sqrt(2 * 3), rel=1e-5)
    assert cosines[0, 3] == pytest.approx(1 / np.sqrt(2), rel=1e-5)
    assert np.diag(cosines).tolist() == [0] * 4
