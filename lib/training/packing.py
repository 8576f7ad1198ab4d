"""Whole rows into sequences of the model's length, with as little room left as can be.

Best-fit decreasing is within 11/9 of the fewest packs (Johnson et al. 1974) and nearly always at them. It is not
where all rows are about as long: of rows of 47 to 56 tokens, 18 of the longest leave 16 of 1,024 tokens empty, and
so does pack after pack. Where it needs more packs than the tokens alone, each pack is therefore filled exactly.
"""

from __future__ import annotations

import bisect
from collections import Counter

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def pack(lengths: NDArray[np.int32], context: int) -> list[Indices]:
    """Row indices in packs of at most `context` tokens: the better of `best_fit` and `exact_fit`.

    A single row above `context` is a pack of its own.
    """
    packs = best_fit(lengths, context)
    if len(packs) > -(-int(lengths.sum()) // context):
        exact = exact_fit(lengths, context)
        if len(exact) < len(packs):
            return exact
    return packs


def exact_fit(lengths: NDArray[np.int32], context: int) -> list[Indices]:
    """Each pack begins with the longest row that is left and is filled up with the rows that leave the least room
    (minimum bin slack, Gupta and Ho 1999; here by dynamic programming over the lengths that there are)."""
    rows: dict[int, list[int]] = {}
    for row in np.argsort(-lengths, kind="stable")[::-1].tolist():
        rows.setdefault(int(lengths[row]), []).append(row)
    left = Counter({length: len(of) for length, of in sorted(rows.items(), reverse=True)})
    packs = []
    while left:
        longest = next(iter(left))
        chosen = Counter({longest: 1}) + _fullest(left - Counter({longest: 1}), context - longest)
        packs.append(np.array([rows[length].pop() for length in chosen.elements()], np.int64))
        left -= chosen  # keeps its order, from long to short
    return packs


def _fullest(left: Counter[int], room: int) -> Counter[int]:
    """How many rows of each length fill `room` the furthest, of those that are `left`."""
    kinds = [length for length in left if length <= room]
    # Bit n of `reached[i]`: rows of the first i kinds can fill exactly n tokens.
    reached, within = [1], (1 << (max(room, 0) + 1)) - 1
    for length in kinds:
        sums, more, step = reached[-1], min(left[length], room // length), 1
        while more:  # 1, 2, 4, … rows at a time make every number of them
            step = min(step, more)
            sums |= (sums << (length * step)) & within
            more, step = more - step, step * 2
        reached.append(sums)
    filled, chosen = reached[-1].bit_length() - 1, Counter[int]()
    for length, before in zip(reversed(kinds), reversed(reached[:-1]), strict=True):
        while not before >> filled & 1:
            filled -= length
            chosen[length] += 1
    return chosen


def best_fit(lengths: NDArray[np.int32], context: int) -> list[Indices]:
    """Row indices in packs of at most `context` tokens, by best-fit decreasing (Johnson et al. 1974): from the
    longest row to the shortest, each into the fullest pack that still has room for it.

    A single row above `context` is a pack of its own.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room and number of each pack that has any, sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        place = bisect.bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
            packs[number].append(row)
        else:
            room, number = context, len(packs)
            packs.append([row])
        if room > length:
            bisect.insort(rooms, (room - length, number))
    return [np.array(rows, np.int64) for rows in packs]


def batches_of(packs: int, budget: int, context: int) -> int:
    """How many micro-batches of `budget` tokens so many packs make; one holds at least one pack."""
    return -(-packs // max(1, budget // context))


def deal(packs: list[Indices], count: int) -> list[list[Indices]]:
    """The packs in exactly `count` micro-batches, alike in number, in the given order.

    With fewer packs than that, the fullest are halved first, so that each has one; there must be as many rows.
    """
    packs = list(packs)
    while len(packs) < count:
        most = max(range(len(packs)), key=lambda i: len(packs[i]))
        half = (len(packs[most]) + 1) // 2
        packs[most : most + 1] = [packs[most][:half], packs[most][half:]]
    return [packs[i * len(packs) // count : (i + 1) * len(packs) // count] for i in range(count)]
