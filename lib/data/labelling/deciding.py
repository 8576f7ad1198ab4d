"""One label of all that was said of a row, or a task for people.

What people have said goes first, then the label that the source has, then the machine's: the mean of what rules and models
think probable ("linear opinion pool", Stone 1961), which is never surer than the surest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.data.labelling.studio import TIED
from lib.encoders import softmax
from lib.labels import MISSING

GOLD, PEOPLE = "source", "people"
TIE = "people disagree"


@dataclass(frozen=True)
class Opinion:
    """What rules or a model say of rows."""

    name: str
    likely: np.ndarray
    """float64 [rows, classes]: probabilities."""
    speaks: np.ndarray
    """bool [rows]."""

    @classmethod
    def of_logits(cls, name: str, logits: np.ndarray, temperature: float) -> Opinion:
        """From logits [rows, classes], NaN where a model has said nothing."""
        speaks = ~np.isnan(logits).any(1)
        return cls(name, softmax(np.nan_to_num(logits) / temperature), speaks)


@dataclass(frozen=True)
class Decided:
    """One head's labels of rows."""

    label: np.ndarray
    """int [rows]: the class; MISSING where nothing is known. Of a row that is not sure, the likeliest."""
    confidence: np.ndarray
    """float64 [rows]."""
    by: np.ndarray
    """str [rows]: who said so."""
    sure: np.ndarray
    """bool [rows]: labelled; others are for people."""
    why: np.ndarray
    """str [rows]: why it is not sure."""


def decide(
    opinions: Sequence[Opinion],
    gold: np.ndarray,
    people: np.ndarray,
    shares: np.ndarray,
    threshold: float,
) -> Decided:
    """`gold` int [rows] are the source's own labels, `people` what most people have said (MISSING, or TIED), and `shares`
    of how many of them."""
    rows = len(gold)
    speaks = np.stack([o.speaks for o in opinions]) if opinions else np.zeros((0, rows), bool)
    count = speaks.sum(0)
    label, confidence = np.full(rows, MISSING), np.zeros(rows)
    disagree = np.zeros(rows, bool)
    if opinions:
        weighed = np.sum([o.likely * o.speaks[:, None] for o in opinions], axis=0)
        mean = weighed / np.maximum(count, 1)[:, None]
        # Rounded, so that a last bit that depends on a batch decides nothing.
        confidence = np.round(np.where(count > 0, mean.max(1), 0), 6)
        label = np.where(count > 0, mean.argmax(1), MISSING)
        each = np.stack([np.where(o.speaks, o.likely.argmax(1), label) for o in opinions])
        disagree = (each != label).any(0)
    by = _names(opinions, speaks)
    sure = (count > 0) & ~disagree & (confidence >= threshold)
    why = np.select(
        [sure, count == 0, disagree], ["", "nothing known", "disagreement"], default="not sure"
    ).astype(object)
    for given, certain, name in ((gold, np.ones(rows), GOLD), (people, shares, PEOPLE)):
        known = given >= 0
        label, by = np.where(known, given, label), np.where(known, name, by)
        confidence, why = np.where(known, certain, confidence), np.where(known, "", why)
        sure = sure | known
    tied = people == TIED
    sure, why = sure & ~tied, np.where(tied, TIE, why)
    return Decided(label, confidence, by, sure, why)


def _names(opinions: Sequence[Opinion], speaks: np.ndarray) -> np.ndarray:
    """str [rows]: the names of those that speak, such as `rules+embedding`."""
    codes = (speaks * (1 << np.arange(len(opinions)))[:, None]).sum(0)
    sets = [
        "+".join(o.name for place, o in enumerate(opinions) if code >> place & 1)
        for code in range(1 << len(opinions))
    ]
    names: np.ndarray = np.array(sets, object)[codes]
    return names
