"""Where the item that a user turned to stands among all, and what ranks come to.

The whole catalogue is ranked, but for what the user has had already: never a sample of it, which orders models
otherwise (Krichene and Rendle 2020, https://doi.org/10.1145/3394486.3403226).
"""

from __future__ import annotations

import numpy as np

CUT = 10


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
