"""Who did what with which item, and when: what counts, and what is held out without a leak.

Interactions are columns of numbers, 22 bytes each, and lie in one process: a hundred million take 2 GiB.
Of the rows of a source (their texts) none is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lib.artifacts import SPLITS
from lib.data.splitting.split import kept
from lib.settings import DataSettings, InteractionSettings


@dataclass(frozen=True)
class Interactions:
    """M interactions, of each user together and in the order in which they happened."""

    user: np.ndarray
    """int32 [M]: number of the user, from 0 without gaps."""
    item: np.ndarray
    """int32 [M]: number of the item in the catalogue."""
    time: np.ndarray
    """int64 [M]: seconds since 1970."""
    weight: np.ndarray
    """float32 [M]: how much it counts."""
    event: np.ndarray
    """int16 [M]: what was done, as a number of `events`."""

    @classmethod
    def none(cls) -> Interactions:
        return cls(
            np.zeros(0, np.int32),
            np.zeros(0, np.int32),
            np.zeros(0, np.int64),
            np.zeros(0, np.float32),
            np.zeros(0, np.int16),
        )

    def __len__(self) -> int:
        return len(self.user)

    def where(self, chosen: np.ndarray) -> Interactions:
        """Those of a bool [M] or in the order of an int [N]."""
        return Interactions(
            self.user[chosen], self.item[chosen], self.time[chosen], self.weight[chosen], self.event[chosen]
        )


def events(rules: InteractionSettings) -> list[str]:
    """What an interaction may be; all are one where `weights` names none."""
    return list(rules.weights) or [""]


def in_order(interactions: Interactions) -> Interactions:
    """By user and time; what happened in the same second stays in the order of the source."""
    return interactions.where(np.lexsort((interactions.time, interactions.user)))


def core(user: np.ndarray, item: np.ndarray, least_per_user: int, least_per_item: int) -> np.ndarray:
    """Bool [M]: what is left when users and items with too few interactions go, until none has too few."""
    left = np.ones(len(user), bool)
    if not len(user):
        return left
    while True:
        users = np.bincount(user[left], minlength=int(user.max()) + 1)
        items = np.bincount(item[left], minlength=int(item.max()) + 1)
        fewer = left & (users[user] >= least_per_user) & (items[item] >= least_per_item)
        if fewer.sum() == left.sum():
            return left
        left = fewer


@dataclass(frozen=True)
class Sequences:
    """What one split holds: of each row, a stretch of a user's interactions, the last of which are to be foreseen."""

    rows: list[np.ndarray]
    """Indices of interactions, int64, in order."""
    targets: np.ndarray
    """int32 [rows]: how many of the last are to be foreseen from those before them; in training all but the first."""
    fresh: np.ndarray
    """bool [rows]: the targets are items that training never saw."""


def divide(
    interactions: Interactions, data: DataSettings, user_hash: np.ndarray, item_hash: np.ndarray
) -> dict[str, Sequences]:
    """Split → its sequences. Interactions are in order; hashes uint64 are of the users' and the items' own names, so
    that who and what is held out does not depend on the order of the source.

    What is to be foreseen in validation is not in training, and what is to be foreseen in test in neither; the history
    before it is what was known at that moment. (With `refit` training has that of validation too.) Items held out (`new_items`) are in no history: they are targets of
    rows of their own, in test.
    """
    rules = data.interactions
    seed = data.split.seed
    is_new_item = kept(item_hash, np.full(len(item_hash), rules.new_items), seed)[interactions.item]
    is_new_user = kept(user_hash, np.full(len(user_hash), rules.new_users), seed + 1)
    known = np.flatnonzero(~is_new_item)
    place = _places(interactions.where(known), rules, data)
    found: dict[str, list[tuple[np.ndarray, int, bool]]] = {name: [] for name in SPLITS}
    starts = np.searchsorted(interactions.user[known], np.arange(len(user_hash) + 1))
    for user, (start, end) in enumerate(pairwise(starts.tolist())):
        of, places = known[start:end], place[start:end]
        counts = [int((places == number).sum()) for number in range(len(SPLITS))]
        learned = counts[0] + counts[1] if rules.refit else counts[0]
        if learned and not is_new_user[user]:
            found["train"].append((of[:learned], learned - 1, False))
        end = counts[0]
        for split, count in zip(SPLITS[1:], counts[1:], strict=True):
            if count:
                found[split].append((of[: end + count], count, False))
            end += count
    for row in _fresh(interactions, is_new_item):
        found["test"].append(row)
    return {split: _sequences(rows) for split, rows in found.items()}


def _places(interactions: Interactions, rules: InteractionSettings, data: DataSettings) -> np.ndarray:
    """int8 [M]: the split in which each interaction is to be foreseen."""
    place = np.zeros(len(interactions), np.int8)
    if rules.split == "time":
        shares = [data.split.train, data.split.train + data.split.validation]
        ordered = np.sort(interactions.time)
        for number, share in enumerate(shares, 1):
            if share < 1 and len(ordered):
                last = max(int(share * len(ordered)) - 1, 0)
                place[interactions.time > ordered[last]] = number
        return place
    from_end = _from_end(interactions.user)
    enough = np.bincount(interactions.user)[interactions.user] >= len(SPLITS) if len(place) else place > 0
    place[enough & (from_end == 1)] = SPLITS.index("validation")
    place[enough & (from_end == 0)] = SPLITS.index("test")
    return place


def _from_end(user: np.ndarray) -> np.ndarray:
    """int64 [M]: how many interactions of the same user come later."""
    ends = np.searchsorted(user, user, side="right")
    return ends - 1 - np.arange(len(user))


def _fresh(interactions: Interactions, is_new: np.ndarray) -> list[tuple[np.ndarray, int, bool]]:
    """A row for each interaction with a held-out item: what its user had done before, and it."""
    rows = []
    for index in np.flatnonzero(is_new):
        start = np.searchsorted(interactions.user, interactions.user[index])
        before = np.arange(start, index)
        rows.append((np.append(before[~is_new[before]], index), 1, True))
    return rows


def _sequences(rows: list[tuple[np.ndarray, int, bool]]) -> Sequences:
    return Sequences(
        [row for row, _, _ in rows],
        np.array([targets for _, targets, _ in rows], np.int32),
        np.array([fresh for _, _, fresh in rows], bool),
    )
