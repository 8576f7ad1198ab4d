"""How sure a macro-F1 is: percentile bootstrap over the rows of the test split, paired between models.

Resampling rows with replacement only changes how often each combination of (true label, prediction of
each model) occurs, and those counts are multinomial. So whole resamples are drawn as counts of the few
combinations there are: exact, and independent of the number of rows.
"""

from __future__ import annotations

import numpy as np

from lib.evaluation.metrics import Floats, Ints, macro_f1

# Counts drawn at a time: bounds memory when many classes make many combinations.
CELLS_AT_ONCE = 4_000_000


def bootstrap_macro_f1(
    labels: Ints, predicted: dict[str, Ints], classes: int, resamples: int, seed: int = 0
) -> dict[str, Floats]:
    """Macro-F1 [S] of each model on the same S resamples of the rows.

    `predicted` maps a model's name to its predicted classes [N].
    """
    columns = np.stack([labels, *predicted.values()], axis=1)
    cells, counts = np.unique(columns, axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    scores: dict[str, list[Floats]] = {name: [] for name in predicted}
    step = max(1, CELLS_AT_ONCE // max(len(cells), classes * classes))
    for start in range(0, resamples, step):
        drawn = random.multinomial(len(labels), counts / counts.sum(), size=min(step, resamples - start))
        for i, name in enumerate(predicted, start=1):
            scores[name].append(macro_f1(_confusions(drawn, cells[:, 0] * classes + cells[:, i], classes)))
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in scores.items()}


def interval(scores: Floats, level: float = 0.95) -> list[float]:
    """Lower and upper percentile of the resampled scores."""
    tail = (1 - level) / 2
    return [float(v) for v in np.quantile(scores, [tail, 1 - tail])]


def _confusions(drawn: Ints, place: Ints, classes: int) -> Ints:
    """Confusion matrices [S, C, C] from counts of K combinations and the matrix cell of each."""
    flat = np.zeros((len(drawn), classes * classes), np.int64)
    for cell in np.unique(place):
        flat[:, cell] = drawn[:, place == cell].sum(1)
    return flat.reshape(-1, classes, classes)
