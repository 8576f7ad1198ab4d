"""What is on offer: a catalogue with vectors, to which items come while it is asked, and how an answer is chosen from it.

Shapes: N items, W width.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lib.recommender.index import Aim, Index, Near
from lib.settings import OfferSettings

GROWTH = 1.5
WORD = re.compile(r"\w{4,}")
# Items of the history that are named as a reason, and how alike one must be.
REASONS, ALIKE = 2, 0.1
# How much less an item of the history is a reason for each one that came after it.
FADES = 0.98
# An index is not asked for more than this share of all items, nor where so few times what it would read may be shown: then
# all of those are looked at.
MOST_READ, FEW = 0.25, 2


@dataclass(frozen=True)
class Item:
    """What is known of an item, besides its vector."""

    id: str
    title: str
    text: str = ""
    categories: tuple[str, ...] = ()
    """`COLUMN=value` each."""
    numbers: tuple[float, ...] = ()
    available: bool = True

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Of the title, each once, the shortest left out."""
        return tuple(dict.fromkeys(word.lower() for word in WORD.findall(self.title)))


@dataclass(frozen=True)
class Filters:
    """Items that may be shown: of one of the values of each column that is named, and inside the ranges."""

    categories: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Place among the numbers → least and most."""


@dataclass(frozen=True)
class Pick:
    """An item of an answer."""

    row: int
    score: float
    probability: float
    """Of being what the user turns to next, among all that may be shown."""
    propensity: float
    """How likely it was to be shown at this place, those before it being as they are; 1 without exploration."""


@dataclass(frozen=True)
class Pool:
    """The items from which an answer is chosen; P of them, the best first."""

    rows: np.ndarray
    """int64 [P]."""
    worth: np.ndarray
    """float64 [P]: scores."""
    chances: np.ndarray
    """float64 [P]: how likely each is what the user turns to next; 0 where it was not wanted."""

    def reordered(self, worth: np.ndarray, coverage: float) -> Pool:
        """By other scores [P], whose softmax, times `coverage`, is how likely each is."""
        order = np.argsort(-worth, kind="stable")
        weights = np.exp(worth[order] - worth.max(initial=-np.inf))
        return Pool(self.rows[order], worth[order], coverage * weights / max(weights.sum(), 1e-300))


class Shelf:
    """Rows are never taken away: what is not on offer any more is not available. One thread may `put` while others ask:
    they see an item when all of it is there.

    With an `index` of the items that it begins with, the best are looked for there, and among those that came or changed
    since."""

    def __init__(
        self, items: Sequence[Item], vectors: np.ndarray, bias: np.ndarray, index: Index | None = None
    ) -> None:
        self.items: list[Item] = []
        self.row: dict[str, int] = {}
        """Id → row."""
        self._vectors, self._bias = vectors[:0].copy(), bias[:0].copy()
        self._norms = np.zeros(0, np.float32)
        self._available = np.zeros(0, bool)
        self._rows_of: dict[str, list[int]] = {}
        # The same, as they are asked for.
        self._asked: dict[str, np.ndarray] = {}
        self._numbers = np.zeros((0, max((len(i.numbers) for i in items), default=0)), np.float32)
        self._changing = threading.Lock()
        self.index: Index | None = None
        self.put(items, vectors, bias)
        self.index = index
        # Rows that the index has otherwise, and the others of its rows.
        self._changed, self._same = np.zeros(0, np.int64), np.ones(0 if index is None else len(index), bool)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def vectors(self) -> np.ndarray:
        """float32 [N, W]."""
        return self._vectors[: len(self.items)]

    @property
    def bias(self) -> np.ndarray:
        """float32 [N]."""
        return self._bias[: len(self.items)]

    def put(self, items: Sequence[Item], vectors: np.ndarray, bias: np.ndarray) -> None:
        """Add items, or replace those with the same id."""
        with self._changing:
            new = sum(item.id not in self.row for item in {item.id: item for item in items}.values())
            self._grow(len(self.items) + new)
            norms = np.linalg.norm(vectors, axis=1)
            for item, vector, one, norm in zip(items, vectors, bias, norms, strict=True):
                row = self.row.get(item.id, len(self.items))
                if self.index is not None and row < len(self.index):
                    self._differs(row, vector, one)
                self._vectors[row], self._bias[row], self._norms[row] = vector, one, norm
                self._numbers[row, : len(item.numbers)] = item.numbers[: self._numbers.shape[1]]
                self._available[row] = item.available
                known = set(self.items[row].categories) if row < len(self.items) else set()
                for name in known - set(item.categories):
                    self._rows_of[name] = [r for r in self._rows_of[name] if r != row]
                for name in set(item.categories) - known:
                    self._rows_of.setdefault(name, []).append(row)
                for name in known ^ set(item.categories):
                    self._asked.pop(name, None)
                if row == len(self.items):
                    self.items.append(item)
                else:
                    self.items[row] = item
                self.row[item.id] = row

    def _differs(self, row: int, vector: np.ndarray, one: float) -> None:
        """Take note of what a row of the index becomes."""
        same = self._bias[row] == one and np.array_equal(self._vectors[row], vector)
        if self._same[row] and not same:
            self._changed = np.append(self._changed, row)
            self._same[row] = False

    def _grow(self, size: int) -> None:
        if size <= len(self._bias):
            return
        room = max(size, int(len(self._bias) * GROWTH))
        for name in ("_vectors", "_bias", "_norms", "_available", "_numbers"):
            old = getattr(self, name)
            larger = np.zeros((room, *old.shape[1:]), old.dtype)
            larger[: len(old)] = old
            setattr(self, name, larger)

    def scores(self, users: np.ndarray) -> np.ndarray:
        """float32 [B, N] for users [B, W]."""
        count = len(self.items)
        return np.asarray(users @ self._vectors[:count].T + self._bias[:count])

    def allowed(self, filters: Filters, out: Iterable[int], count: int) -> np.ndarray:
        """bool [count]: the first `count` items, but for those that are not available, filtered, or `out`."""
        found = self._available[:count].copy()
        for column, values in filters.categories.items():
            inside = np.zeros(count, bool)
            for value in values:
                rows = self._having(f"{column}={value}")
                inside[rows[rows < count]] = True
            found &= inside
        for place, (least, most) in filters.numbers.items():
            own = self._numbers[:count, place]
            found &= (own >= least) & (own <= most)
        rows = np.fromiter(out, np.int64)
        found[rows[rows < count]] = False
        return found

    def _having(self, name: str) -> np.ndarray:
        """int64: rows of a category."""
        found = self._asked.get(name)
        if found is None:
            with self._changing:
                found = np.array(self._rows_of.get(name, []), np.int64)
                if len(found):  # not whatever clients ask for
                    self._asked[name] = found
        return found

    def pool(self, scores: np.ndarray, allowed: np.ndarray, most: int, chances: bool = True) -> Pool:
        """The best `most` of those `allowed`, by scores [N] whose softmax over these is how likely each is."""
        own = np.where(allowed, scores, -np.inf)
        size = min(int(allowed.sum()), most)
        best = np.argpartition(-own, size - 1)[:size] if size else np.zeros(0, np.int64)
        best = best[np.argsort(-own[best], kind="stable")]
        worth = own[best].astype(np.float64)
        if not size or not chances:
            return Pool(best, worth, np.zeros(size))
        weights = np.exp(own - worth[0].astype(own.dtype))
        return Pool(best, worth, weights[best] / float(weights.sum()))

    def near(
        self, user: np.ndarray, allowed: np.ndarray, most: int, had: int = 0, chances: bool = True
    ) -> Pool:
        """As `pool` of the scores of a user [W], found by the index: some of the best may be missing, and what the softmax
        divides by is exact for what was read and estimated for the rest (`lib.recommender.index.Near`). `had` is how many
        items are not `allowed` because the user had them, which stand among the best."""
        found = self._candidates(Aim.user(user), allowed, most + had)
        best = _best(found.worth, most)
        own = found.worth[best].astype(np.float64)
        if not len(best) or not chances:
            return Pool(found.rows[best], own, np.zeros(len(best)))
        return Pool(found.rows[best], own, np.exp(own - found.log_sum()))

    def best(self, aim: Aim, allowed: np.ndarray, most: int, had: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The rows [P] that are worth most, at most `most` of those `allowed`, the best first; and what they are worth. `had`
        as `near` has it."""
        found = self._candidates(aim, allowed, most + had)
        best = _best(found.worth, most)
        return found.rows[best], found.worth[best]

    def _candidates(self, aim: Aim, allowed: np.ndarray, most: int) -> Near:
        """Those of `allowed` among which the best `most` are: what the index says, and what came or changed since; all, where
        there is no index or it would not be quicker."""
        if self.index is not None:
            changed, inside = self._changed, len(self.index)
            enough = self.index.enough(most)
            listed = allowed[:inside] & self._same if len(changed) else allowed[:inside]
            if np.count_nonzero(listed) > FEW * enough:
                near = self.index.near(aim, listed, enough, MOST_READ * inside)
                if near is not None:
                    fresh = np.concatenate([changed, np.arange(inside, len(allowed))])
                    fresh = fresh[allowed[fresh]]
                    worth = np.concatenate([near.worth, self._worth(aim, fresh)])
                    return Near(np.concatenate([near.rows, fresh]), worth, near.log_rest)
        rows = np.flatnonzero(allowed)
        # Copied out they are read at random, which costs more than to read all.
        if 2 * len(rows) > len(allowed):
            return Near(rows, self._worth(aim, slice(len(allowed)))[rows], -np.inf)
        return Near(rows, self._worth(aim, rows), -np.inf)

    def _worth(self, aim: Aim, rows: np.ndarray | slice) -> np.ndarray:
        return aim.worth(self._vectors[rows], self._bias[rows], self._norms[rows])

    def pick(
        self, pool: Pool, k: int, rules: OfferSettings, diversity: float, random: np.random.Generator
    ) -> list[Pick]:
        """At most `k` items; fewer where the pool has no more or the caps leave none."""
        if not len(pool.rows):
            return []
        size, worth = len(pool.rows), pool.worth
        span = worth[0] - worth[-1]
        relevance = (worth - worth[-1]) / span if span > 0 else np.ones(size)
        vectors = self._vectors[pool.rows]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        nearest, left = np.full(size, -1.0), np.ones(size, bool)
        counts: dict[str, int] = {}
        picks: list[Pick] = []
        while len(picks) < k:
            free = np.flatnonzero(left)
            if not len(free):
                break
            value = relevance
            if diversity and picks:
                value = (1 - diversity) * relevance - diversity * nearest
            chosen = greedy = int(free[np.argmax(value[free])])
            if rules.explore and random.random() < rules.explore:
                chosen = int(random.choice(free))
            propensity = rules.explore / len(free) + (1 - rules.explore) * (chosen == greedy)
            row = int(pool.rows[chosen])
            picks.append(Pick(row, float(worth[chosen]), float(pool.chances[chosen]), float(propensity)))
            left[chosen] = False
            if diversity:
                nearest = np.maximum(nearest, vectors @ vectors[chosen])
            if rules.caps:
                self._close(pool.rows, left, row, rules.caps, counts)
        return picks

    def _close(
        self, pool: np.ndarray, left: np.ndarray, row: int, caps: dict[str, int], counts: dict[str, int]
    ) -> None:
        """Take what a cap forbids from now on out of the pool."""
        for name in self.items[row].categories:
            cap = caps.get(name.partition("=")[0])
            counts[name] = counts.get(name, 0) + 1
            if cap is not None and counts[name] >= cap:
                left &= np.array([name not in self.items[r].categories for r in pool.tolist()])

    def similar(self, row: int, k: int, allowed: np.ndarray) -> list[tuple[int, float]]:
        """Rows of the items most like that of `row` among those allowed, and the cosine of their vectors."""
        others = allowed.copy()
        others[row] = False
        rows, cosines = self.best(Aim.alike(self._vectors[row]), others, k)
        return list(zip(rows.tolist(), cosines.tolist(), strict=True))

    def search(
        self, meaning: np.ndarray, user: np.ndarray, taste: float, allowed: np.ndarray, k: int, had: int = 0
    ) -> list[tuple[int, float, float]]:
        """Rows by the cosine to `meaning` [W] and by a user's scores, each standardised over all items; their worth, of which
        `taste` is the user's part, and their cosines. `had` as `near` has it."""
        words, drawn = Aim.alike(meaning), Aim.user(user)
        (usual, spread), (own, own_spread) = (self._spread(aim, len(allowed)) for aim in (words, drawn))
        both = drawn.blended(taste / own_spread, words, (1 - taste) / spread)
        rows, worth = self.best(both, allowed, k, had)
        worth = worth - (taste * own / own_spread + (1 - taste) * usual / spread)
        return list(zip(rows.tolist(), worth.tolist(), self._worth(words, rows).tolist(), strict=True))

    def _spread(self, aim: Aim, count: int) -> tuple[float, float]:
        """Mean and standard deviation of what all items are worth; the index tells it of those that it has."""
        if self.index is not None:
            mean, spread = self.index.spread(aim)
        else:
            worth = self._worth(aim, slice(count))
            mean, spread = float(worth.mean()), float(worth.std())
        return mean, max(spread, 1e-9)

    def reasons(self, rows: Sequence[int], history: Sequence[int]) -> list[tuple[list[int], list[str]]]:
        """For each of the rows: those of the history whose items are most like its item, the latest counting most; and
        the words and values that it has in common with them."""
        if not history or not rows:
            return [([], []) for _ in rows]
        had = list(dict.fromkeys(reversed(history)))
        own, others = self._vectors[list(rows)], self._vectors[had]
        norms = np.linalg.norm(own, axis=1)[:, None] * np.linalg.norm(others, axis=1)
        cosines = own @ others.T / np.maximum(norms, 1e-12)
        order = np.argsort(-cosines * FADES ** np.arange(len(had)), kind="stable", axis=1)[:, :REASONS]
        found = []
        for row, best, alike in zip(rows, order.tolist(), cosines, strict=True):
            because = [had[i] for i in best if alike[i] > ALIKE]
            said = {name for r in because for name in self._said(r)}
            common = [name.partition("=")[2] or name for name in self._said(row) if name in said]
            found.append((because, list(dict.fromkeys(common))))
        return found

    def _said(self, row: int) -> list[str]:
        """Categories, and words of the title, which have no `=`."""
        item = self.items[row]
        return [*item.categories, *item.words]


def _best(worth: np.ndarray, most: int) -> np.ndarray:
    """Places of the `most` highest, the highest first."""
    size = min(len(worth), most)
    best = np.argpartition(-worth, size - 1)[:size] if size else np.zeros(0, np.int64)
    return np.asarray(best[np.argsort(-worth[best], kind="stable")])
