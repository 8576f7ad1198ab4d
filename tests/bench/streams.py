"""A client of chat streams that costs little: it shares the machine's cores with the server it measures.

    python -m tests.bench.streams URL BODIES OUT CLIENTS

N clients take the bodies (JSON Lines, each with "stream": true) in their order, each with one request in flight and a
connection for each, with the API key BENCH_KEY of the environment if there is one. OUT gets, for every request, when it
was sent, when its first and its last token came (seconds; null where the model said nothing), its text, and whether it
failed: another status than 200, or no end; and the seconds of all.
A token's part of a stream is a server-sent event whose delta has content.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


async def ask(host: str, port: int, request: bytes, began: float) -> dict[str, Any]:
    """One stream, read to its end. Chunk sizes of HTTP/1.1 are lines of their own between the events, and skipped."""
    found: dict[str, Any] = {"sent": time.perf_counter() - began, "first": None, "last": None, "text": ""}
    ended = False
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        status = await reader.readline()
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                if line.startswith(b"data: [DONE]"):
                    break
                continue
            choices = json.loads(line[6:]).get("choices") or [{}]
            ended = ended or bool(choices[0].get("finish_reason"))
            if content := (choices[0].get("delta") or {}).get("content"):
                now = time.perf_counter() - began
                found["first"] = found["first"] or now
                found["last"] = now
                found["text"] += content
    finally:
        writer.close()
    return {**found, "failed": b" 200 " not in status or not ended}


async def run(url: str, bodies: list[bytes], clients: int) -> dict[str, Any]:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    if key := os.environ.get("BENCH_KEY"):
        head += f"Authorization: Bearer {key}\r\n"
    requests = iter([f"{head}Content-Length: {len(b)}\r\n\r\n".encode() + b for b in bodies])
    began = time.perf_counter()

    async def client() -> list[dict[str, Any]]:
        return [await ask(host, port, request, began) for request in requests]

    each = await asyncio.gather(*(client() for _ in range(clients)))
    return {"streams": [one for found in each for one in found], "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    url, bodies, out, clients = sys.argv[1:]
    lines = Path(bodies).read_bytes().splitlines()
    Path(out).write_text(json.dumps(asyncio.run(run(url, lines, int(clients)))))
