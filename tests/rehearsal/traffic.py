"""Steady requests to a service while things happen to it, and what came of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

# A client waits so long for an answer, and so long before it asks again.
PATIENCE_S, AGAIN_S = 10.0, 0.5


@dataclass(frozen=True)
class Asked:
    at: float
    """`time.monotonic` of its sending."""
    first: bool
    """Whether the first try was answered with 200."""
    answered: bool
    """Whether that one or the second was."""
    took_s: float


class Traffic:
    """`rate` requests a second, whether those before them are answered or not. A client tries twice."""

    def __init__(
        self, address: Callable[[], str | None], path: str, body: bytes, key: str, rate: float
    ) -> None:
        self._address, self._path, self._body, self._rate = address, path, body, rate
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._ends = threading.Event()
        self._pool = ThreadPoolExecutor(64)
        self.asked: list[Asked] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ends.wait(max(0.0, due - time.monotonic())):
            self._pool.submit(self._ask)
            due += 1 / self._rate

    def _ask(self) -> None:
        began = time.monotonic()
        first = answered = self._try()
        if not first:
            time.sleep(AGAIN_S)
            answered = self._try()
        self.asked.append(Asked(began, first, answered, time.monotonic() - began))

    def _try(self) -> bool:
        address = self._address()
        if address is None:
            return False
        try:
            # Each request is another client's.
            answer = httpx.post(
                f"{address}{self._path}", content=self._body, headers=self._headers, timeout=PATIENCE_S
            )
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    def between(self, begin: float, end: float) -> list[Asked]:
        return [one for one in list(self.asked) if begin <= one.at < end]

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        self._pool.shutdown()
