"""How far people agree where several have labelled the same rows, beyond what chance would give.

Cohen's kappa (1960, "A coefficient of agreement for nominal scales"): of two people, (p_o - p_e) / (1 - p_e), where p_o is
the share of rows on which they agree and p_e what it would be if each chose at random with the shares of his own labels.

Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability", nominal data): of any number of people, each of
whom may have left rows out, 1 - D_o / D_e. Both disagreements come from a matrix of coincidences: each pair of labels of
a row with m labels counts 1 / (m - 1).
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

MISSING = -1


def cohen_kappa(first: np.ndarray, second: np.ndarray) -> float | None:
    """Of two people's classes int [rows] of the same rows; None where both have used one label alone."""
    classes = np.unique(np.concatenate([first, second]))
    agreed = float((first == second).mean())
    expected = float(sum((first == c).mean() * (second == c).mean() for c in classes))
    return None if expected == 1 else (agreed - expected) / (1 - expected)


def krippendorff_alpha(ratings: np.ndarray) -> float | None:
    """Of classes int [people, rows], MISSING where somebody has not labelled a row; None where no row has two labels or
    all labels are the same."""
    classes = np.unique(ratings[ratings != MISSING])
    # [rows, classes]: how many people have given a row that label.
    counts = np.stack([(ratings == c).sum(0) for c in classes], axis=1) if len(classes) else np.zeros((0, 0))
    counts = counts[counts.sum(1) > 1].astype(float)
    if not len(counts):
        return None
    weights = 1 / (counts.sum(1) - 1)
    coincidences = (counts * weights[:, None]).T @ counts - np.diag((counts * weights[:, None]).sum(0))
    totals = coincidences.sum(1)
    expected = (totals.sum() ** 2 - (totals**2).sum()) / (totals.sum() - 1)
    observed = totals.sum() - np.trace(coincidences)
    return None if expected == 0 else float(1 - observed / expected)


def agreement(ratings: np.ndarray, names: list[str]) -> dict[str, Any]:
    """What the report says of classes int [people, rows], by the names of the people: `alpha`, `kappa` of each pair that
    has labelled a row in common, and their mean, each pair counting as its rows."""
    pairs: list[dict[str, Any]] = []
    for a, b in combinations(range(len(names)), 2):
        both = (ratings[a] != MISSING) & (ratings[b] != MISSING)
        if both.any():
            first, second = ratings[a][both], ratings[b][both]
            kappa = cohen_kappa(first, second)
            pairs.append(
                {
                    "annotators": [names[a], names[b]],
                    "rows": int(both.sum()),
                    "agreed": round(float((first == second).mean()), 4),
                    "kappa": None if kappa is None else round(kappa, 4),
                }
            )
    known = [pair for pair in pairs if pair["kappa"] is not None]
    rows = sum(pair["rows"] for pair in known)
    mean = sum(pair["kappa"] * pair["rows"] for pair in known) / rows if rows else None
    alpha = krippendorff_alpha(ratings)
    return {
        "annotators": len(names),
        "rows": int((ratings != MISSING).any(0).sum()) if len(names) else 0,
        "labelled_by_several": int(((ratings != MISSING).sum(0) > 1).sum()) if len(names) else 0,
        "kappa": None if mean is None else round(mean, 4),
        "alpha": None if alpha is None else round(alpha, 4),
        "pairs": pairs,
    }
