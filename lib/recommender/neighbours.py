"""Which items are near an item by what users took, and how near candidates are to a history.

Shapes: N items, P candidates, L interactions of a history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

# Neighbours that are kept of an item, the nearest, and the latest interactions that are asked for theirs.
NEIGHBOURS, ASKED = 256, 48
# How much less an item of the history counts for each one that came after it, for what is taken together. This and L2 were
# chosen on MovieLens' validation items.
TOGETHER_FADES = 0.7
L2 = 400.0
# Up to so many items the linear model is solved, which takes as many to the third operations; beyond, cosines are.
SOLVED = 8_192
# Pairs of these are counted of each user in large catalogues: who took very much tells little, and would cost most.
LATEST = 200


@dataclass(frozen=True)
class Neighbours:
    """Item → items that are near it, and how near."""

    starts: np.ndarray
    """int64 [N + 1]."""
    items: np.ndarray
    """int32: those of one item behind those of another."""
    values: np.ndarray
    """float32, as many."""
    fades: float
    """How much less an item of a history counts for each one that came after it."""

    @classmethod
    def of(cls, matrix: csr_array, fades: float) -> Neighbours:
        """The nearest of each row of a matrix [N, N]."""
        chosen, sizes = [], []
        for start, end in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
            best = np.argsort(-matrix.data[start:end], kind="stable")[:NEIGHBOURS]
            chosen.append(start + best[matrix.data[start:end][best] > 0])
            sizes.append(len(chosen[-1]))
        places = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(
            starts, matrix.indices[places].astype(np.int32), matrix.data[places].astype(np.float32), fades
        )

    @property
    def matrix(self) -> csr_array:
        count = len(self.starts) - 1
        return csr_array((self.values, self.items, self.starts), shape=(count, count))

    def near(self, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """float64 [P]: how near candidates int64 [P], of which none is there twice, are to a history int64 [L]."""
        latest = history[-ASKED:]
        weights = self.fades ** np.arange(len(latest) - 1, -1, -1)
        inside = latest < len(self.starts) - 1
        latest, weights = latest[inside], weights[inside]
        sizes = self.starts[latest + 1] - self.starts[latest]
        ends = np.cumsum(sizes)
        places = np.arange(int(sizes.sum())) + np.repeat(self.starts[latest] - ends + sizes, sizes)
        order = np.argsort(candidates, kind="stable")
        ordered, near = candidates[order], self.items[places]
        at = np.minimum(np.searchsorted(ordered, near), len(ordered) - 1)
        hit = ordered[at] == near
        found = np.zeros(len(candidates))
        values = (np.repeat(weights, sizes) * self.values[places])[hit]
        found[order] = np.bincount(at[hit], values, minlength=len(candidates))
        return found


def together(sequences: Sequence[np.ndarray], items: int) -> csr_array:
    """[N, N]: what says that who took one item takes another. Of a small catalogue the weights of a linear model that
    foretells each user's items from the others (EASE, Steck 2019, https://doi.org/10.1145/3308558.3313710); of a large
    one the cosines of the items' users (Sarwar et al. 2001, https://doi.org/10.1145/371920.372071), each with the latest
    that they took."""
    if items <= SOLVED:
        taken = _taken(sequences, items)
        inverse = np.linalg.inv((taken.T @ taken).toarray().astype(np.float64) + L2 * np.eye(items))
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        return csr_array(weights)
    taken = _taken([row[-LATEST:] for row in sequences], items)
    norms = 1 / np.sqrt(np.maximum(np.asarray(taken.sum(0)).ravel(), 1))
    scaled = taken @ csr_array((norms, (np.arange(items), np.arange(items))), shape=(items, items))
    cosines = csr_array(scaled.T @ scaled)
    own = np.repeat(np.arange(items), np.diff(cosines.indptr)) == cosines.indices
    cosines.data[own] = 0
    return cosines


def _taken(sequences: Sequence[np.ndarray], items: int) -> csr_array:
    """float32 [users, N]: 1 where a user took an item, once or often."""
    rows = np.repeat(np.arange(len(sequences)), np.array([len(row) for row in sequences], np.int64))
    columns = np.concatenate([np.zeros(0, np.int64), *sequences])
    found = csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(sequences), items))
    found.data = np.minimum(found.data, 1)
    return found
