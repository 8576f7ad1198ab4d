"""What counts as an interaction, and that nothing which is to be foreseen was seen before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.recommending.interactions import Interactions, Sequences, core, divide, in_order
from lib.settings import DataSettings


def made(rows: list[tuple[int, int, int]]) -> Interactions:
    """Of (user, item, time)."""
    user, item, time = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    return Interactions(
        np.asarray(user, np.int32),
        np.asarray(item, np.int32),
        np.asarray(time, np.int64),
        np.ones(len(rows), np.float32),
        np.zeros(len(rows), np.int16),
    )


def data(**rules: Any) -> DataSettings:
    split = rules.pop("shares", {"train": 0.8, "validation": 0.1, "test": 0.1})
    return DataSettings(source="x", split=split, interactions=rules)


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


def items_of(interactions: Interactions, sequences: Sequences) -> list[tuple[list[int], int]]:
    return [
        (interactions.item[row].tolist(), int(count))
        for row, count in zip(sequences.rows, sequences.targets, strict=True)
    ]


def test_the_same_second_keeps_the_order_of_the_source() -> None:
    found = in_order(made([(1, 5, 9), (0, 1, 7), (1, 6, 3), (0, 2, 7), (0, 3, 7)]))
    assert found.user.tolist() == [0, 0, 0, 1, 1]
    assert found.item.tolist() == [1, 2, 3, 6, 5]


def test_a_core_is_taken_until_nobody_has_too_few() -> None:
    # Without user 2, item 7 has one user left; without item 7, user 1 has one item.
    user = np.array([0, 0, 1, 1, 2])
    item = np.array([5, 6, 5, 7, 7])
    assert core(user, item, 2, 1).tolist() == [True, True, True, True, False]
    assert core(user, item, 2, 2).tolist() == [False] * 5
    assert core(user, item, 1, 0).all()
    assert core(user[:0], item[:0], 2, 2).tolist() == []


def test_the_last_is_for_test_and_the_one_before_it_for_validation() -> None:
    interactions = made([(0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 4, 4), (1, 1, 1), (1, 2, 2)])
    found = divide(interactions, data(), hashes(2), hashes(5, 1))
    # Of two interactions none can be spared: there would be no history.
    assert items_of(interactions, found["train"]) == [([1, 2], 1), ([1, 2], 1)]
    assert items_of(interactions, found["validation"]) == [([1, 2, 3], 1)]
    assert items_of(interactions, found["test"]) == [([1, 2, 3, 4], 1)]


def test_by_time_what_comes_after_a_moment_is_to_be_foreseen() -> None:
    rows = [(user, time % 3, time) for time in range(10) for user in (0, 1)]
    interactions = in_order(made([*rows, (2, 1, 9)]))
    rules = data(split="time", shares={"train": 0.5, "validation": 0.3, "test": 0.2})
    found = divide(interactions, rules, hashes(3), hashes(3, 1))
    for split, last, count in (("train", 4, 4), ("validation", 7, 3), ("test", 9, 2)):
        times = [interactions.time[row].tolist() for row in found[split].rows[:2]]
        assert times == [list(range(last + 1))] * 2, split
        assert found[split].targets[:2].tolist() == [count] * 2
    # Who comes only then has no history.
    assert items_of(interactions, found["test"])[2:] == [([1], 1)]
    assert len(found["train"].rows) == len(found["validation"].rows) == 2


def test_new_items_are_in_no_history() -> None:
    interactions = in_order(
        made([(user, item, item * 7 % 50) for user in range(20) for item in range(50) if (user + item) % 3])
    )
    found = divide(interactions, data(new_items=0.2), hashes(20), hashes(50, 1))
    fresh = [
        s
        for s, is_fresh in zip(items_of(interactions, found["test"]), found["test"].fresh, strict=True)
        if is_fresh
    ]
    held_out = {items[-1] for items, _ in fresh}
    assert 4 <= len(held_out) <= 18
    assert len(fresh) == sum(int((interactions.item == item).sum()) for item in held_out)
    for split in found:
        for (items, count), is_fresh in zip(
            items_of(interactions, found[split]), found[split].fresh, strict=True
        ):
            assert not held_out & set(items[:-1] if is_fresh else items)
            assert count == 1 or split == "train"
    assert not found["train"].fresh.any()


def test_of_new_users_training_sees_nothing() -> None:
    interactions = made([(user, item, item) for user in range(200) for item in range(5)])
    found = divide(interactions, data(new_users=0.25), hashes(200), hashes(5, 1))
    trained = {int(interactions.user[row[0]]) for row in found["train"].rows}
    assert 130 < len(trained) < 170
    assert len(found["test"].rows) == len(found["validation"].rows) == 200


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 6)), max_size=60),
    st.sampled_from(["last", "time"]),
    st.floats(0, 0.5),
)
def test_what_is_foreseen_comes_after_everything_that_is_known(
    rows: list[tuple[int, int, int]], split: str, new_items: float
) -> None:
    numbers = {user: number for number, user in enumerate(sorted({user for user, _, _ in rows}))}
    interactions = in_order(made([(numbers[user], item, time) for user, item, time in rows]))
    found = divide(interactions, data(split=split, new_items=new_items), hashes(len(numbers)), hashes(9, 1))
    foreseen: dict[str, set[int]] = {}
    for name, sequences in found.items():
        foreseen[name] = set()
        for row, count, fresh in zip(sequences.rows, sequences.targets, sequences.fresh, strict=True):
            assert len(set(interactions.user[row].tolist())) == 1
            assert (np.diff(row) > 0).all()
            assert (np.diff(interactions.time[row]) >= 0).all()
            targets = set(row[len(row) - count :].tolist())
            assert fresh or not targets & foreseen[name]
            foreseen[name] |= targets
    assert not foreseen["test"] & foreseen["validation"]
    assert not (foreseen["test"] | foreseen["validation"]) & {
        int(index) for row in found["train"].rows for index in row
    }


def test_a_last_run_learns_what_validation_asked_and_test_alone_is_held_out() -> None:
    interactions = made([(0, item, item) for item in range(1, 6)])
    usual = divide(interactions, data(), hashes(1), hashes(9, 1))
    last = divide(interactions, data(refit=True), hashes(1), hashes(9, 1))
    assert items_of(interactions, usual["train"]) == [([1, 2, 3], 2)]
    assert items_of(interactions, last["train"]) == [([1, 2, 3, 4], 3)]
    for split in ("validation", "test"):
        assert items_of(interactions, last[split]) == items_of(interactions, usual[split])


def test_too_many_new_users_are_refused() -> None:
    with pytest.raises(ValueError, match=r"new_users must be at most 0\.5"):
        data(new_users=0.9)
