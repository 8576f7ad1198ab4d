"""What is on offer, and how an answer is chosen from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lib.recommender.shelf import Filters, Item, Pick, Shelf
from lib.settings import OfferSettings

N = 12
RULES = OfferSettings(pool=10)


def made(count: int = N) -> Shelf:
    """Items on a circle, of two genres and rising prices."""
    angles = np.linspace(0, np.pi, count)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    items = [
        Item(f"i{i}", f"Film {i}", categories=(f"genre={'ab'[i % 2]}",), numbers=(float(i),))
        for i in range(count)
    ]
    return Shelf(items, vectors, np.zeros(count, np.float32))


def pick(
    shelf: Shelf, k: int, rules: OfferSettings = RULES, diversity: float = 0.0, **said: Any
) -> list[Pick]:
    scores = said.get("scores", np.arange(len(shelf), 0, -1).astype(np.float32))
    allowed = shelf.allowed(said.get("filters", Filters()), said.get("out", ()), len(scores))
    pool = shelf.pool(scores, allowed, max(rules.pool, k))
    return shelf.pick(pool, k, rules, diversity, np.random.default_rng(said.get("seed", 0)))


def rows(picks: list[Pick]) -> list[int]:
    return [one.row for one in picks]


def test_the_best_come_first_with_their_chances() -> None:
    found = pick(made(), 3)
    assert rows(found) == [0, 1, 2]
    chances = np.exp(np.arange(N, 0, -1) - N)
    assert [one.probability for one in found] == pytest.approx((chances / chances.sum())[:3])
    assert [one.propensity for one in found] == [1, 1, 1]


def test_no_more_than_there_are() -> None:
    shelf = made()
    assert rows(pick(shelf, 500)) == list(range(N))
    assert pick(shelf, 5, filters=Filters({"genre": ["none"]})) == []
    assert rows(pick(shelf, 5, out=range(1, N))) == [0]


def test_filters_are_of_one_value_of_each_column_and_inside_the_ranges() -> None:
    shelf = made()
    assert rows(pick(shelf, 20, filters=Filters({"genre": ["b"]}))) == [1, 3, 5, 7, 9, 11]
    assert rows(pick(shelf, 20, filters=Filters({"genre": ["a", "b"]}, {0: (3.0, 5.0)}))) == [3, 4, 5]
    assert rows(pick(shelf, 20, filters=Filters({}, {0: (10.0, np.inf)}), out=[11])) == [10]


def test_a_cap_holds_for_each_value_of_its_column() -> None:
    found = rows(pick(made(), 20, OfferSettings(pool=10, caps={"genre": 2})))
    assert found == [0, 1, 2, 3]


def test_diversity_leaves_what_is_like_the_items_before() -> None:
    shelf = made()
    shelf.put(
        [replace(shelf.items[1])], shelf.vectors[0:1].copy(), np.zeros(1, np.float32)
    )  # the same as the first
    scores = np.array([5.0, 4.99, 4.9, *np.linspace(4.8, 4, N - 3)], np.float32)
    assert rows(pick(shelf, 2, scores=scores)) == [0, 1]
    assert rows(pick(shelf, 2, scores=scores, diversity=0.5))[1] > 2
    # All diversity and no relevance: as far apart as can be.
    assert rows(pick(shelf, 2, scores=scores, diversity=1.0)) == [0, 9]


def test_places_that_explore_say_how_likely_they_were() -> None:
    shelf, rules = made(), OfferSettings(pool=10, explore=0.4)
    times = np.zeros(N)
    rounds = 4000
    told: dict[int, float] = {}
    for seed in range(rounds):
        (one,) = pick(shelf, 1, rules, seed=seed)
        times[one.row] += 1
        told[one.row] = one.propensity
    assert sum(told.values()) == pytest.approx(1)
    assert set(told) == set(range(10))
    for row, propensity in told.items():
        assert times[row] / rounds == pytest.approx(propensity, abs=0.03)


def test_items_come_and_change_while_others_ask() -> None:
    shelf = made()
    scores = shelf.scores(np.array([[1.0, 0.0]], np.float32))[0]
    new = Item("fresh", "Fresh", categories=("genre=c",), numbers=(99.0,))
    for number in range(50):
        item = replace(new, id=f"fresh-{number}")
        shelf.put([item], np.array([[2.0, 0.0]], np.float32), np.ones(1, np.float32))
    assert len(shelf) == N + 50
    assert shelf.row["fresh-49"] == N + 49
    # Who asked before sees what there was.
    allowed = shelf.allowed(Filters(), (), len(scores))
    assert rows(shelf.pick(shelf.pool(scores, allowed, 1), 1, RULES, 0, np.random.default_rng())) == [0]
    later = shelf.scores(np.array([[1.0, 0.0]], np.float32))[0]
    assert later[N:] == pytest.approx(np.full(50, 3.0))
    assert sorted(
        rows(pick(shelf, 99, OfferSettings(pool=99), scores=later, filters=Filters({"genre": ["c"]})))
    ) == list(range(N, N + 50))
    # Changed: another genre, and not on offer.
    for available in (True, False):
        changed = Item("i0", "Film 0 again", categories=("genre=c",), numbers=(5.0,), available=available)
        shelf.put([changed], shelf.vectors[0:1].copy(), np.zeros(1, np.float32))
        found = rows(
            pick(shelf, 99, OfferSettings(pool=99), filters=Filters({"genre": ["c"]}, {0: (5.0, 5.0)}))
        )
        assert found == ([0] if available else [])
    assert shelf.items[0].title == "Film 0 again"
    assert 0 not in rows(pick(shelf, 99, OfferSettings(pool=99), filters=Filters({"genre": ["a"]})))
    shelf.put(
        [shelf.items[2], replace(shelf.items[2], title="twice")],
        shelf.vectors[[2, 2]].copy(),
        np.zeros(2, np.float32),
    )
    assert shelf.items[2].title == "twice"
    assert len(shelf) == N + 50


def test_similar_items_are_those_with_the_nearest_vectors() -> None:
    shelf = made()
    found = shelf.similar(3, 3, shelf.allowed(Filters(), [4], N))
    assert [row for row, _ in found] == [2, 1, 5]
    assert found[0][1] == pytest.approx(np.cos(np.pi / (N - 1)), abs=1e-5)
    assert len(shelf.similar(3, 99, shelf.allowed(Filters(), (), N))) == N - 1


def test_reasons_are_the_likest_of_the_history_and_what_they_have_in_common() -> None:
    shelf = made()
    (because, words), other = shelf.reasons([4, 10], [11, 0, 2, 6])
    assert because == [6, 2]  # as like, and later
    assert words == ["a", "film"]
    assert other[0][0] == 11
    assert shelf.reasons([4], []) == [([], [])]
    assert shelf.reasons([], [2]) == []
    assert shelf.reasons([0], [N - 1]) == [([], [])]  # of the other end
