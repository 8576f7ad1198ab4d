"""What a trained recommender must be better than: popularity, and which item tends to follow which.

Shapes: B histories, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

# How much less an item counts for each one that came after it, in a history and between the two of a transition.
RECENCY, DISTANCE = 0.8, 0.6
# Followers further away than this are none.
WITHIN = 6


def popularity(counts: np.ndarray, histories: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [B, N]: how often each item [N] is seen in training, whoever asks."""
    return np.broadcast_to(counts.astype(np.float32), (len(histories), len(counts)))


@dataclass(frozen=True)
class Transitions:
    """Item-to-item transitions: a Markov chain whose steps may leave out some items (as Rendle et al. 2010, section 3,
    without the factorisation), asked with the latest items of the history, the last above all."""

    follows: csr_array
    """float32 [N, N]: how often, and how soon, one item came after another; each row sums to 1."""

    @classmethod
    def fit(cls, sequences: Sequence[np.ndarray], items: int) -> Transitions:
        """Of training sequences, each int [L] in order."""
        before, after, weights = [], [], []
        for distance in range(1, WITHIN + 1):
            for row in sequences:
                before.append(row[:-distance])
                after.append(row[distance:])
            weights.append(
                np.full(sum(max(len(row) - distance, 0) for row in sequences), DISTANCE ** (distance - 1))
            )
        places = (np.concatenate(before), np.concatenate(after)) if before else ([], [])
        values = np.concatenate(weights).astype(np.float32) if weights else np.zeros(0, np.float32)
        counted = csr_array((values, places), shape=(items, items))
        sums = np.asarray(counted.sum(1)).ravel()
        scale = csr_array(
            (1 / np.where(sums > 0, sums, 1), (range(items), range(items))), shape=(items, items)
        )
        return cls((scale @ counted).astype(np.float32).tocsr())

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [B, N]."""
        size = sum(map(len, histories))
        ages = [np.arange(len(h) - 1, -1, -1) for h in histories]
        weights = RECENCY ** np.concatenate(ages) if size else np.zeros(0)
        rows = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
        items = np.concatenate(histories) if size else np.zeros(0, np.int64)
        asked = csr_array((weights, (rows, items)), shape=(len(histories), self.follows.shape[0]))
        return np.asarray((asked @ self.follows).toarray(), np.float32)
