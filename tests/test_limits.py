"""Rates: what is let through, how long the rest waits, and that it holds over any sequence of requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import limits
from lib.limits import WINDOW_S, Buckets, Charge


def test_a_minutes_worth_at_once_then_one_at_a_time() -> None:
    buckets, one = Buckets(), [Charge("k", 1, 6)]
    assert [buckets.take(one, 100.0).allowed for _ in range(7)] == [True] * 6 + [False]
    refused = buckets.take(one, 100.0)
    assert refused.wait_s == pytest.approx(10)
    assert refused.stopped_by == "k"
    assert refused.remaining == (0,)
    assert not buckets.take(one, 109.9).allowed
    assert buckets.take(one, 110.0).allowed
    assert buckets.take(one, 1000.0).remaining == (5,)


def test_all_charges_or_none() -> None:
    buckets = Buckets()
    assert buckets.take([Charge("r", 1, 10), Charge("t", 60, 60)], 0.0).allowed
    refused = buckets.take([Charge("r", 1, 10), Charge("t", 30, 60)], 0.0)
    assert (refused.allowed, refused.stopped_by) == (False, "t")
    assert refused.wait_s == pytest.approx(30)
    assert buckets.take([Charge("r", 1, 10)], 0.0).remaining == (8,), "the refused one took nothing"


def test_a_debt_is_waited_for() -> None:
    buckets, known_later = Buckets(), [Charge("t", 0, 60)]
    assert buckets.take(known_later, 0.0).allowed
    buckets.charge([Charge("t", 90, 60)], 0.0)
    refused = buckets.take(known_later, 0.0)
    assert refused.wait_s == pytest.approx(31), "30 units of debt, and one to go on with"
    assert buckets.take(known_later, 31.0).allowed


def test_more_than_a_minutes_worth_waits_until_the_limit_is_whole() -> None:
    buckets = Buckets()
    assert buckets.take([Charge("t", 500, 60)], 0.0).allowed
    assert buckets.take([Charge("t", 500, 60)], 1.0).wait_s == pytest.approx(499)


def test_names_that_are_whole_again_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SWEEP_AT", 10)
    buckets = Buckets()
    for i in range(11):
        buckets.take([Charge(str(i), 1, 60)], float(i))
    assert 1 <= len(buckets._whole_at) <= 2


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 8)), min_size=1, max_size=60),
    st.integers(1, 50),
)
def test_no_window_lets_more_through_than_two_minutes_worth(
    asked: list[tuple[float, int]], per_minute: int
) -> None:
    buckets, now, taken = Buckets(), 0.0, []
    for gap, cost in asked:
        now += gap
        verdict = buckets.take([Charge("k", cost, per_minute)], now)
        if verdict.allowed:
            taken.append((now, cost))
        else:
            # It is let through exactly after the wait.
            again = Buckets()
            again._whole_at = dict(buckets._whole_at)
            assert again.take([Charge("k", cost, per_minute)], now + verdict.wait_s + 1e-6).allowed
    for start, _ in taken:
        inside = sum(cost for at, cost in taken if start <= at < start + WINDOW_S)
        # What had been saved, what came back meanwhile, and one that was above the limit by itself.
        assert inside <= 2 * per_minute + 8
