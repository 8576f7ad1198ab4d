"""Source rows as Ray Data blocks: one block a shard, whatever files, machines and batches there are.

Ray Data cuts and merges blocks by their bytes. It never cuts a row, so a block of ours is *one* row whose
columns are lists (`text` list<string>, …): what one task reads together arrives at one task together, and
the dataset's shards depend on the source alone. Flattening a list column copies nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from lib.artifacts import SPLITS
from lib.data.reading.quarantine import DAMAGED, Entry
from lib.data.reading.readers import read_rows
from lib.data.reading.rows import ROW_BITS as ROW_BITS
from lib.data.reading.rows import Rows
from lib.data.reading.shapes import Shape
from lib.data.reading.sources import SourceFile
from lib.errors import DataError, WhorlError
from lib.settings import Settings

# Files smaller than this are read together, so that many small files do not make many small shards.
FRAGMENT_BYTES = 64 << 20
# A block holds no more text than this, however few rows that is: memory is bounded by it.
BLOCK_BYTES = 32 << 20

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
    bad_rows: bool = False
    """Whether blocks tell rows and files that cannot be read (`Block.bad`), instead of ending at the first."""
    shapes: tuple[Shape, ...] = ()
    """Of each source (`SourceFile.source`): how its columns become those of a block. None: as they are."""
    weights: tuple[float, ...] = ()
    """Of each source: how often training has its rows. None: once."""

    def shape(self, file: SourceFile) -> Shape:
        return self.shapes[file.source] if self.shapes else Shape(self.columns, lists=self.lists)

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

    def weighed(self, positions: np.ndarray) -> np.ndarray:
        """float64 [rows]: weights of rows' sources."""
        of_files = [self.weights[file.source] if self.weights else 1.0 for file in self.files]
        found: np.ndarray = np.array(of_files)[positions >> ROW_BITS]
        return found

    def ranks(self, settings: Settings) -> np.ndarray:
        """int8 [files]: of equal rows, which file's stays; all the same where leaks are not mended."""
        return self.given if settings.data.leakage == "check" else np.zeros(len(self.files), np.int8)

    def placed(self, position: int) -> tuple[SourceFile, int]:
        """File of a position, and number of the row in it, from 0."""
        return self.files[position >> ROW_BITS], position & ((1 << ROW_BITS) - 1)

    def place(self, position: int) -> str:
        """File and row of a position, for messages."""
        file, row = self.placed(position)
        return f"{file.name} row {row + 1}"


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
    bad: list[Entry] = field(default_factory=list)
    """Rows between its own that could not be read, and files that are damaged behind them."""


def read_blocks(reading: Reading, fragment: int, files: tuple[int, int]) -> Iterator[Block]:
    """The blocks of one fragment, in order.

    A file that cannot be read ends the fragment with a block that tells the problem: the job then reports
    the first problem in source order, not the one that some task met first.
    """
    number = 0
    try:
        for rows, bad in _chunks(_tables(reading, files), reading.block_rows):
            yield Block(fragment, number, rows, bad=bad)
            number += 1
    except WhorlError as error:
        yield Block(fragment, number, _no_rows(list(reading.columns)), str(error))


# Rows with their positions, and those between and behind them that could not be read.
_Part = tuple[pa.Table, list[Entry]]


def _tables(reading: Reading, files: tuple[int, int]) -> Iterator[_Part]:
    left = math.inf if reading.limit is None else reading.limit
    for index in range(*files):
        following = index << ROW_BITS
        try:
            for table, bad in _of_file(reading, index):
                last = table.num_rows >= left
                if last:
                    table = table.slice(0, int(left))
                    bad = [entry for entry in bad if entry.position < table[POSITION][-1].as_py()]
                left -= table.num_rows
                yield table, bad
                if last:
                    return
                following = 1 + max(
                    following - 1,
                    table[POSITION][-1].as_py() if table.num_rows else 0,
                    *(entry.position for entry in bad[-1:]),
                )
        except DataError as error:
            if not reading.bad_rows:
                raise
            why = str(error).removeprefix(reading.files[index].name).strip()
            yield _no_rows(list(reading.columns)), [Entry(following, DAMAGED, why, "")]


def _of_file(reading: Reading, index: int) -> Iterator[_Part]:
    file, first = reading.files[index], index << ROW_BITS
    shape = reading.shape(file)
    for rows in read_rows(file, shape.read, reading.block_rows, shape.read_lists, reading.bad_rows):
        table = shape.apply(rows.table)
        yield table.append_column(POSITION, pa.array(rows.numbers + first)), _entries(rows, first)


def _entries(rows: Rows, first: int) -> list[Entry]:
    return [Entry(first + bad.number, bad.reason, bad.why, bad.text, bad.rows) for bad in rows.bad]


def _chunks(tables: Iterator[_Part], rows: int) -> Iterator[_Part]:
    """The same rows in tables of `rows` rows, or fewer where BLOCK_BYTES or as many bad rows are reached first."""
    held: list[pa.Table] = []
    bad: list[Entry] = []
    held_rows = held_bytes = 0
    for table, waiting in tables:
        rest = table
        while rest.num_rows or waiting:
            bytes_a_row = max(1.0, rest.nbytes / max(1, rest.num_rows))
            fitting = max(1, int((BLOCK_BYTES - held_bytes) / bytes_a_row))
            part = rest.slice(0, min(rows - held_rows, fitting))
            rest = rest.slice(part.num_rows)
            before = len(waiting)
            if rest.num_rows:
                end = rest[POSITION][0].as_py()
                before = sum(entry.position < end for entry in waiting)
            bad += waiting[:before]
            waiting = waiting[before:]
            held.append(part)
            held_rows += part.num_rows
            held_bytes += part.nbytes
            if held_rows >= rows or held_bytes >= BLOCK_BYTES * 0.99 or len(bad) >= rows:
                yield pa.concat_tables(held).combine_chunks(), bad
                held, bad, held_rows, held_bytes = [], [], 0, 0
    if held_rows or bad:
        yield pa.concat_tables(held).combine_chunks(), bad


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
            "bad": pa.array([json.dumps([asdict(entry) for entry in block.bad])]),
        },
    )


def from_row(row: pa.Table, columns: Sequence[str]) -> Block:
    fragment, number, problem, bad = (
        row[name][0].as_py() for name in ("fragment", "number", "problem", "bad")
    )
    rows = unpack(row, [*columns, POSITION])
    return Block(fragment, number, rows, problem, [Entry(**entry) for entry in json.loads(bad)])


def redacted_of(row: pa.Table) -> dict[str, int]:
    """What `lib.data.stream.redact_block` found in a packed block: kind → values, each once a row, and `rows` that have any."""
    found: dict[str, int] = json.loads(row["redacted"][0].as_py()) if "redacted" in row.column_names else {}
    return found
