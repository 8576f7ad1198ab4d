"""Which documents are one story: near duplicates of a text, told by MinHash and bands of its hashes.

A text is the set of its runs of SHINGLE words, in lower case and without punctuation. Two sets of Jaccard similarity J
agree in one of BANDS bands of ROWS hashes with probability 1 - (1 - J^7)^10: 0.998 at 0.9, 0.91 at 0.8, 0.08 at
0.5, under 0.001 at 0.25 (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3). A
text of fewer than MIN_WORDS words is what many say in the same words, and no copy of another.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any

import numpy as np

from lib.text import normalise

SHINGLE = 3
MIN_WORDS = 8
BANDS, ROWS = 10, 7
_WORD = re.compile(r"\w+")


def bands(entity: str, texts: list[str]) -> list[list[str]]:
    """The bands of each text about `entity`, 32 hex digits each; none of a text that is too short to be a copy."""
    import pyarrow as pa

    return [_bands(entity, text) for text in normalise(pa.array(texts, pa.string())).to_pylist()]


def _bands(entity: str, text: str) -> list[str]:
    words = _WORD.findall(text.casefold())
    if len(words) < MIN_WORDS:
        return []
    shingles = {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
    sketch = _empty().copy()
    sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
    hashes = np.asarray(sketch.hashvalues, ">u4").reshape(BANDS, ROWS)
    about = entity.encode()
    return [
        hashlib.blake2b(row.tobytes() + bytes([band]) + about, digest_size=16).hexdigest()
        for band, row in enumerate(hashes)
    ]


@functools.cache
def _empty() -> Any:
    from datasketch import MinHash  # imports scipy, which takes a second

    # Said in full: bands are kept, and have to mean the same for ever.
    return MinHash(num_perm=BANDS * ROWS, seed=1, scheme="affine32")
