"""What training tells of an item besides its vector: what follows it, what is taken with it, how often and when it was
taken, what its text and categories are. From it come the features by which the ranker orders candidates.

Nothing here is learned by gradients. Items are rows of the catalogue; those from N on came later, and of them only text
and categories are known.

Shapes: N items, P candidates, L interactions of a history, D the encoder's width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array

from lib.recommender.neighbours import ASKED, TOGETHER_FADES, Neighbours, together
from lib.recommender.rivals import RECENCY, Transitions

FILE, TEXTS = "signals.safetensors", "texts.npy"
# How much less an item of the history counts for each one that came after it, of its text and its categories.
TEXT_FADES, CATEGORY_FADES = 0.9, 0.95
# Arrays of the signals that are written as they are.
PLAIN = ("seen", "lately", "first", "shares", "codes", "starts", "numbers")
DAY = 86_400
# What is lately: 30 days, in seconds.
LATELY = 30 * DAY
# Of everybody's tastes in categories among a user's.
PRIOR = 0.2
OF_ITEMS = ("score", "transitions", "together", "text", "popularity", "lately", "trend", "age", "affinity")
OF_USERS = ("history", "hour_sin", "hour_cos")


def names(item_numbers: Sequence[str], user_numbers: Sequence[str]) -> list[str]:
    """Of the features, in their order; those of users tell something where they meet those of items."""
    return [*OF_ITEMS, *(f"item.{n}" for n in item_numbers), *OF_USERS, *(f"user.{n}" for n in user_numbers)]


class Timeline:
    """When items were taken in training."""

    def __init__(self, items: np.ndarray, times: np.ndarray) -> None:
        self._begin = int(times.min(initial=0))
        self.end = int(times.max(initial=0))
        self._width = self.end - self._begin + LATELY + 2
        self._keys = np.sort(items.astype(np.int64) * self._width + (times - self._begin))

    def before(self, items: np.ndarray, time: int) -> np.ndarray:
        """How often each of the items was taken before a time, int64 as many."""
        at = int(np.clip(time - self._begin, 0, self._width - 1))
        return np.searchsorted(self._keys, items * self._width + at) - np.searchsorted(
            self._keys, items * self._width
        )

    def first(self, items: np.ndarray) -> np.ndarray:
        """When each was first taken, int64; the end of the timeline where none was."""
        at = np.minimum(np.searchsorted(self._keys, items * self._width), max(len(self._keys) - 1, 0))
        key = self._keys[at] if len(self._keys) else np.full(len(items), -1)
        return np.where(key // self._width == items, key % self._width + self._begin, self.end)


@dataclass(frozen=True)
class Told:
    """Text, categories and numbers of an item that came, or changed, after training."""

    text: np.ndarray | None
    """float32 [D], of length 1."""
    categories: np.ndarray
    """int64: numbers of the model's categories."""
    numbers: np.ndarray
    """float32, standardised."""


@dataclass(frozen=True)
class Signals:
    follows: Neighbours
    together: Neighbours
    end: int
    """Time of training's last interaction. What is asked later is asked as if then: what happened since is not known."""
    texts: np.ndarray | None
    """float16 [N, D]: the encoder's vectors, of length 1."""
    seen: np.ndarray
    """float32 [N]: how often training saw an item."""
    lately: np.ndarray
    """float32 [N]: how often in the last 30 days of training."""
    first: np.ndarray
    """int64 [N]: when first, in seconds since 1970."""
    shares: np.ndarray
    """float32 [G]: of all that was taken in training, how much is of each category."""
    codes: np.ndarray
    """int64: categories of the N items, those of one behind those of another."""
    starts: np.ndarray
    """int64 [N + 1]."""
    numbers: np.ndarray
    """float32 [N, columns of numbers], standardised."""
    told: dict[int, Told] = field(default_factory=dict)
    """Row → what came or changed since."""

    @classmethod
    def of(
        cls,
        sequences: Sequence[np.ndarray],
        times: Sequence[np.ndarray],
        items: int,
        categories: tuple[np.ndarray, np.ndarray, int],
        numbers: np.ndarray,
        texts: np.ndarray | None,
    ) -> tuple[Signals, Timeline]:
        """Of training's sequences of items, with their times; `categories` are codes, where each item's begin, and how many
        there are."""
        taken, when = (np.concatenate(rows) if rows else np.zeros(0, np.int64) for rows in (sequences, times))
        timeline, every = Timeline(taken, when), np.arange(items)
        codes, begins, groups = categories
        starts = np.append(begins, len(codes)).astype(np.int64)
        seen = np.bincount(taken, minlength=items).astype(np.float32)
        per_code = np.repeat(seen / np.maximum(np.diff(starts), 1), np.diff(starts))
        shares = np.bincount(codes, per_code, minlength=groups) / max(float(seen.sum()), 1)
        lately = timeline.before(every, timeline.end + 1) - timeline.before(every, timeline.end - LATELY)
        signals = cls(
            Neighbours.of(Transitions.fit(sequences, items).follows, RECENCY),
            Neighbours.of(together(sequences, items), TOGETHER_FADES),
            timeline.end,
            None if texts is None else texts.astype(np.float16),
            seen,
            lately.astype(np.float32),
            timeline.first(every),
            shares.astype(np.float32),
            codes,
            starts,
            numbers.astype(np.float32),
        )
        return signals, timeline

    def features(
        self,
        history: np.ndarray,
        time: int,
        candidates: np.ndarray,
        scores: np.ndarray,
        about: np.ndarray,
        timeline: Timeline | None = None,
    ) -> np.ndarray:
        """float32 [P, F], columns as `names` has them, of candidates int64 [P], of which none is there twice, with their
        retrieval scores [P], for a history int64 [L], a time and a user's numbers. Those of items are standardised over the
        candidates.

        With a `timeline` what was taken lately is what it was at that time; without, at the end of training.
        """
        time = min(int(time), self.end)
        seen, lately, first = self._counts(candidates, time, timeline)
        columns = {
            "score": scores,
            "transitions": np.log(self.follows.near(history, candidates) + 1e-4),
            "together": self.together.near(history, candidates),
            "text": self._alike(history, candidates),
            "popularity": np.log1p(seen),
            "lately": np.log1p(lately),
            "trend": np.log1p(lately) - np.log1p(seen),
            "age": np.log1p(np.maximum(time - first, 0) / DAY),
            "affinity": self._affinity(history, candidates),
        }
        found = np.stack([np.asarray(columns[name], np.float64) for name in OF_ITEMS], 1)
        found = np.hstack([found, self._numbers_of(candidates)])
        found = (found - found.mean(0)) / (found.std(0) + 1e-9)
        angle = 2 * np.pi * (time % DAY) / DAY
        of_user = np.concatenate([[np.log1p(len(history)) / 4, np.sin(angle), np.cos(angle)], about])
        return np.hstack([found, np.broadcast_to(of_user, (len(found), len(of_user)))]).astype(np.float32)

    def _counts(
        self, candidates: np.ndarray, time: int, timeline: Timeline | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inside = candidates < len(self.seen)
        known = candidates[inside]
        seen, lately = np.zeros(len(candidates)), np.zeros(len(candidates))
        first = np.full(len(candidates), self.end, np.int64)
        seen[inside], first[inside] = self.seen[known], self.first[known]
        if timeline is None:
            lately[inside] = self.lately[known]
        else:
            lately[inside] = timeline.before(known, time) - timeline.before(known, time - LATELY)
        return seen, lately, first

    def _numbers_of(self, rows: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows), self.numbers.shape[1]))
        inside = rows < len(self.numbers)
        found[inside] = self.numbers[rows[inside]]
        if self.told:
            for place, row in enumerate(rows.tolist()):
                if row in self.told:
                    found[place] = self.told[row].numbers
        return found

    def _text_of(self, rows: np.ndarray) -> np.ndarray:
        """float32 [rows, D]; 0 where nothing is known."""
        assert self.texts is not None
        found = np.zeros((len(rows), self.texts.shape[1]), np.float32)
        inside = rows < len(self.texts)
        found[inside] = self.texts[rows[inside]]
        if self.told:
            for place, row in enumerate(rows.tolist()):
                told = self.told.get(row)
                if told is not None and told.text is not None:
                    found[place] = told.text
        return found

    def _alike(self, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Cosine of the candidates' texts and what the history's have in common."""
        if self.texts is None or not len(history):
            return np.zeros(len(candidates))
        latest = history[-ASKED:]
        weights = TEXT_FADES ** np.arange(len(latest) - 1, -1, -1)
        profile = weights @ self._text_of(latest)
        return np.asarray(self._text_of(candidates) @ profile / max(float(np.linalg.norm(profile)), 1e-9))

    def _codes_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Categories of items, those of one behind those of another, and for each the place of its item in `rows`."""
        inside = np.flatnonzero(rows < len(self.starts) - 1)
        if self.told:
            inside = np.array([i for i in inside.tolist() if int(rows[i]) not in self.told], np.int64)
        begins, ends = self.starts[rows[inside]], self.starts[rows[inside] + 1]
        sizes = ends - begins
        places = np.arange(int(sizes.sum())) + np.repeat(begins - np.cumsum(sizes) + sizes, sizes)
        codes, of = [self.codes[places]], [np.repeat(inside, sizes)]
        for place, row in enumerate(rows.tolist() if self.told else ()):
            if row in self.told:
                codes.append(self.told[row].categories)
                of.append(np.full(len(codes[-1]), place))
        return np.concatenate(codes), np.concatenate(of)

    def _affinity(self, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """How much more than everybody a user turns to an item's categories: the mean of the logs of the ratios."""
        if not len(self.shares) or not len(history):
            return np.zeros(len(candidates))
        latest = history[-ASKED:]
        weights = CATEGORY_FADES ** np.arange(len(latest) - 1, -1, -1)
        codes, of = self._codes_of(latest)
        counts = np.bincount(of, minlength=len(latest))
        tastes = np.bincount(codes, (weights / weights.sum() / np.maximum(counts, 1))[of], len(self.shares))
        ratios = np.log((tastes + PRIOR * self.shares + 1e-6) / (self.shares + 1e-6))
        codes, of = self._codes_of(candidates)
        counts = np.bincount(of, minlength=len(candidates))
        return np.asarray(np.bincount(of, ratios[codes], len(candidates)) / np.maximum(counts, 1))

    def over(self, place: np.ndarray, told: dict[int, Told]) -> Signals:
        """The same of another catalogue: row i of it is row `place` [i] of this one, or none below 0; `told` says what is known
        of those."""
        known = np.flatnonzero(place >= 0)
        moved = csr_array(
            (np.ones(len(known), np.float32), (known, place[known])), shape=(len(place), len(self.seen))
        )

        def again(near: Neighbours) -> Neighbours:
            return Neighbours.of(csr_array(moved @ near.matrix @ moved.T), near.fades)

        def taken(values: np.ndarray, otherwise: float) -> np.ndarray:
            found = np.full((len(place), *values.shape[1:]), otherwise, values.dtype)
            found[known] = values[place[known]]
            return found

        own = [self.codes[self.starts[p] : self.starts[p + 1]] if p >= 0 else self.codes[:0] for p in place]
        return replace(
            self,
            follows=again(self.follows),
            together=again(self.together),
            seen=taken(self.seen, 0),
            lately=taken(self.lately, 0),
            first=taken(self.first, self.end),
            codes=np.concatenate([*own, self.codes[:0]]),
            starts=np.cumsum([0, *map(len, own)]).astype(np.int64),
            numbers=taken(self.numbers, 0),
            texts=None if self.texts is None else taken(self.texts, 0),
            told=told,
        )

    def write(self, folder: Path) -> None:
        tensors: dict[str, np.ndarray] = {name: getattr(self, name) for name in PLAIN}
        for name in ("follows", "together"):
            near: Neighbours = getattr(self, name)
            tensors |= {f"{name}.{part}": getattr(near, part) for part in ("starts", "items", "values")}
            tensors[f"{name}.fades"] = np.array([near.fades], np.float64)
        tensors["end"] = np.array([self.end], np.int64)
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / FILE)
        if self.texts is not None:
            np.save(folder / TEXTS, self.texts, allow_pickle=False)

    @classmethod
    def read(cls, folder: Path) -> Signals:
        """The texts' vectors stay on the disk where the system does not keep them."""
        found = load_file(folder / FILE)
        texts = (
            np.load(folder / TEXTS, mmap_mode="r", allow_pickle=False) if (folder / TEXTS).exists() else None
        )

        def near(name: str) -> Neighbours:
            starts, items, values, fades = (
                found[f"{name}.{part}"] for part in ("starts", "items", "values", "fades")
            )
            return Neighbours(starts, items, values, float(fades[0]))

        plain: Any = {name: found[name] for name in PLAIN}
        return cls(near("follows"), near("together"), int(found["end"][0]), texts, **plain)
