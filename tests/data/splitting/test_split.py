"""Where rows go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lib.data.splitting.split import FAR, Cuts, assign, check, kept
from lib.errors import ConfigError
from lib.settings import DataSettings
from lib.tasks import load_task


def data(**values: Any) -> DataSettings:
    given = {name: values.pop(name) for name in list(values) if name.endswith("_source")}
    return DataSettings.model_validate({"source": "a.csv", "labels": ["a", "b"], "split": values, **given})


HASHES = np.random.default_rng(0).integers(-(2**63), 2**63, 100_000)


def test_shares_are_met() -> None:
    counts = np.bincount(assign(HASHES, data(train=0.7, validation=0.2, test=0.1)), minlength=3)
    # Three standard deviations of a binomial share.
    assert counts / len(HASHES) == pytest.approx([0.7, 0.2, 0.1], abs=3 * np.sqrt(0.25 / len(HASHES)))


def test_place_depends_on_hash_and_seed_alone() -> None:
    whole = assign(HASHES, data())
    order = np.random.default_rng(1).permutation(len(HASHES))
    assert (assign(HASHES[order], data()) == whole[order]).all()
    assert (assign(HASHES[:10], data()) == whole[:10]).all()
    other = assign(HASHES, data(seed=1))
    # Two independent draws of 80/10/10 agree on 0.66 of the rows.
    assert np.mean(other == whole) == pytest.approx(0.66, abs=0.01)


def test_neighbouring_hashes_scatter() -> None:
    counts = np.bincount(assign(np.arange(100_000), data()), minlength=3)
    assert counts / 100_000 == pytest.approx([0.8, 0.1, 0.1], abs=0.006)


@pytest.mark.parametrize(
    ("shares", "empty"),
    [((0.9, 0.1, 0.0), [2]), ((0.9, 0.0, 0.1), [1]), ((1.0, 0.0, 0.0), [1, 2]), ((0.7, 0.3, 0.0), [2])],
)
def test_a_share_of_zero_gets_no_row(shares: tuple[float, float, float], empty: list[int]) -> None:
    split = data(train=shares[0], validation=shares[1], test=shares[2])
    counts = np.bincount(assign(HASHES, split), minlength=3)
    assert [i for i in range(3) if counts[i] == 0] == empty


def test_undersampling_keeps_the_shares_and_is_independent_of_the_split() -> None:
    other = np.random.default_rng(2).integers(-(2**63), 2**63, 100_000)
    shares = np.where(np.arange(100_000) % 2, 0.3, 1.0)
    stay = kept(other, shares, seed=0)
    assert stay[::2].all()
    assert stay[1::2].mean() == pytest.approx(0.3, abs=3 * np.sqrt(0.25 / 50_000))
    splits = assign(HASHES, data())
    assert stay[1::2][splits[1::2] == 0].mean() == pytest.approx(0.3, abs=0.01)
    assert (kept(other[:100], shares[:100], seed=0) == stay[:100]).all()


def test_a_split_with_its_own_source_leaves_its_share_to_the_others() -> None:
    given = data(train=0.6, validation=0.2, test=0.2, test_source="t.csv")
    assert given.shares == pytest.approx({"train": 0.75, "validation": 0.25, "test": 0.0})
    counts = np.bincount(assign(HASHES, given), minlength=3)
    assert counts / len(HASHES) == pytest.approx([0.75, 0.25, 0], abs=0.005)
    both = data(validation_source="v.csv", test_source="t.csv")
    assert not assign(HASHES, both).any()


def test_cuts_say_where_rows_go() -> None:
    cuts = Cuts(np.array([3, 7]), np.array([[10, 20], [5, FAR]]))
    strata = np.array([3, 3, 3, 3, 7, 7, 9, 1])
    found = cuts.places(strata, np.array([9, 10, 19, 20, 4, 1 << 60, 99, 99]))
    # Of a label that was never counted, rows train.
    assert found.tolist() == [0, 1, 1, 2, 0, 1, 0, 0]
    assert not Cuts(np.zeros(0, np.int64), np.zeros((0, 2), np.int64)).places(strata, strata).any()


def test_what_rows_have_no_label_of_is_not_split_by_it() -> None:
    check(data(stratified=True), load_task("sentiment"), "sentiment")
    for name, labels in (("tagging", ["PER"]), ("chat", None), ("preference", None)):
        given = DataSettings.model_validate({"source": "a", "labels": labels, "split": {"stratified": True}})
        with pytest.raises(ConfigError, match=f"data.split.stratified: a row of {name} has no label"):
            check(given, load_task(name), name)
        check(data(group="user"), load_task(name), name)
    items = {"source": "items.csv", "id": "item"}
    held = DataSettings.model_validate({"source": "a", "items": items, "split": {"time": "when"}})
    with pytest.raises(ConfigError, match=r"data.split.time: recommend holds out .*; leave it out"):
        check(held, load_task("recommend"), "recommend")
