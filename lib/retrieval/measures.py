"""How good a ranking is, where what is relevant is known."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence, Set


def recall(ranking: Sequence[Hashable], relevant: Set[Hashable], k: int) -> float:
    """Share of what is relevant among the first `k`, of the most that can be there: 1 / 1 for one of two at k = 1."""
    return sum(one in relevant for one in ranking[:k]) / min(len(relevant), k)


def ndcg(ranking: Sequence[Hashable], relevant: Set[Hashable], k: int) -> float:
    """Normalised discounted cumulative gain of the first `k`, with gains 0 and 1 (Järvelin and Kekäläinen 2002)."""
    gains = sum(1 / math.log2(rank + 1) for rank, one in enumerate(ranking[:k], 1) if one in relevant)
    return gains / sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), k) + 1))
