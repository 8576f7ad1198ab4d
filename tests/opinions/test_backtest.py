"""Planted surges lie where they are said to lie, and outcomes are counted as defined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lib.errors import ConfigError
from lib.opinions import backtest
from lib.opinions.backtest import Planted, above, judge, plant, replay
from lib.settings import PlantSettings
from tests.opinions.test_watch import BEGIN, HOUR, RULES, history, hours

SERIES = ("acme", "cars")


def test_a_planted_surge_raises_the_share_where_it_is_and_nowhere_else() -> None:
    documents = history(20, each=20)
    turned, planted = plant(documents, RULES, PlantSettings(surges=3, size=0.4, hours=6, seed=1))
    assert len(planted) == 3
    inside = [o for o in turned if any(p.begins <= o.time < p.ends for p in planted)]
    share = np.mean([o.label == "negative" for o in inside])
    assert share == pytest.approx(0.6, abs=0.08), "0.2, and 0.4 more"
    for before, after in zip(documents, turned, strict=True):
        if after not in inside:
            assert before == after
    assert all(p.begins >= BEGIN + 24 * HOUR and p.ends <= BEGIN + 480 * HOUR for p in planted)
    starts = sorted(p.begins for p in planted)
    assert min(np.diff(starts)) >= 20 * HOUR, "its length, the window and the cool-down"
    assert plant(documents, RULES, PlantSettings(surges=3, size=0.4, hours=6, seed=1)) == (turned, planted)
    assert plant(documents, RULES, PlantSettings(surges=3, size=0.4, hours=6, seed=2))[1] != planted


def test_too_many_surges_and_too_large_ones_are_told() -> None:
    with pytest.raises(
        ConfigError, match=r"plant.surges: this history has room for \d, not 50, in series of 10"
    ):
        plant(history(6), RULES, PlantSettings(surges=50))
    with pytest.raises(ConfigError, match="has room for 0, not 1"):
        plant(history(6, each=2), RULES, PlantSettings(surges=1))
    with pytest.raises(ConfigError, match=r"size 0\.9: of acme / cars 20% are negative already"):
        plant(history(6), RULES, PlantSettings(surges=1, size=0.9))


def test_outcomes_are_counted_by_hand() -> None:
    planted = [Planted(*SERIES, 100 * HOUR, 106 * HOUR), Planted(*SERIES, 200 * HOUR, 206 * HOUR)]
    ends = {
        SERIES: [90 * HOUR, 100 * HOUR, 103 * HOUR, 107 * HOUR, 208 * HOUR],
        ("acme", "jobs"): [104 * HOUR],
    }
    outcome = judge(ends, planted, RULES, 2.0)
    # Of the first 103 and 107 (the window of 2 hours overlaps it); 208 begins after the second; 100 ends before the first.
    assert outcome.delays == (3.0,)
    assert (outcome.planted, outcome.found, outcome.false_alarms, outcome.false_per_week) == (2, 0.5, 4, 2.0)
    assert math.isnan(judge({}, planted, RULES, 1.0).delay)


def test_the_fixed_threshold_keeps_volume_history_and_cooldown() -> None:
    documents, negative = np.full(72, 10), np.full(72, 2)
    negative[[10, 40, 41, 50, 60]] = 9
    # Windows of two: 11 of 20; before 24 hours of history nothing, within 12 hours nothing again.
    assert above(0.5, RULES)(documents, negative) == [40, 60]
    assert above(0.6, RULES)(documents, negative) == [41]
    assert above(0.5, RULES)(documents // 3, negative // 3) == []


def test_a_replay_finds_what_was_planted_as_serving_would() -> None:
    documents = history(20, each=20)
    turned, planted = plant(documents, RULES, PlantSettings(surges=3, size=0.6, hours=6))
    run = replay(turned, RULES)
    outcome = judge(run.found(), planted, run.rules, run.weeks)
    assert (outcome.found, outcome.false_alarms) == (1.0, 0)
    assert outcome.delay <= 3
    assert run.weeks == pytest.approx(19 / 7)
    threshold, fixed = backtest.calibrated(run, planted, 0)
    assert 0.2 < threshold < 1
    assert fixed.false_alarms == 0
    # The two rules together see no less than the first of them, and what `scan` sees alone is what was stored.
    alone = judge(run.by(backtest.only("z", RULES)), planted, run.rules, run.weeks)
    assert alone.found <= outcome.found
    assert replay(documents, RULES).alerts == []
    assert hours(run.alerts) == sorted(hours(run.alerts))
