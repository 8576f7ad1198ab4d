"""What is seen of an application from outside: each request as one `Exchange`, handed to whoever counts, logs or traces it.

Outermost of an application's middleware, so that what is refused for its key or its size is seen too. It knows how long
a request took and what came of it, never what was said.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.settings import ServingSettings
from serve import logs, metrics, traces
from serve.access import is_open, path_of
from serve.http import REQUEST_ID, Readiness

logger = logging.getLogger("ray.serve")

# nginx's status for a client that went away before its answer began.
CLIENT_GONE = 499


@dataclass(frozen=True)
class Exchange:
    """A request and what came of it."""

    id: str
    """Empty where the client's own is not fit for a log."""
    method: str
    route: str
    """The path as the application declares it, such as /v1/models/{model}; `other` where nothing answers under it."""
    status: int
    began: float
    """Seconds since 1970."""
    seconds: float
    """Until the last byte of the answer was sent."""
    first_event_s: float | None
    """Until the first event of a stream was sent: the time to its first token. None of an answer that is none."""
    model: str
    """NAME@VERSION that answered; empty where none did."""
    tokens: int
    key: str | None
    """Id of the API key, not the key."""
    headers: dict[str, str] = field(repr=False)
    """Of the request, without its key: where a trace that it belongs to is told."""


Sink = Callable[[Exchange], None]


class Observing:
    """ASGI middleware: hands each request, when it is over, to the sinks."""

    def __init__(self, app: ASGIApp, sinks: Sequence[Sink]) -> None:
        self._app, self._sinks = app, sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(path_of(scope)):
            await self._app(scope, receive, send)
            return
        began, clock = time.time(), time.perf_counter()
        status, is_stream, first = 0, False, None

        async def sending(message: Message) -> None:
            nonlocal status, is_stream, first
            if message["type"] == "http.response.start":
                status = message["status"]
                is_stream = b"text/event-stream" in dict(message["headers"]).get(b"content-type", b"")
            elif is_stream and first is None and message.get("body"):
                first = time.perf_counter() - clock
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            status = status or CLIENT_GONE
            raise
        except Exception:
            status = status or 500
            raise
        finally:
            seconds = time.perf_counter() - clock
            self._tell(_exchange(scope, status or CLIENT_GONE, began, seconds, first))

    def _tell(self, exchange: Exchange) -> None:
        for sink in self._sinks:
            try:
                sink(exchange)
            except Exception:  # what is told of an answer never costs it
                logger.exception("request %s could not be told of", exchange.id)


def _exchange(scope: Scope, status: int, began: float, seconds: float, first: float | None) -> Exchange:
    state = scope.get("state", {})
    headers = {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name != b"authorization"
    }
    key, identity = state.get("key"), headers.get("x-request-id", "")
    return Exchange(
        id=identity if REQUEST_ID.match(identity) else "",
        method=str(scope["method"]),
        route=str(getattr(scope.get("route"), "path", "other")),
        status=status,
        began=began,
        seconds=seconds,
        first_event_s=first,
        model=str(state.get("model", "")),
        tokens=int(state.get("tokens") or 0),
        key=key.id if key else None,
        headers=headers,
    )


def observe(app: FastAPI, replica: Readiness, serving: ServingSettings) -> None:
    """Put `Observing` in front of an application that is built in a replica, and watch the replica's model.

    After `record` and `guard`: what is added last is outermost.
    """
    own = metrics.current()
    sinks: list[Sink] = [own.request]
    if serving.logs.requests:
        sinks.append(logs.request)
    if serving.traces is not None:
        sinks.append(traces.Spans(serving.traces, own.application).request)
    app.add_middleware(Observing, sinks=sinks)
    metrics.Watch(own, replica).start()
