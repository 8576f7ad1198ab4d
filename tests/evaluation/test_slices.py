"""Slices of a split: values of a column, buckets of length."""

from __future__ import annotations

import numpy as np
import pytest

from lib.evaluation.slices import MISSING, REST, by_length, by_value

LABELS = np.array([0, 0, 1, 1, 0, 1])
PREDICTED = np.array([0, 0, 1, 0, 1, 1])


def test_each_value_is_measured_on_its_own_rows():
    parts = by_value(["tops", "tops", "tops", "tops", "dresses", "dresses"], LABELS, PREDICTED, 3)
    assert list(parts) == ["tops", "dresses"]
    assert parts["tops"] == {"rows": 4, "accuracy": 0.75, "macro_f1": pytest.approx((0.8 + 2 / 3) / 2)}
    assert parts["dresses"]["accuracy"] == 0.5


def test_missing_values_are_a_slice_too():
    parts = by_value(["tops", None, "", "tops", "tops", "tops"], LABELS, PREDICTED, 2)
    assert parts[MISSING]["rows"] == 2


def test_beyond_the_limit_values_are_taken_together():
    parts = by_value(["a", "a", "a", "b", "c", "d"], LABELS, PREDICTED, 2, limit=1)
    assert {name: part["rows"] for name, part in parts.items()} == {"a": 3, REST: 3}


def test_length_buckets_cover_every_row_once_and_in_order():
    random = np.random.default_rng(0)
    lengths = random.integers(3, 200, 1000)
    labels = random.integers(0, 2, 1000)
    parts = by_length(lengths, labels, labels, 2)
    rows = [part["rows"] for part in parts.values()]
    assert sum(rows) == 1000
    assert max(rows) < 300
    starts = [int(name.split("-")[0]) for name in parts]
    assert starts == sorted(starts)


def test_equal_lengths_are_one_bucket():
    assert list(by_length(np.full(6, 9), LABELS, PREDICTED, 2)) == ["9-9 tokens"]
