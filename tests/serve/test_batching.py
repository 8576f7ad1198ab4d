"""The batcher: nobody waits for a batch to fill, like goes with like, the oldest goes first, none is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from serve.batching import LengthBatcher


class Engine:
    """Stands where the model does: answers each row with its length, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        self.batches.append([len(row) for row in rows])
        self.free.wait()
        if any(len(row) == 13 for row in rows):
            raise ValueError("unlucky")
        return np.array([[len(row)] for row in rows], np.float32)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def batcher(engine: Engine) -> Iterator[LengthBatcher[np.ndarray, np.ndarray]]:
    made = LengthBatcher(engine, tokens_per_batch=64, padding_per_batch=16)
    yield made
    engine.free.set()
    made.close()


def rows(*lengths: int) -> list[np.ndarray]:
    return [np.zeros(n, np.int32) for n in lengths]


async def until(condition: Callable[[], object]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass in 5 s")


def test_results_come_in_the_order_of_the_rows(batcher: LengthBatcher[np.ndarray, np.ndarray]) -> None:
    found = asyncio.run(batcher.results(rows(5, 60, 1, 17)))
    assert [int(f[0]) for f in found] == [5, 60, 1, 17]


def test_an_idle_engine_computes_at_once(
    batcher: LengthBatcher[np.ndarray, np.ndarray], engine: Engine
) -> None:
    start = time.perf_counter()
    for _ in range(20):
        asyncio.run(batcher.results(rows(4)))
    assert engine.batches == [[4]] * 20
    assert time.perf_counter() - start < 1


def test_rows_that_gather_while_it_is_busy_are_computed_by_length(
    batcher: LengthBatcher[np.ndarray, np.ndarray], engine: Engine
) -> None:
    async def scene() -> list[np.ndarray]:
        engine.free.clear()
        first = asyncio.create_task(batcher.results(rows(8)))
        await until(lambda: engine.batches)
        # The oldest of these is 30 long: it goes first, with the one nearest to it; 1 and 2 would pad.
        later = [asyncio.create_task(batcher.results(rows(n))) for n in (30, 1, 29, 2)]
        await asyncio.sleep(0.05)
        engine.free.set()
        return [(await task)[0] for task in (first, *later)]

    found = asyncio.run(scene())
    assert engine.batches == [[8], [30, 29], [1, 2]]
    assert [int(f[0]) for f in found] == [8, 30, 1, 29, 2]


def test_a_row_above_the_budget_is_computed_alone(
    batcher: LengthBatcher[np.ndarray, np.ndarray], engine: Engine
) -> None:
    asyncio.run(batcher.results(rows(500)))
    assert engine.batches == [[500]]


def test_a_failed_batch_fails_its_own_requests_only(batcher: LengthBatcher[np.ndarray, np.ndarray]) -> None:
    async def scene() -> None:
        with pytest.raises(ValueError, match="unlucky"):
            await batcher.results(rows(13))
        assert (await batcher.results(rows(4)))[0][0] == 4

    asyncio.run(scene())


def test_a_client_that_goes_away_leaves_the_queue(
    batcher: LengthBatcher[np.ndarray, np.ndarray], engine: Engine
) -> None:
    async def scene() -> None:
        engine.free.clear()
        first = asyncio.create_task(batcher.results(rows(8)))
        await until(lambda: engine.batches)
        gone = asyncio.create_task(batcher.results(rows(40)))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0.05)
        engine.free.set()
        await first

    asyncio.run(scene())
    assert engine.batches == [[8]]


def test_closing_answers_what_is_queued(engine: Engine) -> None:
    async def scene() -> float:
        batcher = LengthBatcher(engine, tokens_per_batch=64, padding_per_batch=16)
        engine.free.clear()
        queued = [asyncio.create_task(batcher.results(rows(n))) for n in (8, 60)]
        await until(lambda: engine.batches)
        batcher.close()
        engine.free.set()
        found = [float((await task)[0][0]) for task in queued]
        with pytest.raises(RuntimeError, match="closed"):
            await batcher.results(rows(3))
        return sum(found)

    assert asyncio.run(scene()) == 68


def test_many_clients_at_once_lose_nothing(
    batcher: LengthBatcher[np.ndarray, np.ndarray], engine: Engine
) -> None:
    async def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            lengths = rng.integers(14, 64, rng.integers(1, 5)).tolist()
            assert [int(f[0]) for f in await batcher.results(rows(*lengths))] == lengths

    async def scene() -> None:
        await asyncio.gather(*(client(seed) for seed in range(32)))

    asyncio.run(scene())
    assert any(len(batch) > 1 for batch in engine.batches)
