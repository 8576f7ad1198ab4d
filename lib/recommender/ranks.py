"""Where the item that a user turned to stands among all, and what ranks come to.

The whole catalogue is ranked, but for what the user has had already: never a sample of it, which orders models
otherwise (Krichene and Rendle 2020, https://doi.org/10.1145/3394486.3403226).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CUT = 10
BIAS_ENDS = 20.0


def rank(scores: np.ndarray, target: int, had: np.ndarray) -> float:
    """1 + the number of items with a higher score + half of those with the same, of scores [N].

    `had` are numbers of items that are not ranked; the target is, also when it is among them.
    """
    own = scores[target]
    better, equal = (scores > own).sum(), (scores == own).sum() - 1
    out = np.unique(had[had != target])
    better -= (scores[out] > own).sum()
    equal -= (scores[out] == own).sum()
    return float(1 + better + equal / 2)


def hits(ranks: np.ndarray, cut: int = CUT) -> np.ndarray:
    """1 where the item is among the first `cut`; float64, as many. With one right item it is the recall, too."""
    return (ranks <= cut).astype(np.float64)


def gains(ranks: np.ndarray, cut: int = CUT) -> np.ndarray:
    """NDCG of one right item: 1 / log2(1 + rank) among the first `cut`, else 0 (Järvelin and Kekäläinen 2002)."""
    return np.where(ranks <= cut, 1 / np.log2(1 + ranks), 0.0)


def figures(ranks: np.ndarray) -> dict[str, float]:
    """`hr_10`, `ndcg_10` and `mrr`, which is not cut off; 0 of no ranks."""
    if not len(ranks):
        return {"hr_10": 0.0, "ndcg_10": 0.0, "mrr": 0.0}
    return {
        "hr_10": float(hits(ranks).mean()),
        "ndcg_10": float(gains(ranks).mean()),
        "mrr": float((1 / ranks).mean()),
    }


# How many items of the other kind are looked at: whoever stands behind so many is far from every list.
OTHERS = 64


@dataclass(frozen=True)
class Place:
    """Where an item stands, before it is known how much less likely new items are than what is said of them tells.

    Items are of two kinds: those that training has seen, and new ones."""

    own: float
    """Its rank among its own kind."""
    others: np.ndarray
    """float32 [OTHERS]: by how much the best of the other kind are above it; -inf where there are no more."""
    new: bool
    mass: float
    """Log of the odds that what comes is new."""


def place(scores: np.ndarray, target: int, had: np.ndarray, known: np.ndarray) -> Place:
    """As `rank`, of scores [N]; `known` bool [N] says which items training has seen."""
    left = scores.astype(np.float64)
    left[had[had != target]] = -np.inf
    own, same = left[target], known == known[target]
    ahead = left[~same] - own
    ahead = -np.sort(-ahead)[:OTHERS]
    others = np.full(OTHERS, -np.inf, np.float32)
    others[: len(ahead)] = ahead
    mine = left[same]
    among = 1 + (mine > own).sum() + ((mine == own).sum() - 1) / 2
    return Place(float(among), others, not known[target], log_sum(left[~known]) - log_sum(left[known]))


def stacked(places: Sequence[Place]) -> dict[str, np.ndarray]:
    """Arrays of M places."""
    return {
        "own": np.array([one.own for one in places], np.float64),
        "others": np.array([one.others for one in places], np.float32).reshape(-1, OTHERS),
        "new": np.array([one.new for one in places], bool),
        "mass": np.array([one.mass for one in places], np.float64),
    }


def fit_new_bias(places: dict[str, np.ndarray]) -> float:
    """What to add to the scores of new items, so that as many are expected as came: their scores say how well they suit, and
    not how seldom anybody turns to something new. 0 where there is no new item."""
    mass = places["mass"][np.isfinite(places["mass"])]
    if not len(mass):
        return 0.0
    wanted = (places["new"].sum() + 0.5) / (len(mass) + 1)
    low, high = -BIAS_ENDS, BIAS_ENDS
    for _ in range(60):  # the expected share rises with the bias
        middle = (low + high) / 2
        share = (1 / (1 + np.exp(-(mass + middle)))).mean()
        low, high = (middle, high) if share < wanted else (low, middle)
    return float((low + high) / 2)


def ranked(places: dict[str, np.ndarray], bias: float) -> np.ndarray:
    """Ranks float64 [M] where new items have `bias` added."""
    shift = np.where(places["new"], -bias, bias)[:, None]
    ahead = places["others"] + shift
    return np.asarray(places["own"] + (ahead > 0).sum(1) + (ahead == 0).sum(1) / 2)


def log_sum(values: np.ndarray) -> float:
    """log Σ exp; -inf of none."""
    top = values.max(initial=-np.inf)
    return float(top + np.log(np.exp(values - top).sum())) if np.isfinite(top) else -np.inf
