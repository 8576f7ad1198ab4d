"""Where a row goes: a pure function of its text and the seed, or of its group and the seed.

The same text always falls into the same split, so no duplicate can lie in two of them; new rows never move
old ones; and the order of the source does not matter. By time, or label by label, it also goes by the keys at
which the splits part (`lib.data.splitting.cuts`), which all rows together decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lib.artifacts import SPLITS
from lib.errors import ConfigError
from lib.settings import DataSettings
from lib.tasks import Task

# Columns of a block, by their keys.
GROUP, TIME = "split.group", "split.time"
# Of a place in [0, 1), as an integer.
KEY_BITS = 53
# A cut behind all keys.
FAR = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Cuts:
    """Keys at which splits part: from the first on rows validate, from the second on they test."""

    strata: np.ndarray
    """int64 [strata], sorted: labels that are split each by itself; 0 where all rows are split together."""
    at: np.ndarray
    """int64 [strata, 2]"""

    def places(self, strata: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Index into SPLITS, int8 [rows], of rows of `strata` and `keys`, int64 [rows]; of a stratum that nobody has seen,
        they train."""
        if not len(self.strata):
            return np.zeros(len(keys), np.int8)
        at = np.minimum(np.searchsorted(self.strata, strata), len(self.strata) - 1)
        found: np.ndarray = (keys[:, None] >= self.at[at]).sum(1).astype(np.int8)
        found[self.strata[at] != strata] = 0
        return found


def columns(data: DataSettings) -> dict[str, str]:
    """Name in a block → column of the source, of what rows are split by."""
    named = {GROUP: data.split.group, TIME: data.split.time}
    return {name: column for name, column in named.items() if column is not None}


def check(data: DataSettings, task: Task, name: str) -> None:
    """Raises ConfigError where rows of the task `name` cannot be split as `data.split` says."""
    if data.split.by != "random" and data.items is not None:
        raise ConfigError(
            f"data.split.{data.split.by}: {name} holds out what each user did last (data.interactions); leave it out"
        )
    if data.split.stratified and not (data.class_names and task.classes(data) == data.class_names):
        raise ConfigError(f"data.split.stratified: a row of {name} has no label of its own; leave it out")


def keys(
    data: DataSettings, hashes: np.ndarray, labels: np.ndarray, seconds: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Stratum and key, int64 [rows] each, of rows that are split by time (in seconds) or label by label."""
    if seconds is not None:
        return np.zeros(len(seconds), np.int64), seconds
    return labels.astype(np.int64), _key(hashes, data.split.seed)


def assign(
    hashes: np.ndarray,
    data: DataSettings,
    cuts: Cuts | None = None,
    labels: np.ndarray | None = None,
    seconds: np.ndarray | None = None,
) -> np.ndarray:
    """Index into SPLITS, int8 [rows], of rows whose texts, or groups, have these 64-bit hashes; with `cuts`, by them."""
    if cuts is not None:
        labels = np.zeros(len(hashes), np.int64) if labels is None else labels
        return cuts.places(*keys(data, hashes, labels, seconds))
    return np.searchsorted(bounds(data.shares), _place(hashes, data.split.seed), side="right").astype(np.int8)


def kept(hashes: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Bool [rows]: which rows stay when each has the chance `shares` float [rows] to.

    `hashes` are other bits than `assign` was given, so that the two choices have nothing to do with each other.
    """
    stay: np.ndarray = _place(hashes, seed) < shares
    return stay


def _place(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Even in [0, 1), float64 [rows], from 64-bit hashes and a seed."""
    place: np.ndarray = _key(hashes, seed).astype(np.float64) * 2.0**-KEY_BITS
    return place


def _key(hashes: np.ndarray, seed: int) -> np.ndarray:
    """The same in [0, 2^53), int64 [rows]: all bits that a double holds exactly."""
    mixed = mix(hashes.astype(np.uint64) ^ mix(np.array([seed % 2**64], np.uint64)))
    key: np.ndarray = (mixed >> np.uint64(64 - KEY_BITS)).astype(np.int64)
    return key


def bounds(split_shares: dict[str, float]) -> np.ndarray:
    """Upper ends of the splits' parts of [0, 1), but the last."""
    shares = np.array([split_shares[name] for name in SPLITS])
    ends = np.cumsum(shares)
    # Rounding must not give rows to a split whose share is 0.
    ends[np.flatnonzero(shares)[-1] :] = 1.0
    return ends[:-1]


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014): each input bit reaches each output bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
