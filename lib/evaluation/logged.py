"""What a recommender would have earned in the place of those that answered: an estimate from what was logged.

An application that explores (`serving.recommend.explore`) tells how likely each item was to be at its place, those before
it being as they were: its propensity. There the other model would have shown the best of its own that was not shown
before. Where that is what was shown, what came of it counts, divided by its propensity (inverse propensity scoring,
Horvitz and Thompson 1952); the sum is divided by that of the weights, so that chance matches do not inflate it
(self-normalised, Swaminathan and Joachims 2015).

Shapes: R requests, K places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from lib import events
from lib.recommender import store
from lib.recommender.forms import MOST_HISTORY
from lib.tasks.recommend import ROUTE

# A match counts at most so many times: a little bias for much less variance (Ionides 2008).
MOST_WEIGHT = 200.0
RESAMPLES = 1_000


@dataclass(frozen=True)
class Shown:
    """One answer that was logged."""

    history: list[tuple[str, int]]
    """Ids of items and when, the earliest first."""
    items: list[str]
    """What was shown, place by place."""
    propensities: list[float]
    taken: frozenset[str]
    """Items that feedback names as taken."""


def read(application: str, since: float) -> Iterator[Shown]:
    """Answers since a time, in seconds since 1970, whose places can be asked again: without filters, diversity and context of
    their own, and of whom something was known."""
    for event in events.read(application, since):
        asked, answer = event["request"], event["answer"]
        if event["route"] != ROUTE or not isinstance(asked, dict) or not isinstance(answer, dict):
            continue
        if any(asked.get(name) for name in ("filters", "diversity", "context")):
            continue
        history = _history(asked, application, event["time"])
        results = answer.get("results") or []
        if not history or not results:
            continue
        said = event["feedback"] or {}
        taken = frozenset([said["label"]] if said.get("label") and (said.get("rating") or 0) >= 0 else [])
        yield Shown(
            history,
            [str(one["item"]) for one in results],
            [float(one["propensity"]) for one in results],
            taken,
        )


def _history(asked: dict[str, Any], application: str, time: float) -> list[tuple[str, int]]:
    if user := asked.get("user_id"):
        done = store.history(application, str(user), MOST_HISTORY)
        return [(one.item, one.time) for one in done if one.time <= time]
    found: list[tuple[str, int]] = []
    for one in asked.get("history") or []:
        at = found[-1][1] if found else 0
        if isinstance(one, dict) and one.get("time"):
            at = int(datetime.fromisoformat(one["time"]).timestamp())
        found.append((one["item"] if isinstance(one, dict) else str(one), at))
    return found


def known_of(one: Shown, row: dict[str, int], numbers: int) -> dict[str, Any]:
    """As `lib.recommender.queries.asked` has it, in the rows of a catalogue; items that are not there are left out."""
    done = [(row[item], time) for item, time in one.history if item in row]
    return {
        "items": np.array([item for item, _ in done], np.int64),
        "times": np.array([time for _, time in done], np.int64),
        "events": np.zeros(len(done), np.int64),
        "user_categories": np.zeros(0, np.int64),
        "user_numbers": np.zeros(numbers, np.float32),
    }


def estimate(shown: Sequence[Shown], lists: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of `lists` [R], each model's items from the best on, at the places that were shown.

    `logged`: share of places whose item was taken; `estimated`: the same of the model, with the ends `low` and `high` of its
    95% interval (bootstrap over requests); `places`, `matched` (places where both show the same) and `effective`, the
    number of matches that tell as much when all weigh the same (Kish 1965).
    """
    sums = np.zeros((len(shown), 2))
    weights: list[float] = []
    places = taken = 0
    for row, (one, own) in enumerate(zip(shown, lists, strict=True)):
        for place, (item, propensity) in enumerate(zip(one.items, one.propensities, strict=True)):
            places += 1
            taken += item in one.taken
            before = set(one.items[:place])
            if next((other for other in own if other not in before), None) != item:
                continue
            weight = min(1 / propensity, MOST_WEIGHT)
            weights.append(weight)
            sums[row] += weight * (item in one.taken), weight
    total = sums.sum(0)
    drawn = np.random.default_rng(0).multinomial(
        len(shown), np.full(len(shown), 1 / max(len(shown), 1)), RESAMPLES
    )
    again = drawn @ sums
    values = again[:, 0] / np.maximum(again[:, 1], 1e-12)
    low, high = np.quantile(values, [0.025, 0.975]) if len(shown) else (0.0, 0.0)
    squares = float(np.square(weights).sum()) if weights else 0.0
    return {
        "requests": len(shown),
        "places": places,
        "matched": len(weights),
        "effective": float(np.sum(weights)) ** 2 / squares if squares else 0.0,
        "logged": taken / max(places, 1),
        "estimated": float(total[0] / total[1]) if total[1] else 0.0,
        "low": float(low),
        "high": float(high),
    }
