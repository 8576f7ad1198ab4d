"""A closed-loop HTTP client that costs little: it shares the machine's cores with the server it measures.

    python -m tests.bench.load URL BODIES OUT CLIENTS SECONDS

N clients, each with one connection and one request in flight, send the bodies (JSON Lines, in order) for
SECONDS, after a fifth of that as warm-up, with the API key BENCH_KEY of the environment if there is one. OUT gets {"latencies_ms": [...], "seconds": …, "failed": …}.
A server may close a connection between two answers; then the request goes out again on a new one, and its
time goes on.
One asyncio protocol a connection, no HTTP library: about 0.1 ms of a core for a request.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass
class Tally:
    """What all clients of a run share."""

    requests: Iterator[bytes]
    measure_from: float
    until: float
    latencies_ms: list[float] = field(default_factory=list)
    failed: int = 0


class Client(asyncio.Protocol):
    """One request in flight: sends, waits for the whole answer, sends again."""

    def __init__(self, tally: Tally) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tally = tally
        self._buffer = b""
        self._request = next(tally.requests)
        self._started = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return
        now = time.perf_counter()
        if self._started >= self._tally.measure_from:
            self._tally.latencies_ms.append((now - self._started) * 1e3)
            self._tally.failed += not head.startswith(b"HTTP/1.1 200")
        if now >= self._tally.until:
            self.done.set_result(None)
            self._transport.close()
            return
        self._request = next(self._tally.requests)
        self._started = now
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            asyncio.get_running_loop().create_task(self._connect_again())

    async def _connect_again(self) -> None:
        host, port = self._transport.get_extra_info("peername")[:2]
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, host, port)
        except OSError as error:
            self.done.set_exception(error)

    def _send(self) -> None:
        self._buffer = b""
        self._transport.write(self._request)


async def run(url: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, object]:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    if key := os.environ.get("BENCH_KEY"):
        head += f"Authorization: Bearer {key}\r\n"
    head += "Content-Length: "
    requests = [head.encode() + str(len(b)).encode() + b"\r\n\r\n" + b for b in bodies]
    start = time.perf_counter()
    measure_from = start + seconds / 5
    tally = Tally(itertools.cycle(requests), measure_from, measure_from + seconds)
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Client(tally), host, port) for _ in range(clients)]
    await asyncio.gather(*(client.done for _, client in made))
    return {"latencies_ms": tally.latencies_ms, "seconds": seconds, "failed": tally.failed}


if __name__ == "__main__":
    url, bodies, out, clients, seconds = sys.argv[1:]
    lines = Path(bodies).read_bytes().splitlines()
    Path(out).write_text(json.dumps(asyncio.run(run(url, lines, int(clients), float(seconds)))))
