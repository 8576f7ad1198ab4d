"""Source rows as Ray Data blocks: one block a shard, whatever files, machines and batches there are.

Ray Data cuts and merges blocks by their bytes. It never cuts a row, so a block of ours is *one* row whose
columns are lists (`text` list<string>, …): what one task reads together arrives at one task together, and
the dataset's shards depend on the source alone. Flattening a list column copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lib.artifacts import SPLITS
from lib.data.readers import read_tables
from lib.data.sources import SourceFile
from lib.errors import WhorlError
from lib.settings import Settings

# Files smaller than this are read together, so that many small files do not make many small shards.
FRAGMENT_BYTES = 64 << 20
# A block holds no more text than this, however few rows that is: memory is bounded by it.
BLOCK_BYTES = 32 << 20
# A row's position is its file's number and its number in the file, in one integer.
ROW_BITS = 40

POSITION = "position"


@dataclass(frozen=True)
class Reading:
    """What to read of every file, and how much into one block."""

    files: tuple[SourceFile, ...]
    columns: dict[str, str]
    """Name here → column of the source: the task's own, and the slices."""
    lists: frozenset[str]
    """Those of `columns` that may hold lists or objects."""
    block_rows: int
    limit: int | None

    def fragments(self) -> list[tuple[int, int]]:
        """First and last + 1 of the files that one task reads one after the other."""
        if self.limit is not None:  # the first rows are known only by counting
            splits = [file.split for file in self.files]
            starts = [i for i in range(len(splits)) if i == 0 or splits[i] != splits[i - 1]]
            return list(zip(starts, [*starts[1:], len(splits)], strict=True))
        fragments: list[tuple[int, int]] = []
        start, size = 0, 0
        for i, file in enumerate(self.files):
            if i > start and size + file.size > FRAGMENT_BYTES:
                fragments.append((start, i))
                start, size = i, 0
            size += file.size
        return [*fragments, (start, len(self.files))]

    @property
    def given(self) -> np.ndarray:
        """Index into SPLITS, int8 [files], of files whose split is given; -1 where it is not."""
        return np.array([SPLITS.index(file.split) if file.split else -1 for file in self.files], np.int8)

    def splits(self, positions: np.ndarray) -> np.ndarray:
        """The same of rows, int8 [rows]."""
        found: np.ndarray = self.given[positions >> ROW_BITS]
        return found

    def ranks(self, settings: Settings) -> np.ndarray:
        """int8 [files]: of equal rows, which file's stays; all the same where leaks are not mended."""
        return self.given if settings.data.leakage == "check" else np.zeros(len(self.files), np.int8)

    def place(self, position: int) -> str:
        """File and row of a position, for messages."""
        file, row = position >> ROW_BITS, position & ((1 << ROW_BITS) - 1)
        return f"{self.files[file].name} row {row + 1}"


@dataclass(frozen=True)
class Block:
    """Rows of a source that stay together."""

    fragment: int
    number: int
    """Among the blocks of the fragment."""
    rows: pa.Table
    """The reading's columns as strings, and `position` int64."""
    problem: str | None = None
    """What could not be read after the rows before it; the block then has no rows."""


def read_blocks(reading: Reading, fragment: int, files: tuple[int, int]) -> Iterator[Block]:
    """The blocks of one fragment, in order.

    A file that cannot be read ends the fragment with a block that tells the problem: the job then reports
    the first problem in source order, not the one that some task met first.
    """
    number = 0
    try:
        for rows in _chunks(_tables(reading, files), reading.block_rows):
            yield Block(fragment, number, rows)
            number += 1
    except WhorlError as error:
        yield Block(fragment, number, _no_rows(list(reading.columns)), str(error))


def _tables(reading: Reading, files: tuple[int, int]) -> Iterator[pa.Table]:
    left = math.inf if reading.limit is None else reading.limit
    columns = list(reading.columns.values())
    lists = frozenset(reading.columns[name] for name in reading.lists)
    for index in range(*files):
        row = 0
        for read in read_tables(reading.files[index], columns, reading.block_rows, lists):
            table = read.rename_columns(list(reading.columns)).slice(0, int(min(left, read.num_rows)))
            left -= table.num_rows
            first = (index << ROW_BITS) + row
            positions = np.arange(first, first + table.num_rows, dtype=np.int64)
            row += table.num_rows
            yield table.append_column(POSITION, pa.array(positions))
            if left <= 0:
                return


def _chunks(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` rows, or fewer where BLOCK_BYTES is reached first."""
    held: list[pa.Table] = []
    held_rows = held_bytes = 0
    for table in tables:
        rest = table
        while rest.num_rows:
            bytes_a_row = max(1.0, rest.nbytes / rest.num_rows)
            fitting = max(1, int((BLOCK_BYTES - held_bytes) / bytes_a_row))
            part = rest.slice(0, min(rows - held_rows, fitting))
            rest = rest.slice(part.num_rows)
            held.append(part)
            held_rows += part.num_rows
            held_bytes += part.nbytes
            if held_rows >= rows or held_bytes >= BLOCK_BYTES * 0.99:
                yield pa.concat_tables(held).combine_chunks()
                held, held_rows, held_bytes = [], 0, 0
    if held_rows:
        yield pa.concat_tables(held).combine_chunks()


def _no_rows(columns: Sequence[str]) -> pa.Table:
    fields = [(name, pa.string()) for name in columns]
    return pa.schema([*fields, (POSITION, pa.int64())]).empty_table()


def flat(column: pa.ChunkedArray) -> pa.Array:
    """The values of a column as one array; without a copy when they already are (combine_chunks copies)."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def pack(columns: dict[str, pa.Array], scalars: dict[str, pa.Array]) -> pa.Table:
    """A table of one row: each of `columns`, all of one length, as a list, beside `scalars` of length 1."""
    lists = {
        name: pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
        for name, values in columns.items()
    }
    return pa.table({**scalars, **lists})


def pack_by(partition: np.ndarray, columns: dict[str, pa.Array]) -> pa.Table:
    """A row for each value of `partition` int32 [n] that there is, with its part of each of `columns` as a list: what a
    shuffle moves are few rows, however many values there are."""
    order = np.argsort(partition, kind="stable")
    values, starts = np.unique(partition[order], return_index=True)
    offsets = pa.array(np.append(starts, len(order)).astype(np.int32))
    taken = pa.array(order)
    lists = {name: pa.ListArray.from_arrays(offsets, column.take(taken)) for name, column in columns.items()}
    return pa.table({"partition": pa.array(values, pa.int32()), **lists})


def unpack(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """The list columns `names` of packed rows, flat."""
    return pa.table({name: flat(rows[name]).flatten() for name in names})


def to_row(block: Block) -> pa.Table:
    return pack(
        {name: flat(block.rows[name]) for name in block.rows.column_names},
        {
            "fragment": pa.array([block.fragment], pa.int32()),
            "number": pa.array([block.number], pa.int32()),
            "problem": pa.array([block.problem], pa.string()),
        },
    )


def from_row(row: pa.Table, columns: Sequence[str]) -> Block:
    fragment, number, problem = (row[name][0].as_py() for name in ("fragment", "number", "problem"))
    return Block(fragment, number, unpack(row, [*columns, POSITION]), problem)
