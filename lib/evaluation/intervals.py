"""How sure a figure is: percentile bootstrap over the rows of the test split, paired between models.

Resampling rows with replacement only changes how often each combination of (true label, prediction of
each model) occurs, and those counts are multinomial. So whole resamples are drawn as counts of the few
combinations there are: exact, and independent of the number of rows.

Words of one sentence are right or wrong together, so where items lie in rows it is the rows that are drawn
(a cluster bootstrap: Field and Welsh 2007); drawing words would make the interval too narrow.

Figures of answers are functions of sums over rows (`bootstrap_sums`): a mean, a perplexity, a corpus chrF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lib.evaluation.metrics import Floats, Ints, macro_f1

# Counts drawn at a time: bounds memory when many classes make many combinations.
CELLS_AT_ONCE = 4_000_000


def bootstrap_macro_f1(
    labels: Ints,
    predicted: dict[str, Ints],
    classes: int,
    resamples: int,
    seed: int = 0,
    groups: Ints | None = None,
) -> dict[str, Floats]:
    """Macro-F1 [S] of each model on the same S resamples of the rows.

    `predicted` maps a model's name to its predicted classes [N]; `groups` [N] numbers from 0 the row that an
    item lies in, None where each is a row of its own.
    """
    if groups is not None:
        return _bootstrap_groups(labels, predicted, classes, resamples, seed, groups)
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


def _bootstrap_groups(
    labels: Ints, predicted: dict[str, Ints], classes: int, resamples: int, seed: int, groups: Ints
) -> dict[str, Floats]:
    from scipy.sparse import coo_array

    count, cells = int(groups.max()) + 1, classes * classes
    random = np.random.default_rng(seed)
    scores: dict[str, list[Floats]] = {name: [] for name in predicted}
    step = max(1, CELLS_AT_ONCE // max(count, cells))
    # Confusion cells of each group, [G, C·C]: nearly all of them are 0.
    tables = {
        name: coo_array((np.ones(len(labels)), (groups, labels * classes + chosen)), (count, cells)).tocsr()
        for name, chosen in predicted.items()
    }
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = random.multinomial(count, np.full(count, 1 / count), size=size)
        for name, table in tables.items():
            confusions = np.asarray(table.T.dot(drawn.T)).T.reshape(-1, classes, classes)
            scores[name].append(macro_f1(confusions.astype(np.int64)))
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in scores.items()}


@dataclass(frozen=True)
class Additive:
    """A figure that is computed from sums over rows."""

    values: Floats
    """[N, K]: what each row adds."""
    figure: Callable[[Floats], Floats]
    """Sums [..., K] → figures [...]."""

    @property
    def value(self) -> float:
        """The figure over all rows."""
        return float(self.figure(self.values.sum(0)))


def bootstrap_sums(
    figures: Mapping[str, Additive], resamples: int, seed: int = 0, groups: Ints | None = None
) -> dict[str, Floats]:
    """Each figure [S] on the same S resamples of the same N rows.

    `groups` [N] numbers from 0 what each row belongs to: whole groups are drawn. Raises ValueError for unequal
    numbers of rows.
    """
    rows = {len(one.values) for one in figures.values()}
    if len(rows) != 1:
        raise ValueError("paired figures need the same rows")
    (count,) = rows
    values = {name: one.values for name, one in figures.items()}
    if groups is not None:
        count = int(groups.max()) + 1
        for name, each in values.items():
            values[name] = np.zeros((count, each.shape[1]))
            np.add.at(values[name], groups, each)
    random = np.random.default_rng(seed)
    scores: dict[str, list[Floats]] = {name: [] for name in figures}
    step = max(1, CELLS_AT_ONCE // max(count, 1))
    for start in range(0, resamples, step):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start))
        for name, one in figures.items():
            scores[name].append(one.figure(drawn @ values[name]))
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in scores.items()}


def interval(scores: Floats, level: float = 0.95) -> list[float]:
    """Lower and upper percentile of the resampled scores."""
    tail = (1 - level) / 2
    return [float(v) for v in np.quantile(scores, [tail, 1 - tail])]


def p_value(differences: Floats) -> float:
    """Two-sided p of no difference, from the difference's resampled values: the level at which the percentile
    interval would just touch 0, twice the share on its other side. Never 0: no share is below one resample."""
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int, float]:
    """Rows that only one of two models has right, ours and theirs, and the two-sided p of McNemar's exact test
    (McNemar 1947): with equally good models each such row falls to either like a coin.

    `ours` and `theirs` bool [N] say which rows are right. Rows must be independent: not words of one sentence.
    """
    from scipy.stats import binomtest

    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p = float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0
    return won, lost, p


def _confusions(drawn: Ints, place: Ints, classes: int) -> Ints:
    """Confusion matrices [S, C, C] from counts of K combinations and the matrix cell of each."""
    flat = np.zeros((len(drawn), classes * classes), np.int64)
    for cell in np.unique(place):
        flat[:, cell] = drawn[:, place == cell].sum(1)
    return flat.reshape(-1, classes, classes)
