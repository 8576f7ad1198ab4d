"""Which training rows come when: one order on every start, which can be entered anywhere.

The rows of a split lie in its shards in one order. An epoch takes them in rounds: the next rows, up to
`shuffle_rows` for each worker, are cut into as many equal windows as there are workers, and window i is
worker i's (rows that are fewer than the workers are left out at the end of an epoch). What a worker does
inside its window (lib.training.batches) is drawn from the seed, the epoch and the round's first row. So
the position in the data is three numbers, and a run that goes on from it meets the batches that a run
that was never stopped meets.

Another number of workers cannot meet the same batches. It first takes the rows that were left of the round
that was begun, as a round of its own, so that no row of the epoch comes twice.

Ray Data reads the windows, each as one block, and its streaming split deals them out. With
`preserve_order` it takes the blocks in the order of the read tasks and hands each to the worker that has
the fewest rows so far, the first of them when they are level: window i of a round to worker i. All rounds
of all epochs are one stream, since starting a Ray Data execution for each epoch would stop the workers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import ray.train
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.train import DataConfig

from lib import storage
from lib.settings import TrainingSettings
from lib.training import batches, checkpoints

# Footers read at the same time when the stream is planned.
FOOTER_THREADS = 16
# Column of a window that holds the number of each row; no slice of a dataset is likely to be named so.
ROW = "_row"


@dataclass(frozen=True)
class Round:
    """One window for each worker."""

    epoch: int
    start: int
    """First row, counted through the shards of the split."""
    rows: int
    """Rows of each window."""
    following: int
    """First row of the next round of this epoch."""
    ends_epoch: bool
    left: tuple[int, ...] = ()
    """The rows themselves, when they are what another number of workers left of a round."""

    def window(self, index: int) -> range | tuple[int, ...]:
        """Row numbers of one window."""
        first = index * self.rows
        if self.left:
            return self.left[first : first + self.rows]
        return range(self.start + first, self.start + first + self.rows)

    def after(self) -> checkpoints.Position:
        """The position when all windows of the round are trained."""
        if self.ends_epoch:
            return checkpoints.Position(self.epoch + 1)
        return checkpoints.Position(self.epoch, self.following)


def rounds(
    total: int, epochs: int, world: int, shuffle_rows: int, begin: checkpoints.Position
) -> Iterator[Round]:
    """All rounds from `begin` to the end of the last epoch, over a split of `total` rows.

    The first is the one that `begin` lies in, from its first row.
    """
    for epoch in range(begin.epoch, epochs):
        start = begin.start if epoch == begin.epoch else 0
        if epoch == begin.epoch and begin.left:
            # Each worker needs a row, even when fewer are left: the epoch must end for all of them.
            left = begin.left + begin.left[-1:] * (world - len(begin.left))
            start = begin.following
            yield Round(epoch, begin.start, len(left) // world, start, total - start < world, left)
        while rows := min(shuffle_rows, (total - start) // world):
            following = start + rows * world
            yield Round(epoch, start, rows, following, ends_epoch=total - following < world)
            start = following


@dataclass(frozen=True)
class Shard:
    """A Parquet file of the split and where its row groups begin, counted through the split."""

    uri: str
    bounds: tuple[int, ...]
    """First row of each row group, and one past the last row."""


def shards_of(uris: Sequence[str]) -> list[Shard]:
    """The split's files with the rows of each, from their footers."""
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        groups = list(pool.map(_group_rows, uris))
    found, start = [], 0
    for uri, rows in zip(uris, groups, strict=True):
        bounds = [start]
        for count in rows:
            bounds.append(bounds[-1] + count)
        found.append(Shard(uri, tuple(bounds)))
        start = bounds[-1]
    return found


def _group_rows(uri: str) -> list[int]:
    with storage.open_file(uri) as file:
        footer = pq.ParquetFile(file).metadata
        return [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]


def read_rows(shards: Sequence[Shard], rows: Sequence[int], columns: list[str]) -> pa.Table:
    """Rows of the split, given by rising numbers, as one table with their numbers in the column ROW.

    Only the row groups between the first and the last are read.
    """
    start, stop = rows[0], rows[-1] + 1
    parts = []
    for shard in shards:
        if shard.bounds[0] >= stop or shard.bounds[-1] <= start:
            continue
        spans = list(zip(shard.bounds, shard.bounds[1:], strict=False))
        wanted = [i for i, (first, end) in enumerate(spans) if first < stop and end > start]
        with storage.open_file(shard.uri) as file:
            table = pq.ParquetFile(file).read_row_groups(wanted, columns=columns)
        first = spans[wanted[0]][0]
        parts.append(table.slice(max(start - first, 0), stop - max(start, first)))
    table = pa.concat_tables(parts).combine_chunks()
    numbers = np.asarray(rows, np.int64)
    if len(numbers) < table.num_rows:
        table = table.take(pa.array(numbers - start))
    return table.append_column(ROW, pa.array(numbers))


class Windows(Datasource):
    """Ray Data's view of the rounds: one read task, and so one block, for each window, in order."""

    def __init__(self, shards: list[Shard], coming: list[Round], world: int, columns: list[str]) -> None:
        super().__init__()
        self._tasks = [
            _read_task(shards, coming_round.window(index), columns)
            for coming_round in coming
            for index in range(world)
        ]

    def __len__(self) -> int:
        return len(self._tasks)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return self._tasks

    def estimate_inmemory_data_size(self) -> int | None:
        return None


def _read_task(shards: list[Shard], rows: Sequence[int], columns: list[str]) -> ReadTask:
    held = [s for s in shards if s.bounds[0] <= rows[-1] and s.bounds[-1] > rows[0]]
    return ReadTask(
        partial(_read_block, held, rows, columns),
        BlockMetadata(num_rows=len(rows), size_bytes=None, exec_stats=None, input_files=None),
    )


def _read_block(shards: list[Shard], rows: Sequence[int], columns: list[str]) -> list[pa.Table]:
    return [read_rows(shards, rows, columns)]


class Dealer(DataConfig):
    """Tells Ray Train how to deal the training split to its workers.

    Which window comes first depends on the latest checkpoint, and how many windows make a round on the
    number of workers: both are known only when a group of workers starts, which may be several times in
    a run. Ray Train asks its DataConfig at that moment.
    """

    def __init__(
        self,
        uris: list[str],
        epochs: int,
        shuffle_rows: int,
        run_folder: str,
        elastic: bool = False,
        begin: str | None = None,
    ) -> None:
        super().__init__()
        self.uris = uris
        self.epochs = epochs
        self.shuffle_rows = shuffle_rows
        self.run_folder = run_folder
        self.begin = begin
        # Workers whose number follows the cluster may hold all its CPU slots; the reads take none then.
        self.cpus_per_read = 0 if elastic else 1

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """An iterator over its own windows for each worker, whatever Ray Train holds under the name."""
        begin = checkpoints.latest_position(self.run_folder, world_size, self.begin)
        shards = shards_of(self.uris)
        coming = list(rounds(shards[-1].bounds[-1], self.epochs, world_size, self.shuffle_rows, begin))
        source = Windows(shards, coming, world_size, batches.columns(self.uris[0]))
        (name,) = datasets
        return [{name: split} for split in deal(source, world_size, self.cpus_per_read)]


def deal(source: Windows, world: int, cpus_per_read: int = 1) -> list[ray.data.DataIterator]:
    """Iterators, one for each worker, whose blocks are that worker's windows in order."""
    dataset = ray.data.read_datasource(
        source,
        num_cpus=cpus_per_read,
        # A worker trains on a window for longer than the next takes to read, and each read at a time is a process,
        # which takes seconds to start.
        concurrency=world,
        override_num_blocks=max(len(source), 1),
    )
    options = copy.deepcopy(dataset.context.execution_options)
    options.preserve_order = True
    dataset.context.execution_options = options
    dataset.context.target_max_block_size = None  # else a window of wide rows would become two blocks
    splits: list[ray.data.DataIterator] = dataset.streaming_split(world, equal=True)
    return splits


@dataclass(frozen=True)
class Group:
    """The micro-batches of one optimiser step, and where the training stands after it."""

    micro_batches: list[batches.Planned]
    epoch: int
    ends_epoch: bool
    ends_training: bool
    position: checkpoints.Position
    seen: float
    """As `State.seen`."""
    rest: list[batches.Planned]
    """What this worker has still to train of its window."""

    def rows_left(self) -> list[int]:
        return sorted(row for planned in self.rest for row in planned.rows[ROW].to_pylist())


class Coming:
    """The windows that this worker still has to train on, the first of them read while the model is built."""

    def __init__(
        self, total: int, training: TrainingSettings, world: int, begin: checkpoints.Position
    ) -> None:
        self.total, self.training, self.world = total, training, world
        self.skip = begin.steps
        self.rounds = list(rounds(total, training.epochs, world, training.shuffle_rows, begin))
        self._tables: Iterator[pa.Table] = iter(())
        if self.rounds:
            shard = ray.train.get_dataset_shard("train")
            # A block is a window; with a batch size the last rows of an epoch would be joined to the next.
            self._tables = iter(
                shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
            )
        self._first = ThreadPoolExecutor(1).submit(lambda: list(itertools.islice(self._tables, 1)))

    def tables(self) -> Iterator[tuple[Round, pa.Table]]:
        tables = itertools.chain(self._first.result(), self._tables)
        for coming, table in zip(self.rounds, tables, strict=True):
            if table.num_rows != coming.rows:
                raise RuntimeError(f"Ray Data dealt {table.num_rows} rows for {coming}")
            yield coming, table

    def group(self, of: Round, planned: list[batches.Planned], index: int) -> Group:
        """The `index`-th optimiser step of a round."""
        size = self.training.accumulation
        count = -(-len(planned) // size)
        ends_round = index == count - 1
        # What was left of a round ends where the round ends.
        behind = of.following - of.rows * self.world
        trained = behind + of.rows * self.world * (index + 1) / count
        inside = checkpoints.Position(of.epoch, of.start, index + 1, of.following, of.left)
        return Group(
            micro_batches=planned[index * size : (index + 1) * size],
            epoch=of.epoch,
            ends_epoch=ends_round and of.ends_epoch,
            ends_training=ends_round and of == self.rounds[-1],
            position=of.after() if ends_round else inside,
            seen=of.epoch * self.total + (self.total if ends_round and of.ends_epoch else trained),
            rest=[] if ends_round else planned[(index + 1) * size :],
        )
