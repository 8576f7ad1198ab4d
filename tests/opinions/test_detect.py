"""The detectors on series whose figures were computed by hand, and on series that were drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.opinions import detect
from lib.opinions.detect import Series, baseline, cusum, robust, run_in, scan, sliding, standard_error
from lib.settings import MonitoringSettings

DAILY = MonitoringSettings(
    window_hours=2, season_hours=24, seasons=7, min_history_hours=24, min_documents=10, cooldown_hours=12
)


def test_windows_slide() -> None:
    assert sliding(np.array([1, 2, 3, 4]), 2).tolist() == [1, 3, 5, 7]
    assert sliding(np.array([1, 2]), 5).tolist() == [1, 3]


def test_median_and_mad_by_hand() -> None:
    # Iglewicz and Hoaglin's own example, of which 10 is far out: deviations 1.1, 0.9, …, median 0.9 of 8 values.
    values = np.array([2.1, 2.6, 2.4, 2.5, 2.3, 2.1, 2.3, 2.6, 8.2, 8.3])
    middle, spread = robust(values)
    assert middle == pytest.approx(2.45)
    # |x - 2.45|: 0.35 0.15 0.05 0.05 0.15 0.35 0.15 0.15 5.75 5.85, sorted middle pair 0.15 0.15.
    assert spread == pytest.approx(1.4826 * 0.15)
    # Their modified z-score 0.6745 (x - median) / MAD of 8.2 is 25.86.
    assert (8.2 - middle) / spread == pytest.approx(0.6745 * 5.75 / 0.15, rel=1e-4)
    assert all(math.isnan(value) for value in robust(np.empty(0)))


# Montgomery's example 9.1: 30 samples, the first 20 of N(10, 1), then N(11, 1); K = 0.5, H = 5; C+ as he prints it.
MONTGOMERY = [
    9.45, 7.99, 9.29, 11.66, 12.16, 10.18, 8.04, 11.46, 9.20, 10.34, 9.03, 11.47, 10.51, 9.40, 10.08, 9.37, 10.62,
    10.31, 8.52, 10.84, 10.90, 9.33, 12.29, 11.50, 10.60, 11.08, 10.38, 11.62, 11.31, 10.52,
]  # fmt: skip
UPPER = [
    0, 0, 0, 1.16, 2.82, 2.50, 0.04, 1.00, 0, 0, 0, 0.97, 0.98, 0, 0, 0, 0.12, 0, 0, 0.34, 0.74, 0, 1.79, 2.79, 2.89,
    3.47, 3.35, 4.47, 5.28, 5.30,
]  # fmt: skip


def test_cusum_is_the_textbooks() -> None:
    sums, above = cusum(np.array(MONTGOMERY) - 10, 0.5, 100)
    np.testing.assert_allclose(sums, UPPER, atol=1e-9)
    assert above == []
    sums, above = cusum(np.array(MONTGOMERY) - 10, 0.5, 5)
    assert above == [28], "he finds it at period 29"
    assert sums[29] == pytest.approx(0.02), "and it begins anew: 10.52 - 10 - 0.5"


def test_standard_error_by_hand() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    # Nothing negative was ever seen: p = 0.5 / 11.
    assert standard_error(0.0, 10) == pytest.approx(math.sqrt(0.5 / 11 * 10.5 / 11 / 10))


def steady(days: int, documents: int = 20, negative: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return np.full(24 * days, documents), np.full(24 * days, negative)


def test_the_baseline_is_that_of_the_same_time_shrunk_towards_all_times() -> None:
    documents, negative = steady(4)
    negative[9:96:24] = 14  # each day from 9 to 10 most are negative
    series = Series.of(documents, negative, DAILY)
    # Window 81 is day 3, 8 to 10: (4 + 14) / 40 = 0.45, as on the three days before; all windows: median 0.2.
    usual, spread = baseline(series, 81, DAILY)
    assert usual == pytest.approx((3 * 0.45 + 4 * 0.2) / 7)
    assert spread == 0
    # With no shrinkage it is the season's alone, with no earlier season that of all times.
    assert baseline(series, 81, DAILY.model_copy(update={"shrinkage": 0}))[0] == pytest.approx(0.45)
    assert baseline(series, 20, DAILY)[0] == pytest.approx(0.2)
    assert math.isnan(baseline(series, 0, DAILY)[0])


def test_thin_windows_have_a_baseline_too() -> None:
    documents, negative = np.tile([2, 0, 1], 16), np.tile([1, 0, 0], 16)
    usual, spread = baseline(Series.of(documents, negative, DAILY), 40, DAILY)
    assert (usual, spread) == (pytest.approx(1 / 3), 0.0)


def test_a_surge_is_found_by_the_window_with_its_figures() -> None:
    documents, negative = steady(4)
    negative[80] = 16
    (found,) = scan(documents, negative, DAILY)
    # 20 of 40 where 0.2 is usual; p = (8 + 0.5) / 41.
    error = math.sqrt(8.5 / 41 * 32.5 / 41 / 40)
    assert (found.bucket, found.documents, found.negative, found.share) == (80, 40, 20, 0.5)
    assert (found.usual, found.spread) == (pytest.approx(0.2), pytest.approx(error))
    assert found.z == pytest.approx(0.3 / error)
    assert found.rules == ("z",)
    assert found.cusum == pytest.approx((16 - 4) / (error * math.sqrt(40 * 20)) - 0.5)


def test_a_small_rise_that_lasts_is_found_by_cusum() -> None:
    documents, negative = steady(6)
    negative[100:] = 7
    rules = DAILY.model_copy(update={"z": 50.0})
    found = scan(documents, negative, rules)
    assert found[0].rules == ("cusum",)
    # u = 3 / sqrt(20 p (1 - p)) = 1.65 a bucket (of a full window), less 0.5: above 8 with the 7th or 8th bucket.
    assert 106 <= found[0].bucket <= 108
    assert all(b.bucket - a.bucket >= 12 for a, b in itertools.pairwise(found)), "cool-down"


def test_what_is_usual_at_its_time_is_no_surge() -> None:
    documents, negative = steady(10)
    negative[9::24] = 18
    found = [surge.bucket for surge in scan(documents, negative, DAILY)]
    # 22 of 40 negative; usual were, with one earlier day, (0.55 + 4 · 0.2) / 5, with two (2 · 0.55 + 4 · 0.2) / 6.
    assert found == [33], "it was learned in two days"


def test_few_documents_are_no_surge_and_nothing_is_before_there_is_a_history() -> None:
    documents, negative = steady(4)
    documents[80:82], negative[80:82] = 4, 4
    documents[79], negative[79] = 0, 0
    assert scan(documents, negative, DAILY) == []
    documents, negative = steady(1)
    negative[20:] = 20
    assert scan(documents, negative, DAILY) == []


def drawn(seed: int, days: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    documents = random.poisson(8 + 6 * np.sin(np.arange(24 * days) / 24 * 2 * np.pi))
    shares = np.full(24 * days, 0.2)
    for _ in range(3):
        begin = int(random.integers(24, 24 * days))
        shares[begin : begin + 10] = 0.6
    return documents, random.binomial(documents, shares)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(30, 280), max_size=5))
def test_looked_at_in_parts_it_is_the_same(seed: int, cuts: set[int]) -> None:
    """Serving looks each hour, at the end of the history; the back-test looks once, at all of it."""
    documents, negative = drawn(seed)
    whole = [surge.bucket for surge in scan(documents, negative, DAILY)]
    found: list[int] = []
    edges = [0, *sorted(cuts), len(documents)]
    for start, end in itertools.pairwise(edges):
        base = max(0, start - run_in(DAILY))
        known = [bucket - base for bucket in found]
        part = scan(documents[base:end], negative[base:end], DAILY, start - base, known)
        found += [surge.bucket + base for surge in part]
    assert found == whole


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), known=st.sets(st.integers(0, 280), max_size=3))
def test_alerts_keep_the_cooldown_also_from_those_that_were_raised(seed: int, known: set[int]) -> None:
    found = [surge.bucket for surge in scan(*drawn(seed), DAILY, 0, known)]
    assert all(abs(one - other) >= 12 for one in found for other in known)
    assert all(later - earlier >= 12 for earlier, later in itertools.pairwise(found))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_every_surge_is_above_what_is_usual_by_what_was_asked_for(seed: int) -> None:
    for surge in scan(*drawn(seed), DAILY):
        assert surge.documents >= DAILY.min_documents
        assert surge.share - surge.usual >= DAILY.min_rise
        assert surge.z >= DAILY.z or surge.cusum > DAILY.cusum_limit


def test_chance_alone_raises_few_alerts() -> None:
    random = np.random.default_rng(7)
    rules = MonitoringSettings(min_documents=20)
    alerts, weeks = 0, 12
    for _ in range(4):
        documents = random.poisson(10, 24 * 7 * weeks)
        alerts += len(scan(documents, random.binomial(documents, 0.2), rules))
    assert alerts / (4 * weeks) < 0.5, "a week and series"
    assert detect.cusum_memory(rules) == 168
