"""Label values → classes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from lib.labels import MISSING, UNKNOWN, Mapping, Unknown
from lib.settings import DataSettings


def mapping(labels: object) -> Mapping:
    return Mapping.of(DataSettings.model_validate({"source": "x.csv", "labels": labels}))


STARS = {1: "negative", 2: "negative", 3: "neutral", 4.0: "positive", "5": "positive"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", 0), ("2", 0), ("3", 1), ("3.0", 1), (" 3 ", 1), ("4", 2), ("5.00", 2), ("4.5", UNKNOWN),
        ("", MISSING), ("  ", MISSING), (None, MISSING),
        ("five", UNKNOWN), ("nan", UNKNOWN), ("1e999", UNKNOWN),
    ],
)  # fmt: skip
def test_numbers_compare_however_they_are_written(value: str | None, expected: int) -> None:
    assert mapping(STARS).index(value) == expected


def test_names_compare_exactly() -> None:
    named = mapping(["good", "bad"])
    assert [named.index(v) for v in ("good", "bad", "Good")] == [0, 1, UNKNOWN]


def test_true_and_false() -> None:
    spam = mapping({True: "spam", False: "ham"})
    assert [spam.index(v) for v in ("true", "True", "FALSE")] == [0, 0, 1]


def test_apply_works_on_whole_columns() -> None:
    classes = mapping(STARS).apply(pa.array(["5", "1", None, "9", "3.0", "5"]))
    assert classes.dtype == np.int32
    assert classes.tolist() == [2, 0, MISSING, UNKNOWN, 1, 2]


def test_apply_to_nothing_and_to_nulls() -> None:
    assert mapping(STARS).apply(pa.array([], pa.string())).tolist() == []
    assert mapping(STARS).apply(pa.array([None, None], pa.string())).tolist() == [MISSING, MISSING]


def test_unknown_names_the_first_and_a_few_values() -> None:
    values = pa.array(["1", "x", "y", "x", "a", "b", "c", "d"])
    classes = mapping(STARS).apply(values)
    early = Unknown.among(values, classes, np.arange(100, 108))
    assert (early.rows, early.first, early.values) == (7, 101, ["x", "y", "a", "b", "c"])
    nothing = Unknown.among(pa.array(["1"]), np.array([0]), np.array([0]))
    assert nothing.merge(early) == early
    assert early.merge(nothing) == early
    both = Unknown(1, 5, ["z"]).merge(early)
    assert (both.rows, both.first, both.values) == (8, 5, ["z", "x", "y", "a", "b"])
