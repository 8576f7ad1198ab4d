"""What training tells of items: when they were taken, and the features of candidates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.recommender import signals
from lib.recommender.rivals import Transitions
from lib.recommender.signals import DAY, LATELY, OF_ITEMS, Signals, Timeline, Told

SEQUENCES = [np.array([0, 1, 2]), np.array([0, 1, 3]), np.array([2, 1])]
TIMES = [np.array([0, 10, 20]) * DAY, np.array([1, 12, 60]) * DAY, np.array([59, 60]) * DAY]
TEXTS = np.eye(5, 4)
# Items 0 and 2 are of category 0, 1 of both, 3 of 1; 4, which nobody took, of none.
CODES, STARTS = np.array([0, 0, 1, 0, 1]), np.array([0, 1, 3, 4, 5])
NUMBERS = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])


def made() -> tuple[Signals, Timeline]:
    return Signals.of(SEQUENCES, TIMES, 5, (CODES, STARTS, 2), NUMBERS, TEXTS)


def test_times() -> None:
    timeline = Timeline(np.concatenate(SEQUENCES), np.concatenate(TIMES))
    items = np.arange(5)
    assert timeline.before(items, 12 * DAY).tolist() == [2, 1, 0, 0, 0]
    assert timeline.before(items, 61 * DAY).tolist() == [2, 3, 2, 1, 0]
    assert timeline.before(items, -5).tolist() == [0] * 5
    assert (timeline.first(items) // DAY).tolist() == [0, 10, 20, 60, 60]
    found, _ = made()
    assert found.lately.tolist() == [0, 1, 1, 1, 0]  # in the last 30 days of 60
    assert LATELY == 30 * DAY


def test_features_by_hand() -> None:
    found, timeline = made()
    candidates, scores = np.array([2, 3, 4]), np.array([1.0, 2.0, 4.0])
    history = np.array([0, 1])
    rows = found.features(history, 100 * DAY, candidates, scores, np.array([0.5]))
    names = signals.names(["year"], ["age"])
    assert rows.shape == (3, len(names))
    column = dict(zip(names, rows.T, strict=True))
    for name in (*OF_ITEMS, "item.year"):
        assert column[name].mean() == pytest.approx(0, abs=1e-5), name
    follows = Transitions.fit(SEQUENCES, 5).scores([history])[0][candidates]
    for name, raw in {
        "score": scores,
        "transitions": np.log(follows + 1e-4),
        "popularity": np.log1p([2, 1, 0]),
        "lately": np.log1p([1, 1, 0]),
        "age": np.log1p([40, 0, 0]),
        "item.year": [2, 3, 4],
    }.items():
        raw = np.asarray(raw, float)
        assert column[name] == pytest.approx((raw - raw.mean()) / raw.std(), rel=1e-3, abs=1e-3), name
    assert column["user.age"].tolist() == [0.5] * 3
    # Who turned to category 0 more than others do, and half as much to 1.
    assert column["affinity"][0] > column["affinity"][1]
    # At an earlier time nothing is known that came later.
    then = found.features(history, 12 * DAY, candidates, scores, np.array([0.5]), timeline)
    assert dict(zip(names, then.T, strict=True))["lately"].tolist() == [0] * 3


def test_what_came_later_is_known_by_its_text_categories_and_numbers() -> None:
    found, _ = made()
    found.told[5] = Told(TEXTS[1], np.array([0, 1]), NUMBERS[1])
    rows = found.features(np.array([1]), 0, np.array([1, 5, 3]), np.zeros(3), np.zeros(0))
    column = dict(zip(signals.names(["year"], []), rows.T, strict=True))
    for name in ("text", "affinity", "item.year"):
        assert column[name][0] == pytest.approx(column[name][1]), name
    assert column["popularity"][1] < column["popularity"][0]


def test_a_folder_and_another_catalogue_keep_them(tmp_path: Path) -> None:
    found, _ = made()
    found.write(tmp_path)
    again = Signals.read(tmp_path)
    asked = (np.array([0, 1]), 5 * DAY, np.array([2, 3, 4]), np.arange(3.0), np.zeros(0))
    np.testing.assert_array_equal(again.features(*asked), found.features(*asked))
    # Reversed, with an item that is not known first: of that nothing is.
    other = again.over(np.array([-1, 4, 3, 2, 1, 0]), {})
    turned = other.features(np.array([5, 4]), 5 * DAY, np.array([3, 2, 1]), np.arange(3.0), np.zeros(0))
    np.testing.assert_allclose(turned, found.features(*asked), atol=1e-5)
    alone = other.features(np.array([5]), 0, np.array([0]), np.zeros(1), np.zeros(0))
    assert np.abs(alone[:, : len(OF_ITEMS)]).max() == 0
