"""Points in time as sources write them."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter, ValidationError

from lib import times
from lib.times import Moment


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("881250949", 881250949),
        ("881250949.7", 881250949),
        ("1700000000123", 1700000000),
        ("0", 0),
        ("2026-03-01T09:00:00Z", 1772355600),
        (" 2026-03-01T10:00:00+01:00 ", 1772355600),
    ],
)
def test_a_time_is_seconds_since_1970(value: str, expected: int) -> None:
    assert times.seconds(value) == expected


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "is no time; write it as"),
        ("", "is no time"),
        ("soon", "'soon' is no time"),
        ("2026-03-01T09:00:00", "has no offset from UTC"),
        ("1960-01-01T00:00:00Z", "is before 1970"),
        ("-5", "is no number of seconds or milliseconds since 1970"),
        ("1e30", "is no number of seconds or milliseconds since 1970"),
        ("nan", "is no number of seconds or milliseconds since 1970"),
        ("inf", "is no number of seconds or milliseconds since 1970"),
    ],
)
def test_what_is_no_time_says_so(value: str | None, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        times.seconds(value)


def test_a_column_is_read_as_each_of_its_values_and_the_wrong_ones_are_told() -> None:
    for values in (
        ["881250949", "1700000000123", None, "-5"],
        ["881250949", "2026-03-01T09:00:00Z", "soon", "1e30"],
    ):
        found, wrong = times.column(pa.array(values, pa.string()))
        assert found.dtype == np.int64
        expected, said = {}, {}
        for row, value in enumerate(values):
            try:
                expected[row] = times.seconds(value)
            except ValueError as error:
                said[row] = str(error)
        assert wrong == said
        assert {row: int(found[row]) for row in expected} == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-03-01", 1709251200),
        ("2024-03-01 09:00:00", 1709283600),
        ("2024-03-01 09:00:00.999999999", 1709283600),
        ("2024-03-01 09:00:00Z", 1709283600),
        ("2024-03-01T10:00:00+01:00", 1709283600),
        ("1969-12-31T23:59:59.5", -1),
        ("2024", 2024),
    ],
)
def test_where_the_order_counts_a_time_needs_no_offset(value: str, expected: int) -> None:
    assert times.seconds(value, assume_utc=True) == expected
    assert times.column(pa.array([value]), assume_utc=True)[0].tolist() == [expected]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (1.5, 1),
        (1772355600, 1772355600),
        (1772355600123, 1772355600),
        ("2026-03-01T09:00:00Z", 1772355600),
    ],
)
def test_a_request_tells_a_time_as_text_or_number(value: float | str, expected: int) -> None:
    found = TypeAdapter(Moment).validate_python(value)
    assert int(found.timestamp()) == expected


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("0.0", "'0.0' is no time; write it as 2026-03-01T09:00:00Z"),
        ("1772355600", "write it as"),
        (True, "True is no time"),
        (-1, "-1 is no number of seconds or milliseconds since 1970"),
        (float("nan"), "is no number of seconds"),
        (1e300, "is no number of seconds"),
        ("2026-03-01T09:00:00", "should have timezone info"),
        ([], "valid datetime"),
    ],
)
def test_what_is_no_time_of_a_request_says_so(value: object, says: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(says)):
        TypeAdapter(Moment).validate_python(value)
