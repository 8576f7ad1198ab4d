"""Headers as Ray Serve can read them: it takes some for UTF-8, and answers 500 to bytes that are none.

It calls `middlewares` for each of its HTTP servers where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is
`serve.headers:middlewares`, as cluster/local.py has it.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


class Utf8Headers:
    """ASGI middleware: bytes above 127, which HTTP leaves to whoever reads them (RFC 9110, section 5.5), as UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope["headers"] = [(name, as_utf8(value)) for name, value in scope["headers"]]
        await self._app(scope, receive, send)


def as_utf8(value: bytes) -> bytes:
    if value.isascii():
        return value
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value


def middlewares() -> list[Middleware]:
    return [Middleware(Utf8Headers)]
