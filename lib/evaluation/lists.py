"""What recommended lists are like: their figures, how likely was said and how often it came, slices, examples.

Shapes: M lists of K items, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lib.artifacts import DatasetRef
from lib.recommender import items as catalogue
from lib.recommender import ranks

EXAMPLES, SHOWN_HISTORY = 12, 8
# Values of a users' column that have a slice.
GROUPS = 12
# Interactions in training from which on an item is no longer rare.
RARE = 10


def calibration(
    first: np.ndarray, chances: np.ndarray, targets: np.ndarray, bins: int
) -> list[dict[str, float]]:
    """Bins of as many recommended items each, from the least likely to the likeliest: how likely the model said that they
    come next, and how often they did."""
    said, came = chances.ravel(), (first == targets[:, None]).ravel()
    order = np.argsort(said, kind="stable")
    return [
        {
            "lower": float(said[part[0]]),
            "upper": float(said[part[-1]]),
            "rows": len(part),
            "confidence": float(said[part].mean()),
            "accuracy": float(came[part].mean()),
        }
        for part in np.array_split(order, min(bins, len(order)))
    ]


def figures_of(first: np.ndarray, seen: np.ndarray, items: pa.Table) -> dict[str, float]:
    """What the lists [M, K] are like: `coverage_10`, the share of the catalogue that anybody is shown; `novelty_10`, mean
    self-information of the items in bits (Zhou et al. 2010, https://doi.org/10.1073/pnas.1000488107); `popularity_10`,
    mean share of the catalogue that is seen less often; `diversity_10`, mean share of categories that two items of a
    list do not have in common (1 - Jaccard; intra-list distance of Ziegler et al. 2005)."""
    if not first.size:
        return {}
    likely = (seen + 1) / (seen.sum() + len(seen))
    below = np.searchsorted(np.sort(seen), seen, side="left") / max(len(seen), 1)
    found = {
        "coverage_10": len(np.unique(first)) / len(seen),
        "novelty_10": float(-np.log2(likely[first]).mean()),
        "popularity_10": float(below[first].mean()),
    }
    names = catalogue.vocabulary(items["categories"])
    if not names or first.shape[1] < 2:
        return found
    codes, starts = catalogue.coded(items["categories"], names)
    sizes = np.diff(np.append(starts, len(codes)))
    from scipy.sparse import csr_array

    has = csr_array(
        (np.ones(len(codes), np.float32), codes, np.append(starts, len(codes))), (len(seen), len(names))
    )
    distances = []
    for row in first:
        own = has[row].toarray()
        common = own @ own.T
        union = sizes[row][:, None] + sizes[row] - common
        pairs = np.triu_indices(len(row), 1)
        distances.append(1 - (common / np.maximum(union, 1))[pairs].mean())
    return found | {"diversity_10": float(np.mean(distances))}


def slices(
    found: np.ndarray, known: list[dict[str, Any]], targets: np.ndarray, fresh: np.ndarray, seen: np.ndarray
) -> dict[str, dict[str, dict[str, float]]]:
    """By how much is known of the user, and of the item that is foretold."""
    lengths = np.array([len(one["items"]) for one in known])
    counts = seen[targets]
    of = {
        "history": {
            "none": lengths == 0,
            "1 to 9": (lengths > 0) & (lengths < 10),
            "10 to 49": (lengths >= 10) & (lengths < 50),
            "50 and more": lengths >= 50,
        },
        "item": {
            "held out": fresh,
            "not seen": ~fresh & (counts == 0),
            f"seen 1 to {RARE - 1} times": ~fresh & (counts > 0) & (counts < RARE),
            f"seen {RARE} to 99 times": ~fresh & (counts >= RARE) & (counts < 100),
            "seen 100 times and more": ~fresh & (counts >= 100),
        },
    }
    return {
        name: {
            value: {
                "rows": int(chosen.sum()),
                **ranks.figures(found[chosen]),
                "recall_50": float(ranks.hits(found[chosen], 50).mean()),
            }
            for value, chosen in values.items()
            if (chosen & (~fresh if name == "history" else True)).any()
            for chosen in [chosen & (~fresh if name == "history" else np.ones(len(fresh), bool))]
        }
        for name, values in of.items()
    }


def groups(
    found: np.ndarray, known: list[dict[str, Any]], dataset: DatasetRef
) -> dict[str, dict[str, dict[str, float]]]:
    """By what is known of the users besides what they do: of each column the values of the most rows."""
    names = dataset.manifest()["users_known"]["categories"]
    rows: dict[str, dict[str, list[int]]] = {}
    for row, one in enumerate(known):
        for code in one["user_categories"].tolist():
            column, _, value = names[code].partition("=")
            rows.setdefault(column, {}).setdefault(value, []).append(row)
    return {
        f"user's {column}": {
            value: {
                "rows": len(of),
                **ranks.figures(found[of]),
                "recall_50": float(ranks.hits(found[of], 50).mean()),
            }
            for value, of in sorted(values.items(), key=lambda item: -len(item[1]))[:GROUPS]
        }
        for column, values in rows.items()
    }


def examples(
    known: list[dict[str, Any]], targets: np.ndarray, found: np.ndarray, first: np.ndarray, items: pa.Table
) -> list[dict[str, Any]]:
    """Evenly spaced: what somebody had done last, what is recommended, and what came."""
    titles: Sequence[str] = items["title"].to_pylist()
    chosen = np.unique(np.linspace(0, len(targets) - 1, min(EXAMPLES, len(targets))).astype(np.int64))
    return [
        {
            "history": [titles[item] for item in known[i]["items"][-SHOWN_HISTORY:]],
            "recommended": [titles[item] for item in first[i]],
            "came": titles[targets[i]],
            "rank": float(found[i]),
        }
        for i in chosen.tolist()
    ]
