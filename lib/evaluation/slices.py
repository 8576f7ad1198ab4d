"""The same metrics on parts of the test split: each value of a slice column, and buckets of length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lib.evaluation.metrics import Ints, accuracy, confusion_matrix, macro_f1_of_present

MISSING = "(missing)"
REST = "(all others)"


def by_value(
    values: Sequence[str | None], labels: Ints, predicted: Ints, classes: int, limit: int = 20
) -> dict[str, dict[str, float]]:
    """Value → rows, accuracy, macro_f1; the `limit` most frequent values, and all others as one."""
    names = np.array([MISSING if v is None or v == "" else str(v) for v in values], dtype=object)
    found, counts = np.unique(names.astype(str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept = [str(found[i]) for i in order[:limit]]
    parts = {name: names == name for name in kept}
    if len(found) > limit:
        parts[REST] = ~np.isin(names.astype(str), kept)
    return {name: _measure(mask, labels, predicted, classes) for name, mask in parts.items()}


def by_length(
    lengths: Ints, labels: Ints, predicted: Ints, classes: int, buckets: int = 4
) -> dict[str, dict[str, float]]:
    """`A-B tokens` → rows, accuracy, macro_f1, for buckets of about equally many rows, short to long."""
    edges = np.quantile(lengths, np.linspace(0, 1, buckets + 1), method="inverted_cdf")
    bounds = np.unique(edges[1:])  # many equal lengths leave fewer buckets
    place = np.searchsorted(bounds, lengths)
    parts = {}
    for bucket in range(len(bounds)):
        mask = place == bucket
        inside = lengths[mask]
        parts[f"{inside.min()}-{inside.max()} tokens"] = _measure(mask, labels, predicted, classes)
    return parts


def _measure(mask: np.ndarray, labels: Ints, predicted: Ints, classes: int) -> dict[str, float]:
    counts = confusion_matrix(labels[mask], predicted[mask], classes)
    return {
        "rows": int(counts.sum()),
        "accuracy": accuracy(counts),
        "macro_f1": macro_f1_of_present(counts),
    }
