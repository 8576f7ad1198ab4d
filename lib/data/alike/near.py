"""Near duplicates: texts as sets of shingles, found by MinHash and bands, told by their Jaccard similarity.

A text is the set of its shingles: runs of `size` words, or of characters, in Unicode's compatible form (NFKC) and
without case. Where a language puts no spaces between words (Chinese, Japanese, Thai …), each character counts as a
word, so that one unit serves all. Two texts are near duplicates where the Jaccard similarity of their sets,
|A ∩ B| / |A ∪ B|, is at least a threshold.

Which pairs to compare is told by MinHash (Broder 1997): for a random order of all shingles, the least of two sets is
the same with a probability that is their similarity J. Of `bands` bands of `rows` such hashes, one at least agrees with
probability 1 - (1 - J^rows)^bands (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3). `Bands.of`
chooses both so that this is FOUND at the threshold, and more above. All hashes of a text are computed, not one
permutation with densified bins (Li, Owen and Zhang 2012; Shrivastava 2017): that saves time with sets much larger than
the number of hashes, and with the sets of 10 to 100 shingles that reviews and messages have, most bins would be copies.

What agrees in a band is compared before it counts. A row's sketch is the SKETCH least hashes of its shingles: all of
them for most texts, for which the similarity is exact; of longer texts it is estimated (Broder 1997; Cohen and Kaplan
2007) with a standard error of sqrt(J (1 - J) / SKETCH), 0.0125 at 0.8. Nothing here knows Ray.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from lib.data.splitting.split import mix
from lib.settings import NearSettings

# Probability that a pair whose similarity is just the threshold agrees in a band.
FOUND = 0.995
# More bands find as much with longer ones, in which fewer unlike texts agree; and each is 16 bytes a row to shuffle.
MOST_BANDS = 16
# Of the rows that agree in a band, how many of those before it each is compared with, beside the first.
NEIGHBOURS = 6
# Shingles of a sketch: 4 KiB for the longest of texts.
SKETCH = 1024
# Of a longer text only so many characters are compared.
MOST_CHARACTERS = 1 << 20
# Characters that are looked at together: what is made of them is about 40 times as many bytes.
SLICE_CHARACTERS = 1 << 18
# Elements of sketches that are compared together.
COMPARED = 1 << 21

LINK = pa.schema([("a", pa.int64()), ("b", pa.int64())])
# Scripts without spaces between words: first and last + 1 of their code points.
UNSPACED = (
    (0x0E00, 0x0F00),  # Thai, Lao
    (0x1000, 0x10A0),  # Myanmar
    (0x1780, 0x1800),  # Khmer
    (0x3040, 0x3100),  # kana
    (0x31F0, 0x3200),
    (0x3400, 0x4DC0),  # Han
    (0x4E00, 0xA000),
    (0xF900, 0xFB00),
    (0x20000, 0x32400),
)
NO_WORD, LETTER, WORD = 0, 1, 2
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Bands:
    """How many bands of how many hashes."""

    bands: int
    rows: int

    @classmethod
    def of(cls, threshold: float) -> Bands:
        """The longest bands of which MOST_BANDS or fewer find a pair at the threshold with probability FOUND.

        A low threshold needs more than MOST_BANDS of two hashes: bands of one would let nearly all texts meet.
        """
        rows = 2
        while cls._needed(threshold, rows + 1) <= MOST_BANDS and rows < 24:
            rows += 1
        return cls(cls._needed(threshold, rows), rows)

    @staticmethod
    def _needed(threshold: float, rows: int) -> int:
        agrees = min(threshold**rows, 1 - 1e-12)
        return int(np.ceil(np.log(1 - FOUND) / np.log(1 - agrees) - 1e-9))

    def found(self, similarity: float) -> float:
        """Probability that a pair of this similarity agrees in a band."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


@dataclass(frozen=True)
class Shingles:
    """Of several texts, one after the other; a text has at least one."""

    hashes: np.ndarray
    """uint64, with repetitions."""
    starts: np.ndarray
    """int64 [texts]: where those of a text begin."""

    def __len__(self) -> int:
        return len(self.starts)


def band_keys(texts: Sequence[str | None], near: NearSettings) -> tuple[np.ndarray, int]:
    """int64 [texts, bands]: texts that agree in a band have the same key there; and of how many hashes the sketches of all
    would be at most."""
    bands = Bands.of(near.threshold)
    parts, size = [np.empty((0, bands.bands), np.int64)], 0
    for shingles in sliced(texts, near):
        parts.append(_keys(minhash(shingles, bands), bands))
        size += int(np.minimum(np.diff([*shingles.starts, len(shingles.hashes)]), SKETCH).sum())
    return np.concatenate(parts), size


def sketches(texts: Sequence[str | None], near: NearSettings) -> pa.ListArray:
    """list<uint32> [texts]: the SKETCH least hashes of each text's shingles, sorted, each once."""
    found: list[np.ndarray] = []
    for shingles in sliced(texts, near):
        short = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
        for start, end in pairwise([*shingles.starts.tolist(), len(short)]):
            found.append(np.unique(short[start:end])[:SKETCH])
    offsets = np.cumsum([0, *map(len, found)], dtype=np.int32)
    values = np.concatenate(found) if found else np.empty(0, np.uint32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.uint32()))


def similarities(first: pa.ListArray, second: pa.ListArray) -> np.ndarray:
    """float64 [pairs]: Jaccard similarity of the sketches first[i] and second[i]; exact where both are whole sets."""
    sizes = [np.diff(side.offsets.to_numpy()).astype(np.int64) for side in (first, second)]
    ends = np.cumsum(sizes[0] + sizes[1])
    cuts = np.searchsorted(ends, np.arange(0, ends[-1] if len(ends) else 0, COMPARED), side="right")
    parts = [
        _similarities(first[start:end], second[start:end])
        for start, end in pairwise([*np.unique(cuts).tolist(), len(ends)])
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def _similarities(first: pa.ListArray, second: pa.ListArray) -> np.ndarray:
    pairs = np.arange(len(first), dtype=np.uint64)
    sizes = [np.diff(side.offsets.to_numpy()).astype(np.int64) for side in (first, second)]
    keys = np.concatenate(
        [
            (np.repeat(pairs, size) << np.uint64(32)) | side.flatten().to_numpy().astype(np.uint64)
            for side, size in zip((first, second), sizes, strict=True)
        ]
    )
    keys.sort()
    new = np.ones(len(keys), bool)
    new[1:] = keys[1:] != keys[:-1]
    both = ~new
    owner = (keys >> np.uint64(32)).astype(np.int64)
    # Which element of the union this is, from 1 on.
    ends = np.cumsum(new)
    starts = np.searchsorted(owner, np.arange(len(first)))
    rank = ends - (ends[starts] - 1)[owner]
    union = np.bincount(owner[new], minlength=len(first))
    # Where a sketch leaves some out, only the least of the union are known to be in both or not.
    cut = (sizes[0] >= SKETCH) | (sizes[1] >= SKETCH)
    size = np.where(cut, np.minimum(union, SKETCH), union)
    common = np.bincount(owner[both & (rank <= size[owner])], minlength=len(first))
    similar: np.ndarray = common / size
    return similar


def candidates(keys: np.ndarray, positions: np.ndarray) -> pa.Table:
    """LINK of rows that share a key and may be alike: each with the first of those and with the NEIGHBOURS before it, so
    that k rows give fewer than (NEIGHBOURS + 1) k links and not k².

    With the first alone, one unlike row that comes first would part all others. `keys` int64 [n] and `positions`
    int64 [n] come in any order. a < b, each pair once.
    """
    keys, positions, head = _runs_of_equals(keys, positions)
    links = [(positions[head], positions)]
    for step in range(1, NEIGHBOURS + 1):
        same = keys[step:] == keys[:-step]
        links.append((positions[:-step][same], positions[step:][same]))
    return unique_links(*(np.concatenate(side) for side in zip(*links, strict=True)))


def equals(keys: np.ndarray, positions: np.ndarray) -> pa.Table:
    """LINK of rows that share a key and are alike for sure: each with the first, k - 1 for k rows."""
    _, positions, head = _runs_of_equals(keys, positions)
    return unique_links(positions[head], positions)


def _runs_of_equals(keys: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both, sorted by key and then by position, and for each row the number of the first of its key."""
    order = np.lexsort((positions, keys))
    keys = keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    return keys, positions[order], np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))


def unique_links(a: np.ndarray, b: np.ndarray) -> pa.Table:
    """LINK sorted by a and b, each pair once; a row is not linked with itself."""
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    keep = a != b
    keep[1:] &= (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return pa.table([a[keep], b[keep]], schema=LINK)


def verified(rows: pa.Table, threshold: float) -> pa.Table:
    """`a` int64, `position` int64 and the sketch as `value` of rows that may be near duplicates of row a, and of row a itself,
    in any order → LINK of those that are."""
    return linked_to_first(rows, similarities, threshold, COMPARED // SKETCH)


def linked_to_first(
    rows: pa.Table, similar: Callable[[pa.Array, pa.Array], np.ndarray], threshold: float, at_once: int
) -> pa.Table:
    """The same with whatever tells how `similar` the values of two columns are, `at_once` pairs at a time."""
    a, position = rows["a"].to_numpy(), rows["position"].to_numpy()
    order = np.lexsort((position, a))
    a, position = a[order], position[order]
    heads = np.flatnonzero(a == position)
    at = np.searchsorted(a[heads], a)
    # A source that changed between the passes may lack a row.
    there = (at < len(heads)) & (a != position)
    there[there] &= a[heads][at[there]] == a[there]
    member = np.flatnonzero(there)
    value = rows["value"].combine_chunks()
    value = value.chunk(0) if isinstance(value, pa.ChunkedArray) else value
    found = [np.empty(0, np.int64)]
    for start in range(0, len(member), at_once):
        part = member[start : start + at_once]
        first = value.take(pa.array(order[heads[at[part]]]))
        alike = similar(first, value.take(pa.array(order[part])))
        found.append(part[alike >= threshold])
    chosen = np.concatenate(found)
    return unique_links(a[chosen], position[chosen])


def sliced(texts: Sequence[str | None], near: NearSettings) -> Iterator[Shingles]:
    """Shingles of all texts, of a bounded number of characters at a time."""
    held: list[str] = []
    size = 0
    for text in texts:
        folded = unicodedata.normalize("NFKC", (text or "")[:MOST_CHARACTERS]).casefold()
        held.append(" ".join(folded.split()) if near.unit == "characters" else folded)
        size += len(folded)
        if size >= SLICE_CHARACTERS:
            yield shingles_of(held, near)
            held, size = [], 0
    if held:
        yield shingles_of(held, near)


def shingles_of(folded: Sequence[str], near: NearSettings) -> Shingles:
    """Runs of `near.size` units of each text. One of fewer units is a single shingle; one without any (of signs alone,
    say) is like no other but its equal."""
    lengths = np.fromiter(map(len, folded), np.int64, len(folded))
    # A lone surrogate has no UTF-32 of its own.
    codes = np.frombuffer("".join(folded).encode("utf-32-le", "surrogatepass"), "<u4")
    hashes, owner = _units(codes, np.repeat(np.arange(len(folded)), lengths), near.unit)
    counts = np.bincount(owner, minlength=len(folded))
    runs: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for size in range(1, near.size + 1):
        mine = (counts >= size) if size == near.size else (counts == size)
        of = mine[owner]
        if of.any():
            run, whose = _runs(hashes[of], owner[of], size)
            runs.append(run)
            owners.append(whose)
    without = np.flatnonzero(counts == 0)
    digests = [hashlib.blake2b(folded[i].encode("utf-8", "replace"), digest_size=8).digest() for i in without]
    runs.append(np.frombuffer(b"".join(digests), "<u8"))
    owners.append(without)
    found, whose = np.concatenate(runs), np.concatenate(owners)
    order = np.argsort(whose, kind="stable")
    return Shingles(found[order], np.searchsorted(whose[order], np.arange(len(folded))))


def _units(codes: np.ndarray, owner: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Hash of each unit, uint64, and the text that it is of: words, or all characters."""
    if unit == "characters":
        return mix(codes.astype(np.uint64)), owner
    kind = _kinds()[codes]
    inside = np.flatnonzero(kind != NO_WORD)
    before = np.zeros_like(kind)
    before[1:] = np.where(owner[1:] == owner[:-1], kind[:-1], NO_WORD)
    begins = ((kind == WORD) | (before != LETTER))[inside]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    place = np.arange(len(inside)) - starts[np.cumsum(begins) - 1]
    # The sum over a word of what a letter at its place is: any other word has another.
    letters = mix((codes[inside].astype(np.uint64) << np.uint64(32)) | place.astype(np.uint64))
    return mix(np.add.reduceat(letters, starts)), owner[inside[starts]]


def _runs(hashes: np.ndarray, owner: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash of each run of `size` units inside a text, and the text."""
    count = len(hashes) - size + 1
    run = np.zeros(count, np.uint64)
    for step in range(size):
        run = mix(run * _GOLDEN + hashes[step : count + step])
    whole = owner[:count] == owner[size - 1 :]
    return run[whole], owner[:count][whole]


def minhash(shingles: Shingles, bands: Bands) -> np.ndarray:
    """uint32 [texts, bands · rows]: for each hash function its least value over a text's shingles.

    Hash function i maps a well mixed 32-bit x to (x xor c_i) · m_i mod 2^32, m_i odd: a permutation of all x.
    """
    masks, factors = _functions(bands.bands * bands.rows)
    short = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
    least = np.empty((len(masks), len(shingles)), np.uint32)
    for i, (mask, factor) in enumerate(zip(masks, factors, strict=True)):
        least[i] = np.minimum.reduceat((short ^ mask) * factor, shingles.starts)
    return least.T


def _keys(least: np.ndarray, bands: Bands) -> np.ndarray:
    """int64 [texts, bands] of the hashes uint32 [texts, bands · rows]: a hash of a band's values and its number."""
    rows = least.reshape(len(least), bands.bands, bands.rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(bands.bands, dtype=np.uint64), rows.shape[:2])
    for step in range(bands.rows):
        keys = mix(keys * _GOLDEN + rows[:, :, step])
    return keys.view(np.int64)


@functools.cache
def _functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks and odd factors uint32 [count]: the same in every process and version."""
    drawn = mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * _GOLDEN)
    short = (drawn >> np.uint64(32)).astype(np.uint32).reshape(2, count)
    return short[0], short[1] | np.uint32(1)


@functools.cache
def _kinds() -> np.ndarray:
    """uint8 [code points]: NO_WORD, LETTER (letters, digits and marks) or WORD, a letter that is a word on its own."""
    kinds = np.zeros(0x110000, np.uint8)
    assigned = (c for start, end in ((0, 0xD800), (0xE000, 0x110000)) for c in range(start, end))
    kinds[[c for c in assigned if unicodedata.category(chr(c))[0] in "LNM"]] = LETTER
    for start, end in UNSPACED:
        kinds[start:end][kinds[start:end] == LETTER] = WORD
    return kinds
