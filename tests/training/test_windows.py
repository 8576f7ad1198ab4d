"""The order of the rows: every row once, the same on every start, entered anywhere; Ray Data keeps to it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from hypothesis import given
from hypothesis import strategies as st
from ray.data.datasource import ReadTask

from lib import storage as files
from lib.training.checkpoints import Position
from lib.training.windows import ROW, Round, Windows, deal, read_rows, rounds, shards_of

SIZES = st.tuples(st.integers(1, 400), st.integers(1, 3), st.integers(1, 5), st.integers(1, 90))


def rows_of(coming: list[Round], world: int) -> list[int]:
    return [row for r in coming for index in range(world) for row in r.window(index)]


@given(SIZES)
def test_an_epoch_has_every_row_once_but_fewer_than_the_workers(sizes: tuple[int, int, int, int]) -> None:
    total, epochs, world, shuffle_rows = sizes
    coming = list(rounds(total, epochs, world, shuffle_rows, Position()))
    for epoch in range(epochs):
        own = [r for r in coming if r.epoch == epoch]
        assert rows_of(own, world) == list(range(total // world * world))
        assert all(r.rows <= shuffle_rows for r in own)
        assert [r.ends_epoch for r in own] == [False] * (len(own) - 1) + [True] * bool(own)


@given(SIZES, st.integers(0, 10_000))
def test_entered_anywhere_it_goes_on_as_it_would_have(sizes: tuple[int, int, int, int], at: int) -> None:
    total, epochs, world, shuffle_rows = sizes
    coming = list(rounds(total, epochs, world, shuffle_rows, Position()))
    if not coming:
        return
    at %= len(coming)
    inside = Position(coming[at].epoch, coming[at].start, steps=3)
    assert list(rounds(total, epochs, world, shuffle_rows, inside)) == coming[at:]
    assert list(rounds(total, epochs, world, shuffle_rows, coming[at].after())) == coming[at + 1 :]


@given(SIZES, st.integers(1, 5), st.integers(0, 10_000), st.data())
def test_another_number_of_workers_sees_the_rest_of_the_epoch(
    sizes: tuple[int, int, int, int], other: int, at: int, data: st.DataObject
) -> None:
    total, _, world, shuffle_rows = sizes
    coming = list(rounds(total, 1, world, shuffle_rows, Position()))
    if not coming:
        return
    begun = coming[at % len(coming)]
    left = tuple(sorted(data.draw(st.sets(st.sampled_from(rows_of([begun], world)), min_size=1))))
    begin = Position(0, begun.start, 0, begun.following, left)
    rest = list(rounds(total, 1, other, shuffle_rows, begin))
    expected = [*left, *left[-1:] * (other - len(left))]  # so that each worker has a row
    expected = expected[: len(expected) // other * other]
    following = range(begun.following, begun.following + (total - begun.following) // other * other)
    assert rows_of(rest, other) == [*expected, *following]
    assert [r.ends_epoch for r in rest] == [False] * (len(rest) - 1) + [True]
    # Killed once more inside the rows that were left, it meets the same rounds again.
    again = Position(0, begun.start, 2, rest[0].following, rest[0].left)
    assert list(rounds(total, 1, other, shuffle_rows, again)) == rest


def write_shards(folder: Path, sizes: list[int]) -> list[str]:
    uris, start = [], 0
    for i, size in enumerate(sizes):
        table = pa.table({"length": list(range(start, start + size)), "text": ["not read"] * size})
        pq.write_table(table, folder / f"part-{i:05d}.parquet", row_group_size=7)
        uris.append(files.uri(folder / f"part-{i:05d}.parquet"))
        start += size
    return uris


def test_rows_are_read_across_row_groups_and_files(tmp_path: Path) -> None:
    shards = shards_of(write_shards(tmp_path, [10, 1, 23, 8]))
    assert [s.bounds for s in shards] == [(0, 7, 10), (10, 11), (11, 18, 25, 32, 34), (34, 41, 42)]
    for start, stop in [(0, 42), (0, 1), (6, 8), (9, 12), (10, 11), (13, 40), (33, 35), (41, 42)]:
        for rows in (range(start, stop), range(start, stop, 3)):
            table = read_rows(shards, rows, ["length"])
            assert table.column_names == ["length", ROW]
            assert table["length"].to_pylist() == table[ROW].to_pylist() == list(rows)


def test_what_reads_needs_no_torch() -> None:
    code = "import sys, lib.training.windows; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", "each process that reads would import it"


class Late(Windows):
    """Windows whose reads end in another order than they began: the first take the longest."""

    def get_read_tasks(self, *arguments: object, **options: object) -> list[ReadTask]:
        tasks = super().get_read_tasks(*arguments, **options)
        waits = [0.5 if i % 4 == 0 else 0.0 for i in range(len(tasks))]
        return [
            ReadTask(partial(late, task.read_fn, wait), task.metadata)
            for task, wait in zip(tasks, waits, strict=True)
        ]


def late(read: Callable[[], list[pa.Table]], wait: float) -> list[pa.Table]:
    begun = time.monotonic()  # the same clock in all processes
    time.sleep(wait)
    (table,) = read()
    spans = {"begun": begun, "ended": time.monotonic()}
    for name, moment in spans.items():
        table = table.append_column(name, pa.array([moment] * table.num_rows))
    return [table]


@pytest.mark.slow
def test_the_streaming_split_deals_as_planned_whatever_read_is_late(
    ray_cluster: None, tmp_path: Path
) -> None:
    world, shuffle_rows = 3, 5
    shards = shards_of(write_shards(tmp_path, [31, 2, 40]))
    for begin in (Position(), Position(1, 15, 2), Position(1, 15, 0, 30, (16, 19, 20, 27, 28, 29))):
        coming = list(rounds(73, 3, world, shuffle_rows, begin))
        source = Late(shards, coming, world, ["length"])
        with ThreadPoolExecutor(world) as pool:
            dealt = list(pool.map(blocks, deal(source, world)))
        for rank in range(world):
            assert [block["length"] for block in dealt[rank]] == [list(r.window(rank)) for r in coming]
        spans = [(block["begun"][0], block["ended"][0]) for part in dealt for block in part]
        assert max(at_once(spans)) <= world, "each read at a time costs a process"


def blocks(shard: ray.data.DataIterator) -> list[dict[str, list[Any]]]:
    return [b.to_pydict() for b in shard.iter_batches(batch_size=None, batch_format="pyarrow")]


def at_once(spans: list[tuple[float, float]]) -> list[int]:
    """How many of the spans last when each begins."""
    return [sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans]
