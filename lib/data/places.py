"""What becomes of the rows of a block, of all that was found between the passes: which stay, and in which split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from lib.artifacts import SPLITS
from lib.data.alike import dedup
from lib.data.alike.clusters import LEFT_OUT
from lib.data.blocks import Reading
from lib.data.splitting.split import Cuts, assign, kept
from lib.settings import DataSettings

# Of `among`: no table of places has the row.
STAYS = -2


@dataclass(frozen=True)
class Found:
    """What was found of the rows between the passes: references to tables, each sorted by position."""

    rejected: Sequence[Any] = ()
    """Of `position`."""
    dropped: Sequence[Any] = ()
    """dedup.DROPPED."""
    placed: Sequence[Any] = ()
    """clusters.PLACED."""
    cuts: Cuts | None = None
    """Where splits part, by time or label by label."""


@dataclass(frozen=True)
class Places:
    """Of usable rows, in their order."""

    reasons: np.ndarray
    """int [rows]: a `dedup.Reason`, or 0."""
    moved: np.ndarray
    leaking: np.ndarray
    spare: np.ndarray
    """bool [rows]: training rows that `data.undersample` leaves out."""
    stays: np.ndarray
    """bool [rows]: what the dataset has."""
    split: np.ndarray
    """int8 [rows]: index into SPLITS, of rows that stay."""

    @property
    def trains(self) -> np.ndarray:
        trains: np.ndarray = self.stays & (self.split == SPLITS.index("train"))
        return trains


def places(
    found: Found,
    reading: Reading,
    data: DataSettings,
    positions: np.ndarray,
    labels: np.ndarray,
    group: np.ndarray,
    high: np.ndarray,
    seconds: np.ndarray | None,
) -> Places:
    """Of rows of sorted `positions`; the others are as `ready.Ready` has them. Runs in a task."""
    reasons = dedup.among(ray.get(list(found.dropped)), positions, "reason", 0)
    placed = dedup.among(ray.get(list(found.placed)), positions, "place", STAYS)
    moved, leaking = (reasons == 0) & (placed >= 0), (reasons == 0) & (placed == LEFT_OUT)
    stays = reasons == 0
    given = reading.splits(positions)
    split = np.where(given < 0, assign(group, data, found.cuts, labels, seconds), given)
    if data.leakage == "check":
        stays &= ~leaking
        split = np.where(moved, placed, split)
    split = split.astype(np.int8)
    spare = stays & _undersampled(labels, split, high, data)
    return Places(reasons, moved, leaking, spare, stays & ~spare, split)


def _undersampled(
    classes: np.ndarray, splits: np.ndarray, hashes: np.ndarray, data: DataSettings
) -> np.ndarray:
    """Bool [rows]: training rows that `data.undersample` leaves out, the same ones in every run."""
    if not data.undersample:
        return np.zeros(len(classes), bool)
    shares = np.array([data.undersample.get(label, 1.0) for label in data.label_names])
    training = splits == SPLITS.index("train")
    spare: np.ndarray = training & ~kept(hashes, shares[classes], data.split.seed)
    return spare
