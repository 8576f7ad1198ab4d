"""Agreement of people, against worked examples of others."""

from __future__ import annotations

import numpy as np
import pytest

from lib.data.labelling.agreement import MISSING, agreement, cohen_kappa, krippendorff_alpha


def rated(text: str) -> np.ndarray:
    """Rows of labels, a line for each person; a dot is no label."""
    return np.array(
        [[MISSING if c == "." else int(c) for c in line.split()] for line in text.strip().splitlines()]
    )


# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers, twelve units.
EXAMPLE = rated("""
    1 2 3 3 2 1 4 1 2 . . .
    1 2 3 3 2 2 4 1 2 5 . 3
    . 3 3 3 2 3 4 2 2 5 1 .
    1 2 3 3 2 4 4 1 2 5 1 .
""")


def test_alpha_is_that_of_krippendorffs_example() -> None:
    assert krippendorff_alpha(EXAMPLE) == pytest.approx(0.743, abs=5e-4)
    # Neither the order of people nor of rows counts, nor a row that one alone has labelled.
    assert krippendorff_alpha(EXAMPLE[::-1, ::-1]) == pytest.approx(krippendorff_alpha(EXAMPLE))
    alone = np.array([[4], [MISSING], [MISSING], [MISSING]])
    assert krippendorff_alpha(np.hstack([EXAMPLE, alone])) == pytest.approx(krippendorff_alpha(EXAMPLE))


def test_alpha_of_two_people_and_two_labels_is_that_of_the_same_paper() -> None:
    # Section A: binary data, two observers, ten units without missing ones: 0.095.
    both = rated("0 1 0 0 0 0 0 0 1 0\n1 1 1 0 0 1 0 0 0 0")
    assert krippendorff_alpha(both) == pytest.approx(0.095, abs=5e-4)


def test_kappa_is_that_of_a_known_table_and_of_scikit_learn() -> None:
    # 50 rows: both yes 20, both no 15, only the first yes 5, only the second yes 10; kappa 0.4.
    first = np.repeat([1, 1, 0, 0], [20, 5, 10, 15])
    second = np.repeat([1, 0, 1, 0], [20, 5, 10, 15])
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    b[:120] = a[:120]
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_what_tells_nothing_is_none() -> None:
    assert cohen_kappa(np.zeros(5, int), np.zeros(5, int)) is None
    assert krippendorff_alpha(np.zeros((2, 5), int)) is None
    assert krippendorff_alpha(np.array([[1, MISSING], [MISSING, 2]])) is None
    assert krippendorff_alpha(np.full((2, 3), MISSING)) is None
    assert agreement(np.zeros((0, 0), int), [])["alpha"] is None


def test_the_mean_kappa_counts_a_pair_as_its_rows() -> None:
    said = agreement(EXAMPLE, ["A1", "A2", "A3", "A4"])
    assert (said["annotators"], said["rows"], said["labelled_by_several"]) == (4, 12, 11)
    assert [pair["rows"] for pair in said["pairs"]] == [9, 8, 9, 9, 10, 10]
    mean = sum(pair["kappa"] * pair["rows"] for pair in said["pairs"]) / 55
    assert said["kappa"] == pytest.approx(mean, abs=1e-4)
    assert said["alpha"] == 0.7434
