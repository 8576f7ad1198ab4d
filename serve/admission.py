"""What an application lets in: how long a body may be, how many requests at once, and how long they may take.

Ray Serve refuses and times out too, in plain text; here every refusal has the form of serve/http.py:

    413 body_too_large     by its declared length, or as it arrives
    408 body_timeout       the body did not come whole within `timeout_s`
    503 overloaded         all places are taken and the queue is full, or a place came free too late
    504 timeout            nothing of an answer was there after `timeout_s`

A body is read before its request takes a place, so that slow clients keep nobody out. Of a client that goes away Ray
Serve cancels the request, which gives its place back and takes its rows out of the batcher's queue.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.settings import ServingSettings
from serve.http import error_response

logger = logging.getLogger("ray.serve")


class RefusedError(Exception):
    """A request that is not let in, and what it is answered."""

    def __init__(self, answer: Response) -> None:
        super().__init__()
        self.answer = answer


class GoneError(Exception):
    """The client went away before its body was whole."""


class Places:
    """`ongoing` at once, `queued` waiting for one of them; a `queued` of -1 is no bound. Of one event loop."""

    def __init__(self, ongoing: int, queued: int) -> None:
        self._free = asyncio.Semaphore(ongoing)
        self._queued = queued
        self.waiting = 0

    @asynccontextmanager
    async def one(self, timeout_s: float) -> AsyncIterator[None]:
        """Hold a place. Raises RefusedError at once where the queue is full, or when it waited for `timeout_s`."""
        if self._free.locked() and 0 <= self._queued <= self.waiting:
            raise RefusedError(overloaded())
        self.waiting += 1
        try:
            await asyncio.wait_for(self._free.acquire(), timeout_s)
        except TimeoutError:
            raise RefusedError(overloaded()) from None
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._free.release()


class Admission:
    """ASGI middleware with these bounds; without `places`, as many at once as come. Only POST takes a place: health
    and documentation answer also when there is none."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float, places: Places | None = None) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            receiving = again(await self._read(scope, receive), receive)
            if self._places is None or scope["method"] != "POST":
                await self._answer(scope, receiving, send)
                return
            async with self._places.one(self._timeout_s):
                await self._answer(scope, receiving, send)
        except RefusedError as refused:
            await refused.answer(scope, receive, send)
        except GoneError:
            return

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise RefusedError(self._too_long())
        parts, left, more = [], self._max_bytes, True
        try:
            async with asyncio.timeout(self._timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise GoneError
                    parts.append(message.get("body", b""))
                    left -= len(parts[-1])
                    if left < 0:
                        raise RefusedError(self._too_long())
                    more = message.get("more_body", False)
        except TimeoutError:
            reason = f"the body did not arrive within {self._timeout_s:g} s"
            raise RefusedError(error_response(408, reason, code="body_timeout")) from None
        return b"".join(parts)

    def _too_long(self) -> Response:
        reason = f"the body is longer than {self._max_bytes:,} bytes; send fewer or shorter inputs"
        return error_response(413, reason, code="body_too_large")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)
            # A stream may last, as long as something comes of it.
            limit.reschedule(asyncio.get_running_loop().time() + self._timeout_s)

        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                await self._app(scope, receive, sending)
        except TimeoutError:
            if not limit.expired():
                raise
            if has_begun:
                # Its end is all that can be told of it: what is not completed the server closes.
                logger.warning("an answer brought nothing for %g s and was broken off", self._timeout_s)
                return
            reason = f"there was no answer within {self._timeout_s:g} s; send less, or try again"
            raise RefusedError(error_response(504, reason, code="timeout")) from None


def admit(app: FastAPI, serving: ServingSettings, places: Places | None = None) -> None:
    """Put `Admission` in front of an application."""
    app.add_middleware(
        Admission, max_bytes=serving.max_body_bytes, timeout_s=serving.request_timeout_s, places=places
    )


def again(body: bytes, receive: Receive) -> Receive:
    """What an application receives whose body was read already: all of it at once, then what comes later."""
    left = [body]

    async def receiving() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return receiving


def overloaded() -> Response:
    return error_response(503, "too many requests are waiting; try again", code="overloaded")
