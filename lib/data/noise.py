"""Which training rows are most likely labelled wrongly: confident learning (Northcutt, Jiang and Chuang 2021, "Confident
learning: estimating uncertainty in dataset labels").

A quick model (TF-IDF and logistic regression) says how probable each label is of rows that it has not learned from: the
rows fall into folds by their hash, and each fold is judged by a model of the others. A row is a suspect where another label
than its own is the likeliest, and more probable than that label is of the rows that carry it, on average: this counts what
is confidently another class whatever the model's own leaning is. Suspects are ranked by margin, the probability of the given label less
that of the likeliest other. The counts of given and confident classes, scaled to the rows of each given class, estimate
the share of wrong labels.

At most `data.label_noise.sample` rows are looked at, those of least hash: what one process holds goes by that.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lib import tfidf
from lib.artifacts import SPLITS
from lib.data.clean import SHOWN_CHARACTERS
from lib.data.labelling import studio
from lib.data.splitting.split import mix
from lib.heads import Head, of_data
from lib.settings import DataSettings

# Below the dataset's, of tasks for Label Studio.
FOLDER = "label_noise"
# C of the logistic regression, in the middle of those that the baseline of evaluation chooses from.
STRENGTH = 3.0
# Fewer rows of a head than this many for each fold tell nothing.
LEAST_ROWS = 10


@dataclass(frozen=True)
class Sampled:
    """A training row that is looked at."""

    key: int
    """64 bits: which rows are looked at, and into which fold one falls."""
    position: int
    id: str
    text: str
    classes: list[int]
    """Of each head; below 0 where it has none."""


def sample(
    rows: pa.Table,
    splits: np.ndarray,
    hashes: np.ndarray,
    positions: np.ndarray,
    data: DataSettings,
    usable: int,
) -> list[tuple[int, int, str, str, list[int]]]:
    """Of a block's rows that are written, about as many training rows as their part of `data.label_noise.sample`: what
    `Sampled` holds, as plain data. `usable` is the number of rows in all."""
    if not data.label_noise.report:
        return []
    # Other bits than those by which rows are left out of a class that outnumbers the others.
    keys = mix(mix(hashes.view(np.uint64)) ^ mix(np.array([data.split.seed % 2**64], np.uint64)))
    share = min(1.0, data.label_noise.sample / max(usable, 1))
    chosen = np.flatnonzero((splits == SPLITS.index("train")) & ((keys >> np.uint64(11)) * 2.0**-53 <= share))
    columns = [rows[head.column].to_numpy() for head in of_data(data)]
    return [
        (
            int(keys[i]),
            int(positions[i]),
            rows["id"][i].as_py(),
            rows["text"][i].as_py(),
            [int(labels[i]) for labels in columns],
        )
        for i in chosen.tolist()
    ]


def kept(rows: Sequence[Sequence[Any]], data: DataSettings) -> list[Any]:
    """No more than `data.label_noise.sample` of what `sample` gave of several blocks."""
    return heapq.nsmallest(data.label_noise.sample, rows, key=lambda row: (row[0], row[1]))


@dataclass(frozen=True)
class Suspects:
    """What confident learning says of rows."""

    rows: np.ndarray
    """int [suspects], the likeliest to be wrong first."""
    suggested: np.ndarray
    """int [rows]: the likeliest class."""
    share: float
    """Estimated, of wrong labels."""


def suspects(likely: np.ndarray, given: np.ndarray) -> Suspects:
    """From out-of-fold probabilities float64 [rows, classes] and the given classes int [rows], each of which some row has."""
    rows, classes = likely.shape
    everyone = np.arange(rows)
    present = np.unique(given)
    thresholds = np.full(classes, np.inf)
    thresholds[present] = [likely[given == c, c].mean() for c in present]
    confident = np.where(likely >= thresholds, likely, -1.0)
    chosen = np.where(confident.max(1) >= 0, confident.argmax(1), -1)
    counted = np.zeros((classes, classes))
    np.add.at(counted, (given[chosen >= 0], chosen[chosen >= 0]), 1)
    totals = counted.sum(1, keepdims=True)
    # Of a class of which no row is confidently anything, nothing is thought wrong.
    counted = np.where(totals > 0, counted, np.eye(classes))
    joint = counted / counted.sum(1, keepdims=True) * np.bincount(given, minlength=classes)[:, None] / rows
    others = likely.copy()
    others[everyone, given] = -1
    margin = likely[everyone, given] - others.max(1)
    found = np.flatnonzero((chosen >= 0) & (chosen != given) & (margin < 0))
    order = found[np.lexsort((found, margin[found]))]
    return Suspects(order, others.argmax(1), float(1 - np.trace(joint)))


def out_of_fold(
    texts: Sequence[str], given: np.ndarray, folds: np.ndarray, classes: int
) -> np.ndarray | None:
    """Probabilities float64 [rows, classes] by models of the other folds; None where no text holds a word or a fold would
    have to be judged by rows of one class."""
    words = tfidf.vectorizer(texts)
    if words is None:
        return None
    features = words.fit_transform(texts)
    found = np.zeros((len(given), classes))
    for fold in np.unique(folds):
        held_out = folds == fold
        if len(np.unique(given[~held_out])) < 2:
            return None
        model = tfidf.fit(features[~held_out], given[~held_out], STRENGTH, None)
        found[held_out] = tfidf.probabilities(model, features[held_out], classes)
    return found


def report(
    rows: Sequence[Sequence[Any]], data: DataSettings, place: Callable[[int], str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of each head what the manifest says, and the listed rows as tasks for Label Studio, each row once. `rows` are what
    `sample` gave, `place` tells file and row of a position."""
    told: dict[str, Any] = {}
    tasks: dict[str, list[Any]] = {}
    sampled = [Sampled(*row) for row in kept(rows, data)]
    for number, head in enumerate(of_data(data)):
        mine = [row for row in sampled if row.classes[number] >= 0]
        found = _judged(mine, number, head, data)
        told[studio.control(head)] = found
        for row, suspect in zip(found.pop("which", []), found["listed"], strict=True):
            one = mine[row]
            suspect["row"] = place(one.position)
            guess = (head, suspect["suggested"], suspect["suggested_probability"])
            tasks.setdefault(one.id[:16], [one.text, []])[1].append(
                (guess, f"given: {head.title(suspect['given'])}")
            )
    made = [
        studio.task(name, text, "; ".join(why for _, why in said), [guess for guess, _ in said])
        for name, (text, said) in tasks.items()
    ]
    return told, made


def _judged(rows: list[Sampled], number: int, head: Head, data: DataSettings) -> dict[str, Any]:
    given = np.array([row.classes[number] for row in rows], int)
    folds = np.array([row.key % data.label_noise.folds for row in rows])
    likely = None
    if len(rows) >= LEAST_ROWS * data.label_noise.folds and len(np.unique(given)) > 1:
        likely = out_of_fold([row.text for row in rows], given, folds, len(head.labels))
    if likely is None:
        return {"rows": len(rows), "share": None, "suspects": 0, "listed": []}
    found = suspects(likely, given)
    which = found.rows[: data.label_noise.rows].tolist()
    listed = [
        {
            "row": "",
            "given": head.labels[given[i]],
            "probability": round(float(likely[i, given[i]]), 4),
            "suggested": head.labels[found.suggested[i]],
            "suggested_probability": round(float(likely[i, found.suggested[i]]), 4),
            "text": rows[i].text[:SHOWN_CHARACTERS],
        }
        for i in which
    ]
    return {
        "rows": len(rows),
        "share": round(found.share, 4),
        "suspects": len(found.rows),
        "listed": listed,
        "which": which,
    }
