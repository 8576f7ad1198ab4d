"""Semantic near duplicates: vectors of texts that point the same way, found by random hyperplanes, told by their cosine.

A vector's code says on which side of each of BITS random hyperplanes it lies; two vectors at an angle of θ differ in a bit
with probability θ / π (Charikar 2002, "Similarity estimation techniques from rounding algorithms"). In each of several
tables, rows that agree in `bits` bits of the code are in one bucket, and the codes of a bucket's rows are compared: pairs
that differ in no more bits than vectors at the threshold do, but for one in 2,000, are candidates. `Tables.of` makes
buckets of about BUCKET rows if texts were spread evenly, and takes as many tables as find a pair at the threshold with
probability FOUND. Up to BUCKET rows are one bucket, in which nothing is missed. Candidates are then compared by the cosine
of their vectors, kept in half precision (an error of about 1e-5 in a cosine).

Unlike rows meet in a bucket, unlike in `near`: hence the codes. A row is linked with the first and the NEIGHBOURS before it
of those that are alike, in the order of their codes. Of a larger bucket than WINDOW rows, each is compared with as many before it.
Nothing here knows Ray.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lib.data.alike.near import FOUND, NEIGHBOURS, linked_to_first, unique_links
from lib.data.splitting.split import mix

BITS = 512
CODE_BYTES = BITS // 8
BUCKET = 1024
MOST_TABLES, MOST_BITS = 24, 20
WINDOW = 4096
# Rows of a bucket that are compared with those before them at a time, and pairs whose vectors are.
ROWS_AT_ONCE = 1024
PAIRS_AT_ONCE = 8192
# Standard deviations above the mean: the number of bits in which vectors at the threshold differ is seldom larger.
SELDOM = 3.3
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Tables:
    """How many tables, of buckets by how many bits, and in how many bits of the whole code candidates differ at most."""

    tables: int
    bits: int
    most: int

    @classmethod
    def of(cls, threshold: float, rows: int) -> Tables:
        """For so many rows and a cosine."""
        same = 1 - np.arccos(min(threshold, 1.0)) / np.pi
        bits = min(MOST_BITS, int(np.ceil(np.log2(max(rows / BUCKET, 1)))))
        while cls._needed(same, bits) > MOST_TABLES:
            bits -= 1
        deviation = np.sqrt(BITS * same * (1 - same))
        most = int(np.ceil(BITS * (1 - same) + SELDOM * deviation))
        return cls(cls._needed(same, bits), bits, most)

    @staticmethod
    def _needed(same: float, bits: int) -> int:
        agrees = min(same**bits, 1 - 1e-12)
        return int(np.ceil(np.log(1 - FOUND) / np.log(1 - agrees) - 1e-9)) if bits else 1

    def keys(self, codes: np.ndarray) -> np.ndarray:
        """int64 [rows, tables] of codes uint8 [rows, CODE_BYTES]: rows of one bucket have the same."""
        bits = np.unpackbits(codes, axis=1, count=self.tables * self.bits).reshape(
            len(codes), self.tables, self.bits
        )
        values = bits.astype(np.uint64) @ (np.uint64(1) << np.arange(self.bits, dtype=np.uint64))
        tables = np.arange(1, self.tables + 1, dtype=np.uint64) << np.uint64(32)
        return mix((values | tables) * _GOLDEN).view(np.int64)


def codes(vectors: np.ndarray) -> np.ndarray:
    """uint8 [rows, CODE_BYTES] of vectors float32 [rows, D]."""
    return np.packbits(vectors @ _planes(vectors.shape[1]) > 0, axis=1)


@functools.cache
def _planes(width: int) -> np.ndarray:
    """float32 [width, BITS], normally distributed (Box and Muller 1958): the same in every process and version."""
    drawn = mix(np.arange(1, 2 * width * BITS + 1, dtype=np.uint64) * _GOLDEN)
    even = ((drawn >> np.uint64(11)).astype(float) + 0.5) * 2.0**-53
    first, second = even.reshape(2, width, BITS)
    planes: np.ndarray = (np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)).astype(np.float32)
    return planes


def to_binary(rows: np.ndarray) -> pa.Array:
    """fixed_size_binary [rows] of the bytes of each row."""
    rows = np.ascontiguousarray(rows)
    width = rows.dtype.itemsize * rows.shape[1]
    return pa.Array.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])


def from_binary(values: pa.Array, dtype: type) -> np.ndarray:
    """The way back: [rows, width]."""
    width = values.type.byte_width
    taken = np.frombuffer(values.buffers()[1], np.uint8)[values.offset * width :][: len(values) * width]
    return taken.view(dtype).reshape(len(values), -1)


def candidates(rows: pa.Table, most: int) -> pa.Table:
    """`key` and `position` int64 and `code` of rows, in any order → LINK of rows of one bucket whose codes differ in no more
    than `most` bits: the first, and the NEIGHBOURS before each, of those alike."""
    key, position = rows["key"].to_numpy(), rows["position"].to_numpy()
    code = rows["code"].combine_chunks()
    code = from_binary(code.chunk(0) if isinstance(code, pa.ChunkedArray) else code, np.uint8)
    order = np.lexsort((position, *code.view(np.uint64).T[::-1], key))
    key, position, code = key[order], position[order], code[order]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else np.empty(0, int)
    links = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(key)], strict=True):
        for first, second in _alike(code[start:end], most):
            links.append((position[start + first], position[start + second]))
    one, other = (np.concatenate(side) for side in zip(*links, strict=True))
    return unique_links(np.minimum(one, other), np.maximum(one, other))


def _alike(code: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of a bucket's codes uint8 [rows, CODE_BYTES]: numbers of rows that are alike."""
    for start in range(0, len(code) if len(code) > 1 else 0, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, len(code))
        before = max(0, start - WINDOW)
        signs = np.unpackbits(code[before:end], axis=1).astype(np.float32) * 2 - 1
        # BITS less twice the number of bits that differ.
        alike = signs[start - before :] @ signs.T >= BITS - 2 * most
        alike &= np.arange(before, end) < np.arange(start, end)[:, None]
        rank = np.cumsum(alike, axis=1)
        alike &= (rank == 1) | (rank > rank[:, -1:] - NEIGHBOURS)
        row, column = np.nonzero(alike)
        yield start + row, before + column


def cosines(first: pa.Array, second: pa.Array) -> np.ndarray:
    """float64 [pairs] of vectors in half precision, as `to_binary` has them."""
    a, b = (from_binary(side, np.float16).astype(float) for side in (first, second))
    found: np.ndarray = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return found


def verified(rows: pa.Table, threshold: float) -> pa.Table:
    """As `near.verified`, with vectors as `value`."""
    return linked_to_first(rows, cosines, threshold, PAIRS_AT_ONCE)
