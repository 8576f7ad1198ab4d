"""The best items of a large catalogue, without looking at all of them: an inverted file (Jégou et al. 2011,
https://doi.org/10.1109/TPAMI.2010.57).

    index.safetensors    `cells` int32 [N]: the cell of each row of the catalogue
    index.json           how much is read, and what was measured (Measured)

Items are divided by k-means into cells of the like. An item is worth `vector · along + bias · by`, which is the product of
[vector, bias / scale] and [along, by · scale]; with the root mean square of users' entries as `scale` no entry of the
second is larger than the others, and near in the first means near in worth. Of a cell of n items that lie σ around their
centre in each direction, the best is expected at the centre's worth + σ √(2 log n) times the length of the second. Cells
are read from the one that promises most, until so many items were read that may be shown; their worth is exact.

In memory this takes a second copy of the vectors. At export it is measured how many items must be read, and how many of
the best of all are found then.

Shapes: N items, C cells, W width, U users.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lib import storage
from lib.errors import ModelError
from lib.recommender.ranker import CANDIDATES
from lib.recommender.ranks import log_sum

FILE, TOLD = "index.safetensors", "index.json"
# Cells are this times the root of N; k-means learns from so many items of each, in so many rounds.
CELLS, LEARNS_FROM, ROUNDS = 2.0, 64, 8
# How many of the best CANDIDATES are to be found, of users and of items alike; more is read until they are, up to a share of all.
WANTED, MOST_READ = 0.99, 0.25
# Users, and as many items, of which one half tells how much to read, and the other what is found.
ASKED = 256
ITEMS_AT_ONCE = 65_536
TINY = 1e-12


@dataclass(frozen=True)
class Aim:
    """What makes an item worth showing: `vector · along + bias · by`, and the product of `like` and its vector of length 1."""

    along: np.ndarray
    """float32 [W]."""
    by: float
    like: np.ndarray
    """float32 [W]."""

    @classmethod
    def user(cls, vector: np.ndarray) -> Aim:
        """The score of a user's vector."""
        return cls(vector, 1.0, np.zeros_like(vector))

    @classmethod
    def alike(cls, vector: np.ndarray) -> Aim:
        """The cosine to a vector."""
        length = np.float32(max(float(np.linalg.norm(vector)), TINY))
        return cls(np.zeros_like(vector), 0.0, vector / length)

    def blended(self, own: float, other: Aim, others: float) -> Aim:
        """So much of this, and so much of another."""
        mine, theirs = np.float32(own), np.float32(others)
        return Aim(
            mine * self.along + theirs * other.along,
            own * self.by + others * other.by,
            mine * self.like + theirs * other.like,
        )

    def worth(self, vectors: np.ndarray, bias: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """float32 [K] of items with vectors [K, W], biases [K] and lengths [K] of the vectors."""
        found = np.zeros(len(bias), np.float32)
        if self.along.any():
            found += vectors @ self.along
        if self.by:
            found += np.float32(self.by) * bias
        if self.like.any():
            found += vectors @ self.like / np.maximum(norms, TINY)
        return found


@dataclass(frozen=True)
class Measured:
    """Of users of the validation split, without what they had, beside all items looked at; the same of items, by cosine."""

    items: int
    cells: int
    scale: float
    reads: int
    """Items that are read for CANDIDATES wanted ones."""
    asked: int
    """Users, and as many items or fewer."""
    recall: float
    """Mean share of the best CANDIDATES that are found for users."""
    worst: float
    """Of the user with the least."""
    recall_alike: float
    """Mean, of the items most like one."""
    mass_error: float
    """Mean of |log Z - log Ẑ|, Z the sum that the softmax over all items divides by, Ẑ what it is taken for."""
    depth: int = CANDIDATES
    format: int = 1

    @property
    def least_recall(self) -> float:
        return min(self.recall, self.recall_alike)

    def __str__(self) -> str:
        return (
            f"index of {self.items:,} items: {self.reads:,} read, recall@{self.depth} of the exact answer {self.recall:.3f} "
            f"({self.asked} users of validation, the worst {self.worst:.3f}), of items alike {self.recall_alike:.3f}"
        )


@dataclass(frozen=True)
class Near:
    """What was read of an index; K items."""

    rows: np.ndarray
    """int64 [K]."""
    worth: np.ndarray
    """float32 [K]."""
    log_rest: float
    """Log of the sum of exp(worth) over what was not read, by the cells' means and spreads, as if worth were Gaussian in each."""

    def log_sum(self) -> float:
        """Of all."""
        return float(np.logaddexp(log_sum(self.worth.astype(np.float64)), self.log_rest))


class Index:
    """Of the first N rows of a shelf, as they were when it was made; threads may share it."""

    def __init__(
        self, cells: np.ndarray, scale: float, vectors: np.ndarray, bias: np.ndarray, reads: int = CANDIDATES
    ) -> None:
        """`cells` int [N], none below the highest empty; `reads` as Measured has it."""
        self.scale, self._reads = scale, reads
        self._rows = np.argsort(cells, kind="stable")
        sizes = np.bincount(cells)
        starts = np.cumsum(sizes) - sizes
        self._sizes, self._starts = sizes, starts
        # [N, W + 1], the bias last.
        self._items = np.column_stack([vectors, bias])[self._rows]
        self._norms = np.linalg.norm(self._items[:, :-1], axis=1)
        self._centers = np.add.reduceat(self._items, starts, axis=0, dtype=np.float64) / sizes[:, None]
        self._lengths = np.maximum(np.add.reduceat(self._norms, starts, dtype=np.float64) / sizes, TINY)
        # Σ |x - centre|² = Σ |x|² - n |centre|², over W + 1 directions.
        squares = np.add.reduceat(
            self._norms.astype(np.float64) ** 2 + (self._items[:, -1] / scale) ** 2, starts
        )
        own = (self._centers[:, :-1] ** 2).sum(1) + (self._centers[:, -1] / scale) ** 2
        self._spreads = np.sqrt(np.maximum(squares / sizes - own, 0) / self._items.shape[1])
        self._best = self._spreads * np.sqrt(2 * np.log(sizes))
        self._moments = Moments.of(self._items), Moments.of(self._items[:, :-1], self._norms)

    def __len__(self) -> int:
        return len(self._rows)

    def enough(self, most: int) -> int:
        """How many items that may be shown are to be read where so many are wanted, those counted that would be among them
        but are not to be shown again."""
        return enough(self._reads, most)

    def near(self, aim: Aim, allowed: np.ndarray, least: int, most: float) -> Near | None:
        """Of the cells that promise most the rows that are `allowed` bool [N], `least` of them at least, where
        there are as many; None where more than `most` items would have to be read."""
        left, count = int(np.count_nonzero(allowed)), len(self)
        share = max(left, 1) / count
        middle, length = self._promised(aim)
        order = np.argsort(-(middle + length * self._best))
        ends = np.cumsum(self._sizes[order])
        rows, worth = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        got = read = done = 0
        while got < least and done < len(order):
            wanted = read + (least - got) / share
            if min(wanted, count) > most:
                return None
            to = min(int(np.searchsorted(ends, wanted)) + 1, len(order))
            for own, found in self._read(aim, order[done:to]):
                shown = allowed[self._rows[own]]
                rows.append(self._rows[own][shown])
                worth.append(found[shown])
                got += len(rows[-1])
            done, read = to, int(ends[to - 1])
            share = max(got, 1) / read
        rest = order[done:]
        masses = middle[rest] + (length[rest] * self._spreads[rest]) ** 2 / 2 + np.log(self._sizes[rest])
        unread = np.log((left - got) / (count - read)) if left > got else -np.inf
        log_rest = float(np.logaddexp.reduce(masses, initial=-np.inf) + unread)
        return Near(np.concatenate(rows), np.concatenate(worth), log_rest)

    def _read(self, aim: Aim, cells: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Places of each of the cells, and what the items there are worth."""
        plain, like = np.append(aim.along, np.float32(aim.by)), aim.like if aim.like.any() else None
        for start, size in zip(self._starts[cells].tolist(), self._sizes[cells].tolist(), strict=True):
            own = slice(start, start + size)
            found = self._items[own] @ plain
            if like is not None:
                found += self._items[own, :-1] @ like / np.maximum(self._norms[own], TINY)
            yield own, found

    def _promised(self, aim: Aim) -> tuple[np.ndarray, np.ndarray]:
        """float64 [C] each: what the centre of a cell is worth, and by how much worth changes over a step in the best
        direction."""
        vectors = self._centers[:, :-1]
        middle = vectors @ aim.along + aim.by * self._centers[:, -1] + vectors @ aim.like / self._lengths
        # |along + like / length|², and the bias' part.
        plain = float(aim.along @ aim.along) + (aim.by * self.scale) ** 2
        both, alike = float(aim.along @ aim.like), float(aim.like @ aim.like)
        steps = plain + 2 * both / self._lengths + alike / self._lengths**2
        return middle, np.sqrt(np.maximum(steps, 0.0))

    def spread(self, aim: Aim) -> tuple[float, float]:
        """Mean and standard deviation of worth over all items, of an aim that is a user's or a likeness."""
        if aim.like.any():
            return self._moments[1].along(aim.like)
        return self._moments[0].along(np.append(aim.along, aim.by))


def enough(reads: int, most: int) -> int:
    return max(reads, reads * most // CANDIDATES)


@dataclass(frozen=True)
class Moments:
    """Of rows [N, D], divided by their lengths where these are given."""

    mean: np.ndarray
    """float64 [D]."""
    covariance: np.ndarray
    """float64 [D, D]."""

    @classmethod
    def of(cls, rows: np.ndarray, lengths: np.ndarray | None = None) -> Moments:
        total, squares = np.zeros(rows.shape[1]), np.zeros((rows.shape[1], rows.shape[1]))
        for start in range(0, len(rows), ITEMS_AT_ONCE):
            part = slice(start, start + ITEMS_AT_ONCE)
            block = rows[part].astype(np.float64)
            if lengths is not None:
                block /= np.maximum(lengths[part], TINY)[:, None]
            total += block.sum(0)
            squares += block.T @ block
        mean = total / len(rows)
        return cls(mean, squares / len(rows) - np.outer(mean, mean))

    def along(self, direction: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of the product with it."""
        direction = direction.astype(np.float64)
        variance = float(direction @ self.covariance @ direction)
        return float(self.mean @ direction), max(variance, 0.0) ** 0.5


def divided(vectors: np.ndarray, bias: np.ndarray, scale: float) -> np.ndarray:
    """int32 [N]: the cell of each item, none of them empty. The same for the same items."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    count, random = len(bias), np.random.default_rng(0)
    cells = max(1, min(int(CELLS * count**0.5), count))
    chosen = np.sort(random.choice(count, min(count, LEARNS_FROM * cells), replace=False))

    def scaled(rows: Any) -> np.ndarray:
        return np.column_stack([vectors[rows], bias[rows] / np.float32(scale)])

    means = KMeans(cells, init="random", n_init=1, max_iter=ROUNDS, random_state=0, copy_x=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different items than cells
        means.fit(scaled(chosen))
    parts = [
        means.predict(scaled(slice(start, start + ITEMS_AT_ONCE))) for start in range(0, count, ITEMS_AT_ONCE)
    ]
    return np.unique(np.concatenate(parts), return_inverse=True)[1].astype(np.int32)


def make(
    vectors: np.ndarray, bias: np.ndarray, users: np.ndarray, had: Sequence[np.ndarray], folder: Path
) -> Measured:
    """Write the index of items with vectors [N, W] and biases [N], as good for users [U, W], one or more, who had the items
    `had` int64."""
    scale = max(float(np.sqrt((users.astype(np.float64) ** 2).mean())), 1e-3)
    cells = divided(vectors, bias, scale)
    index = Index(cells, scale, vectors, bias)
    chosen = np.random.default_rng(1).choice(len(bias), min(len(users), len(bias)), replace=False)
    none = np.zeros(0, np.int64)
    asked = [
        [Question(Aim.user(user), out) for user, out in zip(users, had, strict=True)],
        [Question(Aim.alike(vectors[row]), np.append(none, row)) for row in chosen.tolist()],
    ]
    norms = np.linalg.norm(vectors, axis=1)
    exact = [[_exact(one, vectors, bias, norms) for one in group] for group in asked]
    reads, most = min(4 * CANDIDATES, len(bias)), int(max(MOST_READ * len(bias), CANDIDATES))
    while True:
        learned = [
            _recalls(index, group[::2], best[::2], reads)[0].mean()
            for group, best in zip(asked, exact, strict=True)
        ]
        if min(learned) >= WANTED or reads >= most:
            break
        reads = min(int(reads * 2**0.5) + 1, most)
    left = slice(1, None, 2) if min(map(len, asked)) > 1 else slice(None)
    recalls, errors = _recalls(index, asked[0][left], exact[0][left], reads)
    alike, _ = _recalls(index, asked[1][left], exact[1][left], reads)
    measured = Measured(
        len(bias), int(cells.max()) + 1, scale, reads, len(recalls),
        float(recalls.mean()), float(recalls.min()), float(alike.mean()), float(errors.mean()),
    )  # fmt: skip
    save_file({"cells": cells}, folder / FILE)
    storage.write_json(str(folder / TOLD), asdict(measured))
    return measured


@dataclass(frozen=True)
class Question:
    aim: Aim
    out: np.ndarray
    """int64: rows that are not wanted."""


def _exact(
    one: Question, vectors: np.ndarray, bias: np.ndarray, norms: np.ndarray
) -> tuple[np.ndarray, float]:
    """The best CANDIDATES of all, and the log of the sum of exp(worth)."""
    worth = one.aim.worth(vectors, bias, norms)
    worth[one.out] = -np.inf
    size = min(CANDIDATES, len(worth) - len(np.unique(one.out)))
    best = np.argpartition(-worth, size - 1)[:size] if size else np.zeros(0, np.int64)
    return best, log_sum(worth.astype(np.float64))


def _recalls(
    index: Index, asked: Sequence[Question], exact: Sequence[tuple[np.ndarray, float]], reads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shares [U] of the exact best that are found, and how far off the logs of the sums are [U]."""
    found, errors = [], []
    for one, (best, whole) in zip(asked, exact, strict=True):
        allowed = np.ones(len(index), bool)
        allowed[one.out] = False
        near = index.near(one.aim, allowed, enough(reads, CANDIDATES + len(np.unique(one.out))), np.inf)
        assert near is not None
        found.append(np.isin(best, near.rows).mean() if len(best) else 1.0)
        errors.append(abs(near.log_sum() - whole))
    return np.array(found), np.array(errors)


def told(directory: str) -> Measured | None:
    """What was measured of the index of a model directory, which may be a URI; None where there is none. Raises ModelError for
    another format."""
    file = storage.join(directory, TOLD)
    if not storage.exists(file):
        return None
    values = storage.read_json(file)
    if values.get("format") != Measured.format:
        raise ModelError(f"{file} has format {values.get('format')!r}; this version of Whorl reads format 1")
    return Measured(**values)


def read(folder: Path, vectors: np.ndarray, bias: np.ndarray) -> Index:
    """The index of a model directory over its items. Raises ModelError when it is of others."""
    measured, cells = told(str(folder)), load_file(folder / FILE)["cells"]
    if measured is None or len(cells) != len(bias):
        raise ModelError(f"{folder / FILE} is of {len(cells):,} items and not {len(bias):,}; export it again")
    return Index(cells, measured.scale, vectors, bias, measured.reads)
