"""An application whose model takes as long as it is told: `serving` around a real batcher, for tests of what waits."""

# Without `from __future__ import annotations`: Ray Serve and FastAPI read the annotations as types.

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from ray import serve as ray_serve

from lib.settings import ServingSettings
from serve.admission import Places, admit
from serve.batching import LengthBatcher
from serve.http import Ready, create_app
from serve.replica import UNBOUNDED


class Asked(BaseModel):
    milliseconds: list[int]


@ray_serve.deployment(name="Slow", max_ongoing_requests=UNBOUNDED)
@ray_serve.ingress()
class Slow:
    def __init__(self, serving: ServingSettings) -> None:
        self._serving = serving
        self._computed: list[int] = []
        # No padding: only rows of one length go together.
        self._batcher = LengthBatcher(self._compute, tokens_per_batch=10_000, padding_per_batch=0)

    def _compute(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        self._computed += [len(row) for row in rows]
        time.sleep(max(map(len, rows)) / 1000)
        return np.array([[len(row)] for row in rows], np.float32)

    def ready(self) -> Ready:
        return Ready(model="slow", version=1, engine="sleep")

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app("Slow", "Takes its time.", self)

        @app.post("/v1/slow")
        async def slow(body: Asked) -> list[int]:
            results = await self._batcher.results([np.zeros(n, np.int32) for n in body.milliseconds])
            return [int(row[0]) for row in results]

        @app.post("/v1/stream")
        async def stream(body: Asked) -> Any:
            async def parts() -> AsyncIterator[str]:
                for wait in body.milliseconds:
                    await asyncio.sleep(wait / 1000)
                    yield f"data: {wait}\n\n"

            return StreamingResponse(parts(), media_type="text/event-stream")

        serving = self._serving
        places = Places(serving.max_ongoing_requests, serving.max_queued_requests)

        @app.get("/state")
        async def state() -> dict[str, Any]:
            return {"computed": self._computed, "waiting": places.waiting, "pid": os.getpid()}

        admit(app, serving, places)
        return app
