"""Where a row goes: a pure function of its text and the seed.

The same text always falls into the same split, so no duplicate can lie in two of them; new rows never move
old ones; and the order of the source does not matter.
"""

from __future__ import annotations

import numpy as np

from lib.artifacts import SPLITS
from lib.settings import DataSettings


def assign(hashes: np.ndarray, data: DataSettings) -> np.ndarray:
    """Index into SPLITS, int8 [rows], of rows whose texts have these 64-bit hashes."""
    return np.searchsorted(bounds(data.shares), _place(hashes, data.split.seed), side="right").astype(np.int8)


def kept(hashes: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Bool [rows]: which rows stay when each has the chance `shares` float [rows] to.

    `hashes` are other bits than `assign` was given, so that the two choices have nothing to do with each other.
    """
    stay: np.ndarray = _place(hashes, seed) < shares
    return stay


def _place(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Even in [0, 1), float64 [rows], from 64-bit hashes and a seed."""
    mixed = mix(hashes.astype(np.uint64) ^ mix(np.array([seed % 2**64], np.uint64)))
    # The 53 upper bits as a float: all that a double holds exactly.
    place: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return place


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
