"""The first rows, in source order, of those that something was done to, for manifests and people."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

# What was done, or why they were left out → position, how the text begins.
Examples = dict[str, list[tuple[int, str]]]
SHOWN_TEXT = 120


def first_of(
    why: dict[str, np.ndarray], positions: np.ndarray, texts: pa.Array, shown: int
) -> dict[str, list[list[Any]]]:
    """Examples of a block, for its counts: of the rows of each mask bool [rows] the first `shown`."""
    found = {}
    for name, mask in why.items():
        if rows := np.flatnonzero(mask)[:shown].tolist():
            found[name] = [[int(positions[row]), (texts[row].as_py() or "")[:SHOWN_TEXT]] for row in rows]
    return found


def join_examples(known: Examples, more: dict[str, list[list[Any]]], shown: int) -> None:
    """Add those of a block, of any place in the source, to `known`."""
    for name, rows in more.items():
        joined = [*known.get(name, []), *((int(position), str(text)) for position, text in rows)]
        known[name] = sorted(joined)[:shown]
