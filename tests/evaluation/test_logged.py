"""The estimate from logs is what the model earns when it answers itself, as far as the logs tell."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from lib import events
from lib.evaluation import logged
from lib.evaluation.logged import Shown, estimate, read
from lib.events import Feedback
from lib.recommender import store
from lib.recommender.store import Interaction
from lib.tasks.recommend import ROUTE

ITEMS = [f"i{n}" for n in range(8)]
# How likely each is to be taken where it is shown.
CHANCES = dict(zip(ITEMS, [0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02], strict=True))


def answers(count: int, order: list[str], explore: float, places: int = 3, seed: int = 0) -> list[Shown]:
    """Of an application that shows the first of `order`, but for the share of places that explores."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        left, items, propensities, taken = list(order), [], [], set()
        for _ in range(places):
            chosen = left[random.integers(len(left))] if random.random() < explore else left[0]
            propensities.append(explore / len(left) + (1 - explore) * (chosen == left[0]))
            items.append(chosen)
            left.remove(chosen)
            if random.random() < CHANCES[chosen]:
                taken.add(chosen)
        found.append(Shown([("i0", 0)], items, propensities, frozenset(taken)))
    return found


def test_the_estimate_is_what_the_model_earns_by_itself() -> None:
    worst, best = ITEMS[::-1], ITEMS
    shown = answers(6_000, worst, explore=0.5)
    found = estimate(shown, [best] * len(shown))
    # Each place alone: the best that the logged list had not shown before, which mostly is the very best.
    wanted = []
    for one in shown:
        for place in range(3):
            wanted.append(CHANCES[next(i for i in best if i not in one.items[:place])])
    assert found["low"] < np.mean(wanted) < found["high"]
    assert found["estimated"] == pytest.approx(np.mean(wanted), abs=0.03)
    assert found["logged"] < 0.2 < found["estimated"]
    assert 0 < found["effective"] <= found["matched"] < found["places"] == 18_000


def test_the_same_model_earns_what_was_logged() -> None:
    shown = answers(3_000, ITEMS, explore=0.0)
    found = estimate(shown, [ITEMS] * len(shown))
    assert found["estimated"] == pytest.approx(found["logged"])
    assert found["matched"] == found["places"] == found["effective"]


def test_without_a_match_nothing_is_known() -> None:
    shown = answers(5, ITEMS, explore=0.0)
    found = estimate(shown, [["other"]] * 5)
    assert (found["matched"], found["estimated"], found["high"]) == (0, 0, 0)


def event(number: int, asked: dict[str, Any], route: str = ROUTE) -> dict[str, Any]:
    answer = {"results": [{"item": "i1", "propensity": 0.9}, {"item": "i2", "propensity": 0.1}]}
    return {
        "id": f"r{number}", "application": "films", "model": "films@1", "time": time.time(), "route": route,
        "status": 200, "milliseconds": 1.0, "tokens": 0, "key": None,
        "request": json.dumps(asked), "answer": json.dumps(answer),
    }  # fmt: skip


def test_logs_are_read_with_what_was_known_then(either_database: str) -> None:
    store.add("films", [Interaction("ada", "i3", "", 100), Interaction("ada", "i4", "", 2**40)])
    asked = [
        {"user_id": "ada"},
        {"history": ["i5", {"item": "i6", "time": "1970-01-01T00:01:00Z"}, "i7"]},
        {"history": []},
        {"user_id": "ada", "filters": {"categories": {"genre": ["old"]}}},
        {"user_id": "nobody"},
    ]
    events.write([event(number, one) for number, one in enumerate(asked)] + [event(9, asked[0], "/v1/items")])
    events.say(Feedback("r0", label="i2", rating=1.0), "films")
    events.say(Feedback("r1", label="i1", rating=-1.0), "films")
    found = {len(one.history): one for one in read("films", 0.0)}
    assert sorted(found) == [1, 3]
    assert found[1] == Shown([("i3", 100)], ["i1", "i2"], [0.9, 0.1], frozenset(["i2"]))
    assert found[3].history == [("i5", 0), ("i6", 60), ("i7", 60)]
    assert found[3].taken == frozenset()
    known = logged.known_of(found[3], {"i5": 2, "i7": 0}, numbers=1)
    assert known["items"].tolist() == [2, 0]
    assert known["times"].tolist() == [0, 60]
