"""Where splits part: the same keys that sorting all rows would give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.data.splitting import cuts
from lib.data.splitting.split import FAR, assign, bounds, keys
from lib.settings import DataSettings


def data(**split: Any) -> DataSettings:
    return DataSettings.model_validate({"source": "a.csv", "labels": ["a", "b", "c"], "split": split})


def found(strata: np.ndarray, key: np.ndarray, settings: DataSettings, blocks: int = 7) -> tuple[Any, int]:
    """The cuts, and how often all rows were looked at."""
    looks = 0

    def count(looking: cuts.Looking) -> pa.Table:
        nonlocal looks
        looks += 1
        parts = [
            cuts.counted(*part, looking)
            for part in zip(np.array_split(strata, blocks), np.array_split(key, blocks), strict=True)
        ]
        return cuts.together(parts, most=100)

    return cuts.find(count, settings), looks


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 3, 10, 997])
def test_by_time_the_latest_go_to_test_as_sorting_would_say(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    times = rng.integers(-(10**9), 2 * 10**9, rows)
    settings = data(time="t", train=0.7, validation=0.2, test=0.1)
    at, looks = found(np.zeros(rows, np.int64), times, settings)
    assert looks <= 3
    order = np.append(np.sort(times), FAR)
    ranks = np.rint(rows * bounds(settings.shares)).astype(int)
    assert at.at.tolist() == [order[ranks].tolist()]
    places = at.places(np.zeros(rows, np.int64), times)
    assert np.bincount(places, minlength=3).tolist() == np.diff([0, *ranks, rows]).tolist()
    shuffled = rng.permutation(rows)
    again, _ = found(np.zeros(rows, np.int64), times[shuffled], settings, blocks=2)
    assert again.at.tolist() == at.at.tolist()


@pytest.mark.parametrize(
    ("times", "train", "expected"),
    [
        (
            [1, 2, 2, 2, 3, 4, 5, 6, 7, 8],
            0.2,
            1,
        ),  # 1 row before the 2s is nearer to 2 than 4 rows behind them
        ([1, 1, 2, 2, 2, 3, 4, 5, 6, 7], 0.4, 5),  # here it is 5, not 2
        ([5] * 10, 0.8, 10),
        ([5] * 10, 0.4, 0),
    ],
)
def test_rows_of_one_second_stay_on_the_nearer_side(times: list[int], train: float, expected: int) -> None:
    settings = data(time="t", train=train, validation=0, test=1 - train)
    at, _ = found(np.zeros(10, np.int64), np.array(times), settings)
    places = at.places(np.zeros(10, np.int64), np.array(times))
    assert (places == 0).sum() == expected
    assert not (places == 1).any()


@pytest.mark.parametrize("seed", range(5))
def test_each_label_has_its_share_of_each_split_to_a_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [1, 2, 5, 33, 1000, 4321]
    labels = rng.permutation(np.repeat([0, 1, 4, 9, 10, 2**31 - 1], sizes))
    hashes = rng.integers(-(2**63), 2**63, len(labels))
    settings = data(stratified=True, train=0.75, validation=0.15, test=0.1, seed=seed)
    at, looks = found(*keys(settings, hashes, labels, None), settings)
    assert looks <= 3
    places = assign(hashes, settings, at, labels)
    for label in np.unique(labels):
        mine = places[labels == label]
        for split, share in enumerate((0.75, 0.15, 0.1)):
            assert abs((mine == split).sum() - share * len(mine)) <= 1
    # In another order and other blocks, all rows go where they went.
    order = rng.permutation(len(labels))
    again, _ = found(*keys(settings, hashes[order], labels[order], None), settings, blocks=3)
    assert (assign(hashes[order], settings, again, labels[order]) == places[order]).all()
    # Which rows they are, chance says, and the seed.
    other = settings.model_copy(update={"split": settings.split.model_copy(update={"seed": 99})})
    at, _ = found(*keys(other, hashes, labels, None), other)
    assert 0.5 < (assign(hashes, other, at, labels) == places).mean() < 0.75


def test_equal_texts_of_a_label_are_never_parted() -> None:
    hashes = np.repeat(np.random.default_rng(1).integers(-(2**63), 2**63, 60), 5)
    labels = np.zeros(300, np.int32)
    settings = data(stratified=True)
    at, _ = found(*keys(settings, hashes, labels, None), settings)
    places = assign(hashes, settings, at, labels).reshape(60, 5)
    assert (places == places[:, :1]).all()
    assert np.bincount(places[:, 0]).tolist() == [48, 6, 6]


def test_without_rows_there_is_nothing_to_cut() -> None:
    none = np.zeros(0, np.int64)
    at, _ = found(none, none, data(time="t"))
    assert at.places(np.zeros(2, np.int64), np.array([1, 2])).tolist() == [0, 0]


def test_dates_say_where_splits_begin() -> None:
    whole = cuts.at_dates(data(time="t", validation_from="2024-01-01", test_from="2024-03-01T12:00:00+01:00"))
    assert whole.at.tolist() == [[1704067200, 1709290800]]
    assert cuts.at_dates(data(time="t", test_from="2024-01-01")).at.tolist() == [[1704067200, 1704067200]]
    assert cuts.at_dates(data(time="t", validation_from="2024-01-01")).at.tolist() == [[1704067200, FAR]]
