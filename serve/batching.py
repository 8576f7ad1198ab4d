"""Dynamic batching inside a replica: rows of many requests, computed together with rows of like length.

One thread owns the engine. While it computes, rows gather; when it is free it takes the one that has
waited longest and those nearest to it in length, as long as they pad little, up to a budget of tokens.
Nobody waits for a batch to fill: a row that finds the engine idle is computed at once, so one client pays
nothing, and the batches grow by themselves as the load does.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lib.engines import rounded

Row = TypeVar("Row", bound=Sized)
"""Such as token ids; as long as its tokens are many."""
Result = TypeVar("Result")
"""Such as float32 [C], or [T, C] for T tokens."""


@dataclass(frozen=True)
class Waiting(Generic[Row, Result]):
    """A row in the queue and where its result goes."""

    row: Row
    result: Future[Result]
    since: float = field(default_factory=time.perf_counter)


class LengthBatcher(Generic[Row, Result]):
    """Queue and engine thread. `compute`, from rows to as many results, is only ever called from that one thread.

    A batch holds at most `tokens_per_batch` tokens, and `padding_per_batch` of padding: with more, two
    batches would be quicker than one (at 32 clients, reviews of 22 to 129 tokens: a third more rows/s).
    `seen` is told of each batch, by the seconds that its rows have waited.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Row]], Iterable[Result]],
        tokens_per_batch: int,
        padding_per_batch: int,
        seen: Callable[[Sequence[float]], None] = lambda waits: None,
    ) -> None:
        self._compute, self._seen = compute, seen
        self._tokens_per_batch = tokens_per_batch
        self._padding_per_batch = padding_per_batch
        self._queue: list[Waiting[Row, Result]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def results(self, rows: Sequence[Row]) -> list[Result]:
        """The result of each row, in the order of `rows`.

        A caller that goes away takes its rows out of the queue. Raises what `compute` raised.
        """
        waiting: list[Waiting[Row, Result]] = [Waiting(row, Future()) for row in rows]
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._queue.extend(waiting)
            self._changed.notify()
        try:
            return await asyncio.gather(*(asyncio.wrap_future(w.result) for w in waiting))
        finally:
            for one in waiting:
                one.result.cancel()  # does nothing where there is a result

    def close(self) -> None:
        """Compute what is queued, then end the thread; later calls of `results` raise RuntimeError."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                batch = self._take()
                if not batch and self._closed:
                    return
            # From here on a row can no longer be cancelled.
            batch = [w for w in batch if w.result.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _take(self) -> list[Waiting[Row, Result]]:
        """Take from the queue the row that waited longest and those nearest to it in length."""
        if not self._queue:
            return []
        lengths = [len(waiting.row) for waiting in self._queue]
        chosen: set[int] = set()
        longest = total = 0
        for i in sorted(range(len(lengths)), key=lambda i: abs(lengths[i] - lengths[0])):
            longest, total = max(longest, lengths[i]), total + lengths[i]
            padded = (len(chosen) + 1) * rounded(longest)
            if chosen and (padded > self._tokens_per_batch or padded - total > self._padding_per_batch):
                break
            chosen.add(i)
        batch = [self._queue[i] for i in sorted(chosen)]
        self._queue = [w for i, w in enumerate(self._queue) if i not in chosen]
        return batch

    def _answer(self, batch: list[Waiting[Row, Result]]) -> None:
        now = time.perf_counter()
        try:
            self._seen([now - w.since for w in batch])
            results = self._compute([w.row for w in batch])
        except Exception as error:
            for one in batch:
                one.result.set_exception(error)
            return
        for one, result in zip(batch, results, strict=True):
            one.result.set_result(result)
